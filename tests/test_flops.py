"""Model FLOPs from the configuration, against torch's counter of what really runs: equal, to the last
operation."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop

from mmi_megatron.config import Config, VAEConfig
from mmi_megatron.model import mmfs
from mmi_megatron.model.image_decoder import ImageDecoder
from mmi_megatron.model.language_model import LanguageModel
from mmi_megatron.model.mm_interleaved import MMInterleaved, prepare
from mmi_megatron.model.visual_tokenizer import VisualTokenizer
from mmi_megatron.train.flops import Flops, Holds, count
from tests.samples import SPECIAL, random_batch, small_config
from tests.small_run import randomise


def build(config: Config) -> MMInterleaved:
    """The plain model, random everywhere."""
    model = config.model
    vision = VisualTokenizer(model.vision, model.language.width)
    language = LanguageModel(model.language, model.vision.width, vision.shapes, SPECIAL.boi, SPECIAL.image)
    decoder = ImageDecoder(model.decoder, model.language.width, model.vision.width, vision.shapes)
    whole = MMInterleaved(model, language, vision, decoder if model.loss.next_image else None)
    randomise(whole)
    return whole


PARTS = {
    "resampler": (
        "visual_tokenizer.input_proj",
        "visual_tokenizer.resampler",
        "visual_tokenizer.output_proj",
    ),
    "decoder resampler": ("image_decoder.context_proj", "image_decoder.resampler"),
    "VAE": ("image_decoder.vae.encoder", "image_decoder.vae.quant_conv"),
}
"""Parts whose modules are called as such, so that torch's counter can tell them apart."""


def backward_of_convolution(*operands, out_val):
    """torch's formula, which takes every channel of a grouped convolution to meet every other in the
    gradient of its weights."""
    *operands, groups, mask = operands
    inputs = conv_backward_flop(*operands, groups, [mask[0], False, False], out_val=out_val)
    weights = conv_backward_flop(*operands, groups, [False, mask[1], False], out_val=out_val)
    return inputs + weights // groups


backward_of_convolution._get_raw = True
MAPPING = {torch.ops.aten.convolution_backward: backward_of_convolution}


def sampled(value, shapes, offsets, logits, table_offsets, table_logits, centre, visible, *, sink_value, **_):
    """Stands for the sampling of MMFS, which is no product; everything takes part."""
    queries = (offsets.sum((-1, -2)) + logits.sum((-1, -2)))[..., None]
    every = table_offsets.sum() + table_logits.sum() + (value.mean((0, 1)) if len(value) else 0)
    return queries + every + sink_value


@pytest.fixture(autouse=True)
def no_sampling(monkeypatch):
    monkeypatch.setattr(mmfs, "mmfs_attention", sampled)


def counted(config: Config, seed: int = 3) -> tuple[dict[str, int], dict[str, Flops]]:
    """FLOPs of a micro-batch, as torch counts them (whole, and of parts the forward pass) and as we do."""
    model = build(config)
    inputs = prepare(random_batch(seed), SPECIAL, config.model, torch.device("cpu"))
    assert len(inputs.images) > 3 and len(inputs.drawn) > 1
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
            losses = model(inputs, 0, 0)
        counts = counter.get_flop_counts()
        found = {"forward": counter.get_total_flops()}
        with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
            (losses.tokens.sum() + losses.images.sum() + losses.zero).backward()
        found["backward"] = counter.get_total_flops()
    for part, names in PARTS.items():
        modules = [name for name in counts if name.endswith(names)]
        found[part] = sum(sum(counts[name].values()) for name in modules)
    return found, count(config.model, Holds.of(inputs))


def change(config: Config, **changes) -> Config:
    """Settings of the model changed: ``vision__frozen=True``."""
    for key, value in changes.items():
        *path, name = key.split("__")
        target = config.model
        for part in path:
            target = getattr(target, part)
        assert hasattr(target, name)
        setattr(target, name, value)
    return config


VARIANTS = {
    "everything trained": {},
    "as in the paper": {
        "vision__frozen": True,
        "language__frozen": True,
        "language__train_image_tokens": True,
    },
    "decoder frozen": {"decoder__frozen": True},
    "all frozen that can be": {"vision__frozen": True, "language__frozen": True, "decoder__frozen": True},
    "latents": {"decoder__image_size": 16, "decoder__vae": VAEConfig([8, 16], 1, 4, 4)},
    "dense MMFS": {"language__mmfs__kind": "dense", "decoder__mmfs__kind": "dense"},
    "no MMFS": {"language__mmfs__kind": "none", "decoder__mmfs__kind": "none"},
    "MMFS after the up path": {"decoder__mmfs_placement": "up", "decoder__unet__pooled_tokens": True},
    "MMFS in the down path": {"decoder__mmfs_placement": "down", "decoder__frozen": True},
    "one image in reach": {"language__mmfs__max_images": 1, "decoder__mmfs__max_images": 1},
    "nearest": {"decoder__references": "nearest", "decoder__unet__linear_projection": False},
    "EVA-02": {"vision__tower": "eva"},
    "SigLIP": {"vision__tower": "siglip", "vision__frozen": True},
    "no resampler": {"vision__use_resampler": False},
    "no text loss": {"loss__next_token": 0.0},
    "no image loss": {"loss__next_image": 0.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_what_torch_counts(name):
    config = change(small_config(), **VARIANTS[name])
    found, ours = counted(config)
    for part in PARTS.keys() & ours.keys():
        assert ours[part].forward == found[part], part
    assert sum(part.forward for part in ours.values()) == found["forward"]
    assert sum(part.inputs + part.weights for part in ours.values()) == found["backward"]
