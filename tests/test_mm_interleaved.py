"""The whole model in plain PyTorch: what it is handed, and every switch of the paper's ablations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import mmi_megatron  # noqa: F401  prepares the platform before timm is imported
from data_pipeline.batch import Batch
from mmi_megatron.config import Config
from mmi_megatron.model.image_decoder import ImageDecoder
from mmi_megatron.model.language_model import LanguageModel
from mmi_megatron.model.mm_interleaved import MMInterleaved, prepare
from mmi_megatron.model.visual_tokenizer import VisualTokenizer
from tests.samples import IMAGE_TOKENS, SPECIAL, random_batch, small_config

CPU = torch.device("cpu")


def build(config: Config) -> MMInterleaved:
    torch.manual_seed(0)
    model = config.model
    tokenizer = VisualTokenizer(model.vision, model.language.width)
    language = LanguageModel(model.language, model.vision.width, tokenizer.shapes, SPECIAL.boi, SPECIAL.image)
    decoder = None
    if model.loss.next_image:
        decoder = ImageDecoder(model.decoder, model.language.width, model.vision.width, tokenizer.shapes)
    whole = MMInterleaved(model, language, tokenizer, decoder)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name.endswith("gate") or ".conv." in name:
                parameter.add_(0.3)
    return whole


def losses_of(model: MMInterleaved, batch: Batch, seed: int = 5):
    return model(prepare(batch, SPECIAL, model.settings, CPU), seed, 0)


def without_images(batch: Batch) -> Batch:
    """The same batch with its image tokens turned into text."""
    tokens = batch.tokens.copy()
    tokens[np.isin(tokens, [SPECIAL.boi, SPECIAL.image])] = 7
    empty = np.zeros(0, np.int64)
    return replace(
        batch,
        tokens=tokens,
        images=batch.images[:0],
        image_ids=empty,
        drawn=batch.drawn[:0],
        drawn_index=empty.astype(np.int32),
    )


def test_prepare_counts_positions_over_the_whole_stream():
    batch = random_batch(3)
    inputs = prepare(batch, SPECIAL, small_config().model, CPU)
    bois = np.flatnonzero(batch.tokens == SPECIAL.boi)
    assert len(bois) == len(batch.images) > 2
    for (first, last), image in zip(inputs.contexts, batch.drawn_index, strict=True):
        assert last == bois[image] and batch.tokens[first] == SPECIAL.bos
        assert (batch.tokens[first + 1 : last] != SPECIAL.bos).all()
    for (first, last), image in zip(inputs.references.tolist(), batch.drawn_index, strict=True):
        document = np.searchsorted(batch.cu_seqlens, bois[image], "right")
        own = np.flatnonzero(np.searchsorted(batch.cu_seqlens, bois, "right") == document)
        # The decoder's table of 3 rows reaches 2 images back.
        assert list(range(first, last)) == [i for i in own if i < image][-2:]
    assert inputs.sees.bounds == batch.cu_seqlens.tolist()
    seen = inputs.sees.visible
    assert int(seen.max()) == len(batch.images) and ((seen[:, 1] - seen[:, 0]) <= 3).all()


def test_images_beyond_the_table_are_counted():
    batch = random_batch(3)
    config = small_config().model
    per_document = np.bincount(
        np.searchsorted(batch.cu_seqlens, np.flatnonzero(batch.tokens == SPECIAL.boi), "right")
    )
    config.language.mmfs.max_images = 1
    inputs = prepare(batch, SPECIAL, config, CPU)
    assert inputs.out_of_reach == np.maximum(per_document - 1, 0).sum() > 0


def test_placeholders_without_their_image_are_refused():
    batch = random_batch(3)
    config = small_config().model
    config.vision.resampler.queries = IMAGE_TOKENS + 1
    with pytest.raises(ValueError, match="placeholders"):
        prepare(batch, SPECIAL, config, CPU)


def test_contexts_run_back_from_boi_to_bos():
    hidden = torch.arange(20.0)[:, None]
    context, mask = MMInterleaved.contexts(hidden, [(0, 2), (5, 9), (5, 12)], [0, 2])
    assert context[0, :3, 0].tolist() == [2, 1, 0] and mask[0].tolist() == [True] * 3 + [False] * 5
    assert context[1, :, 0].tolist() == [12, 11, 10, 9, 8, 7, 6, 5] and mask[1].all()


def test_images_without_loss_are_not_drawn():
    config, batch = small_config(), random_batch(3)
    model = build(config)
    drawn = []
    inner = model.image_decoder.loss
    model.image_decoder.loss = lambda pixels, *rest: drawn.append(len(pixels)) or inner(pixels, *rest)
    losses = losses_of(model, batch)
    assert drawn == [len(batch.drawn)] and len(losses.images) == len(batch.drawn) < len(batch.images)


def test_noise_depends_on_the_image_and_not_on_its_place():
    config, batch = small_config(), random_batch(3)
    model = build(config)
    keys = [
        model.image_decoder.draw_keys([i], 5, 0).noise for i in batch.image_ids[batch.drawn_index].tolist()
    ]
    together = model.image_decoder.draw_keys(batch.image_ids[batch.drawn_index].tolist(), 5, 0).noise
    assert torch.equal(torch.cat(keys), together)


def test_a_batch_without_images_still_trains_every_part():
    config, batch = small_config(), random_batch(3)
    model = build(config)
    losses = losses_of(model, without_images(batch))
    assert len(losses.images) == 0 and losses.zero == 0
    (losses.tokens.sum() + losses.images.sum() + losses.zero).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"took no part: {idle[:5]}"


def set_path(config: Config, path: str, value) -> None:
    *parents, last = path.split(".")
    node = config.model
    for parent in parents:
        node = getattr(node, parent)
    assert hasattr(node, last)
    setattr(node, last, value)


ABLATIONS = {
    "MMFS off": {"language.mmfs.kind": "none", "decoder.mmfs.kind": "none"},
    "dense attention in its place": {"language.mmfs.kind": "dense"},
    "single image": {"language.mmfs.max_images": 1, "decoder.references": "nearest"},
    "single scale": {"language.mmfs.levels": [2], "decoder.mmfs.levels": [2]},
    "plain softmax": {"language.mmfs.sink": False, "decoder.mmfs.sink": False},
    "resampler off": {"vision.use_resampler": False},
    "other resolution": {"vision.image_size": 24},
    "up-sampling blocks": {"decoder.mmfs_placement": "up"},
    "down-sampling blocks": {"decoder.mmfs_placement": "down"},
    "noise as the target": {"decoder.target": "epsilon"},
    "attention across documents": {"language.document_attention": False},
    "the LLM frozen": {"language.frozen": True, "language.train_image_tokens": True},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_switch_changes_the_losses_and_trains(name):
    batch = random_batch(3)
    before = losses_of(build(small_config()), batch)
    config = small_config()
    for path, value in ABLATIONS[name].items():
        set_path(config, path, value)
    if name == "other resolution":
        batch = replace(batch, images=batch.images.repeat(2, 1).repeat(2, 2)[:, :24, :24].copy())
    model = build(config)
    after = losses_of(model, batch)
    assert torch.isfinite(after.tokens).all() and torch.isfinite(after.images).all()
    moved = torch.cat([before.tokens - after.tokens, before.images - after.images]).abs().max()
    assert moved > 1e-6, "the switch does nothing"
    (after.tokens.sum() + after.images.sum() + after.zero).backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    idle = sorted(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)
    assert trained and not idle, f"no gradient: {idle[:5]}"


@pytest.mark.parametrize("off", ["next_token", "next_image"])
def test_either_loss_can_be_turned_off(off):
    config, batch = small_config(), random_batch(3)
    setattr(config.model.loss, off, 0.0)
    model = build(config)
    losses = losses_of(model, batch)
    weights = config.model.loss
    total = weights.next_token * losses.tokens.sum() + weights.next_image * losses.images.sum() + losses.zero
    total.backward()
    head = model.language_model.lm_head.weight.grad
    if off == "next_token":
        assert head is None or not head.any()
        assert model.image_decoder.context_proj.weight.grad.any()
    else:
        assert head.any() and model.image_decoder is None and not losses.images.any()
    assert model.visual_tokenizer.vit.patch_embed.proj.weight.grad.any()
