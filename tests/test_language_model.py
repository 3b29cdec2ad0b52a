"""The plain language model against transformers' LLaMA, and packed rows against separate ones."""

from dataclasses import replace

import pytest
import torch

import mmi_megatron  # noqa: F401  prepares the platform before transformers is imported
from mmi_megatron.config import LanguageConfig, MMFSConfig
from mmi_megatron.model.language_model import Cache, LanguageModel, Visibility

SHAPES = ((8, 8), (4, 4), (2, 2), (1, 1))
MMFS = MMFSConfig(heads=4, points=3, value_width=32, table_rows=6, base=4)
CONFIG = LanguageConfig(
    width=48,
    layers=3,
    heads=6,
    kv_heads=2,
    ffn=80,
    vocabulary=61,
    vocabulary_multiple=16,
    mmfs_every=2,
    mmfs=MMFS,
    frozen=False,
    train_image_tokens=False,
)


def randomise(model, seed=0):
    """Random everything: gates, sinks and tables too, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else noise * 0.3 / max(1, parameter.shape[-1]) ** 0.25)
    return model


def build(config, seed=0):
    torch.manual_seed(seed)
    return randomise(LanguageModel(config, 24, SHAPES, boi=59, image=60), seed)


def sees(lengths, visible=None):
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    position = torch.cat([torch.arange(length) for length in lengths])
    if visible is None:
        visible = torch.zeros(bounds[-1], 2, dtype=torch.int32)
    return Visibility(position, bounds, visible)


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_logits_are_those_of_transformers_llama(kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = replace(CONFIG, kv_heads=kv_heads, mmfs=replace(MMFS, kind="none"), vocabulary_multiple=61)
    ours = build(config)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=kv_heads,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
        )
    ).eval()
    state = {("" if n.startswith("lm_head") else "model.") + n: p for n, p in ours.state_dict().items()}
    theirs.load_state_dict(state)
    tokens = torch.randint(0, 61, (23,))
    got = ours.logits(ours(ours.embed(tokens), sees([23]), None))
    want = theirs(tokens[None]).logits[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_packed_documents_equal_separate_ones():
    model = build(CONFIG).double()
    maps = torch.randn(3, 85, 24, dtype=torch.float64)
    tokens = torch.randint(0, 59, (20,))
    visible = torch.tensor(
        [[0, 0]] * 4 + [[0, 1]] * 5 + [[1, 1]] * 3 + [[1, 2]] * 4 + [[1, 3]] * 4, dtype=torch.int32
    )
    packed = model(model.embed(tokens), sees([9, 11], visible), maps)
    first = model(model.embed(tokens[:9]), sees([9], visible[:9]), maps[:1])
    second = model(model.embed(tokens[9:]), sees([11], visible[9:] - 1), maps[1:])
    torch.testing.assert_close(packed, torch.cat([first, second]), atol=1e-12, rtol=1e-12)


def test_a_closed_gate_leaves_the_output_bit_identical():
    model = build(CONFIG)
    for layer in model.layers:
        if layer.mmfs is not None:
            torch.nn.init.zeros_(layer.mmfs.gate)
    without = LanguageModel(replace(CONFIG, mmfs=replace(MMFS, kind="none")), 24, SHAPES, boi=59, image=60)
    without.load_state_dict({n: p for n, p in model.state_dict().items() if ".mmfs." not in n})
    tokens = torch.randint(0, 59, (12,))
    visible = torch.tensor([[0, 0]] * 4 + [[0, 2]] * 8, dtype=torch.int32)
    maps = torch.randn(2, 85, 24)
    got = model(model.embed(tokens), sees([12], visible), maps)
    assert torch.equal(got, without(without.embed(tokens), sees([12]), None))


def test_cached_reading_equals_reading_at_once():
    model = build(CONFIG).double()
    maps = torch.randn(2, 85, 24, dtype=torch.float64)
    tokens = torch.randint(0, 59, (14,))
    visible = torch.tensor([[0, 0]] * 3 + [[0, 1]] * 5 + [[0, 2]] * 6, dtype=torch.int32)
    whole = model(model.embed(tokens), sees([14], visible), maps)
    cache, parts = Cache(), []
    for a, b in [(0, 5), (5, 6), (6, 7), (7, 14)]:
        at = Visibility(torch.arange(a, b), [0, b - a], visible[a:b])
        parts.append(model(model.embed(tokens[a:b]), at, maps, cache))
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-12, rtol=1e-12)


def test_image_tokens_train_beside_a_frozen_model():
    config = replace(CONFIG, frozen=True, train_image_tokens=True)
    model = LanguageModel(config, 24, SHAPES, boi=59, image=60)
    model.freeze()
    hidden = torch.randn(5, 48)
    assert torch.equal(model.logits(hidden)[:, 59:], torch.full((5, 2), -5.0))
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"image_tokens", "layers"}
    assert all(
        ".mmfs." in n for n, p in model.named_parameters() if p.requires_grad and n.startswith("layers")
    )
    tokens = torch.tensor([3, 59, 60])
    with torch.no_grad():
        model.image_tokens.embedding.fill_(1.0)
    shift = model.embed(tokens) - model.embed_tokens(tokens)
    assert shift.sum(-1).tolist() == [0, 48, 0]


def test_padded_vocabulary_rows_stay_out_of_the_loss():
    model = build(CONFIG)
    hidden, labels = torch.randn(4, 48), torch.tensor([3, -100, 60, 0])
    assert model.lm_head.weight.shape[0] == 64 and model.logits(hidden).shape == (4, 61)
    losses = model.token_losses(hidden, labels)
    want = torch.log_softmax(hidden @ model.lm_head.weight[:61].T, -1)
    assert losses[1] == 0
    torch.testing.assert_close(losses[[0, 2, 3]], -want[[0, 2, 3], [3, 60, 0]])
