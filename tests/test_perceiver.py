"""The resampler: against transformers' own Q-Former, and what its mask means."""

from __future__ import annotations

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mmi_megatron.config import DecoderConfig, ResamplerConfig, VisionConfig
from mmi_megatron.convert.released import perceiver_table
from mmi_megatron.convert.rules import save
from mmi_megatron.model.perceiver import Resampler

SMALL = {"queries": 5, "width": 24, "layers": 4, "heads": 4, "ffn": 40, "cross_every": 2, "qk_norm": False}


def build(**settings) -> Resampler:
    torch.manual_seed(0)
    module = Resampler(20, ResamplerConfig(**(SMALL | settings))).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def sequence(batch: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randn(batch, length, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers(masked):
    ours = build()
    config = Blip2QFormerConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=40,
        encoder_hidden_size=20,
        cross_attention_frequency=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        attn_implementation="eager",
    )
    theirs = Blip2QFormerModel(config).double().eval()
    state = save(ours.state_dict(), perceiver_table(ours.config))
    queries = state.pop("queries")
    theirs.load_state_dict({name.removeprefix("blip2qformer."): tensor for name, tensor in state.items()})
    x = sequence()
    mask = torch.arange(9) < torch.tensor([[9], [4], [0]]) if masked else None
    wanted = theirs(
        query_embeds=queries.expand(3, -1, -1),
        encoder_hidden_states=x,
        encoder_attention_mask=None if mask is None else mask.long(),
    ).last_hidden_state
    torch.testing.assert_close(ours(x, mask), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_masked_positions_are_as_if_absent(qk_norm):
    module, x = build(qk_norm=qk_norm), sequence()
    mask = (torch.arange(9) < 4).expand(3, -1)
    torch.testing.assert_close(module(x, mask), module(x[:, :4]))
    altered = torch.where(mask[..., None], x, 1e3)
    torch.testing.assert_close(module(altered, mask), module(x, mask), rtol=0, atol=0)


def test_norm_of_q_and_k_takes_their_scale_away():
    """With the norms, keys and queries scaled up change nothing."""
    module, x = build(qk_norm=True), sequence()
    before = module(x)
    with torch.no_grad():
        for layer in module.layers:
            for name in ("weight", "bias"):
                getattr(layer.attention.query, name).mul_(3)
                getattr(layer.attention.key, name).mul_(3)
    torch.testing.assert_close(module(x), before)


def test_every_parameter_learns():
    module = build(qk_norm=True)
    module(sequence()).pow(2).sum().backward()
    still = [name for name, parameter in module.named_parameters() if parameter.grad.abs().max() < 1e-12]
    # What is added to all keys alike, the softmax does not see; all else must move.
    assert all(name.endswith("key_norm.bias") for name in still)


def test_cross_attention_sits_in_every_nth_layer():
    present = [layer.cross is not None for layer in build(layers=5, cross_every=3).layers]
    assert present == [True, False, False, True, False]


def test_parameters_at_full_size():
    with torch.device("meta"):
        vision = Resampler(1024, VisionConfig().resampler)
        decoder = Resampler(5120, DecoderConfig().resampler)
    assert sum(p.numel() for p in vision.parameters()) == 101_652_480
    assert sum(p.numel() for p in decoder.parameters()) == 23_168_000


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="resampler.heads"):
        build(heads=5)
