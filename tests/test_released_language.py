"""The release's language layers: against transformers' LLaMA with MMFS written out between its parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from mmi_megatron.convert import released

SIDES, MAPS, WIDTH, ROWS = [4, 2, 1], 12, 48, 5
POSITIONS = sum(side * side for side in SIDES)
EXTRA = {"image_embed_dim": MAPS, "cross_attention_frequency": 2, "spatial_shapes": SIDES}


def llama(kv_heads: int = 4) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        vocab_size=11,
        attn_implementation="eager",
    )


def shapes_of_mmfs() -> dict[str, tuple[int, ...]]:
    inner = 32
    return {
        "gate": (1,), "norm1.weight": (WIDTH,), "norm2.weight": (MAPS,),
        "attn.ignore_token": (1, 1, 1, inner), "attn.query_relpos.weight": (ROWS, WIDTH),
        "attn.sampling_offsets.weight": (256, WIDTH), "attn.sampling_offsets.bias": (256,),
        "attn.dynamic_offset_mask.weight": (WIDTH, WIDTH), "attn.dynamic_offset_mask.bias": (WIDTH,),
        "attn.attention_weights.weight": (16 * 3 * 9, WIDTH), "attn.attention_weights.bias": (16 * 3 * 9,),
        "attn.value_proj.weight": (inner, MAPS), "attn.value_proj.bias": (inner,),
        "attn.output_proj.weight": (WIDTH, inner), "attn.output_proj.bias": (WIDTH,),
    }  # fmt: skip


def case(kv_heads: int = 4) -> tuple[LlamaModel, dict[str, Tensor]]:
    """transformers' model in float64, all weights random, and the release's state dict around them."""
    torch.manual_seed(0)
    model = LlamaModel(llama(kv_heads)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    state = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in (0, 2):
        for name, shape in shapes_of_mmfs().items():
            scale = 2.0 if "sampling_offsets.bias" in name else 0.3
            value = torch.randn(shape, dtype=torch.float64) * scale
            state[f"model.layers.{layer}.llama_cross_attn.{name}"] = value
    return model, state


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def mmfs(
    state: dict[str, Tensor], query: Tensor, features: Tensor, seen: Tensor, sides=SIDES, base=16, centre=0.5
) -> Tensor:
    """One query [d], features [M, S, dv], seen [M]: the closed form, from the release's own names. 16
    heads, 8 points."""
    asked = F.linear(query, state["dynamic_offset_mask.weight"], state["dynamic_offset_mask.bias"])
    images = seen.nonzero()[:, 0].tolist()
    total = torch.ones(16, 1, dtype=torch.float64)
    summed = state["ignore_token"].view(16, -1).clone()
    for m in images:
        back = len([i for i in images if i >= m])
        shifted = asked + state["query_relpos.weight"][back]
        offset = F.linear(shifted, state["sampling_offsets.weight"], state["sampling_offsets.bias"])
        logit = F.linear(shifted, state["attention_weights.weight"], state["attention_weights.bias"])
        offset, logit = offset.view(16, 8, 2), logit.view(16, len(sides), 9)
        value = F.linear(features[m], state["value_proj.weight"], state["value_proj.bias"])
        for level, (side, flat) in enumerate(
            zip(sides, value.split([side * side for side in sides]), strict=True)
        ):
            plane = flat.view(side, side, 16, -1).permute(2, 3, 0, 1)  # [heads, channels, y, x]
            grid = 2 * (centre + offset / base) - 1
            found = F.grid_sample(plane, grid[:, None], padding_mode="zeros", align_corners=False)[:, :, 0]
            weight = logit[:, level, :8].exp()
            summed = summed + (found * weight[:, None]).sum(2)
            total = total + weight.sum(1, keepdim=True)
    return F.linear((summed / total).flatten(), state["output_proj.weight"], state["output_proj.bias"])


def reference(model: LlamaModel, state, embeddings: Tensor, features: Tensor, visibility: Tensor) -> Tensor:
    batch, length, _ = embeddings.shape
    rotary = model.rotary_emb(embeddings, torch.arange(length)[None])
    causal = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    hidden = embeddings
    for index, layer in enumerate(model.layers):
        normed = rms(hidden, layer.input_layernorm.weight)
        hidden = hidden + layer.self_attn(normed, position_embeddings=rotary, attention_mask=causal)[0]
        if index % 2 == 0:
            prefix = f"model.layers.{index}.llama_cross_attn."
            own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            inner = {name.removeprefix("attn."): t for name, t in own.items()}
            query, maps = rms(hidden, own["norm1.weight"]), rms(features, own["norm2.weight"])
            found = [
                [mmfs(inner, query[b, t], maps[b], visibility[b, t]) for t in range(length)]
                for b in range(batch)
            ]
            hidden = hidden + own["gate"].tanh() * torch.stack([torch.stack(row) for row in found])
        hidden = hidden + layer.mlp(rms(hidden, layer.post_attention_layernorm.weight))
    return rms(hidden, model.norm.weight)


def inputs(seed: int, gaps: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(2, 7, WIDTH, generator=generator, dtype=torch.float64)
    features = torch.randn(2, 4, POSITIONS, MAPS, generator=generator, dtype=torch.float64)
    if gaps:
        return embeddings, features, (torch.rand(2, 7, 4, generator=generator) < 0.5).long()
    # Two documents in a row: the second begins at token 4 and does not see the first one's images.
    token, image = torch.arange(7)[:, None], torch.arange(4)
    start, first = torch.where(token < 4, 0, 4), torch.where(token < 4, 0, 2)
    boi = torch.tensor([0, 2, 4, 5])
    mask = (image >= first) & (boi >= start) & (boi + 1 <= token)
    return embeddings, features, mask.expand(2, -1, -1).float()


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_layers_equal_llama_with_mmfs_written_out(gaps, kv_heads):
    model, state = case(kv_heads)
    config = llama(kv_heads).to_dict() | EXTRA
    with torch.no_grad():
        wanted = reference(model, state, *inputs(3, gaps))
        found = released.language_layers(state, config)(*inputs(3, gaps))
    # Angles and the softmax of transformers' attention are computed in float32.
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    assert found.dtype == torch.float64


def test_mmfs_has_a_part_in_it_and_documents_see_each_other():
    _, state = case()
    module = released.language_layers(state, llama().to_dict() | EXTRA)
    embeddings, features, visibility = inputs(3, False)
    out = module(embeddings, features, visibility)
    assert (out - module(embeddings, features * 2 + 1, visibility)).abs()[:, 1:].amax(2).min() > 1e-4
    changed = embeddings.clone()
    changed[:, 0] += 1
    assert (out - module(changed, features, visibility)).abs().amax(2).min() > 1e-6  # over the whole row
    changed = embeddings.clone()
    changed[:, -1] += 1
    assert torch.equal(out[:, :-1], module(changed, features, visibility)[:, :-1])  # causal


def test_rows_that_see_no_image_and_rows_without_any_are_alike():
    _, state = case()
    module = released.language_layers(state, llama().to_dict() | EXTRA)
    embeddings, features, visibility = inputs(3, False)
    blind = module(embeddings, features, torch.zeros_like(visibility))
    torch.testing.assert_close(module(embeddings, features[:, :0], visibility[:, :, :0]), blind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_have_the_dtype_of_the_tensors(dtype):
    _, state = case()
    config = llama().to_dict() | EXTRA
    exact = released.language_layers(state, config)(*inputs(3, True))
    embeddings, features, visibility = inputs(3, True)
    module = released.language_layers({name: t.to(dtype) for name, t in state.items()}, config)
    out = module(embeddings.to(dtype), features.to(dtype), visibility)
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


def test_a_short_configuration_of_an_old_version_will_do():
    _, state = case()
    full = llama().to_dict() | EXTRA
    short = {key: full[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", *EXTRA)} | {
        "num_attention_heads": 4
    }
    given = inputs(3, True)
    wanted = released.language_layers(state, full)(*given)
    assert torch.equal(released.language_layers(state, short)(*given), wanted)
    frequencies = 10000.0 ** -(torch.arange(0, 12, 2).double() / 12)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies for layer in range(3)}
    tables = {"lm_head.weight": torch.zeros(11, WIDTH, dtype=torch.float64)}
    assert torch.equal(released.language_layers(buffers | state | tables, short)(*given), wanted)
    slower = {name: 2 * value for name, value in buffers.items()}
    with pytest.raises(ValueError, match="inv_freq is a constant"):
        released.language_layers(state | slower, short)


def test_a_bad_state_dict_is_refused_by_name():
    _, state = case()
    config = llama().to_dict() | EXTRA
    for name in (
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.llama_cross_attn.gate",
    ):
        with pytest.raises(ValueError, match=f"missing.*{name}"):
            released.language_layers({key: t for key, t in state.items() if key != name}, config)
    with pytest.raises(ValueError, match="left over.*llama_cross_attn.gate"):
        released.language_layers(state | {"model.layers.1.llama_cross_attn.gate": torch.ones(1)}, config)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=f"{name} has shape"):
        released.language_layers(state | {name: state[name].T}, config)
    module = released.language_layers(state, config)
    embeddings, features, visibility = inputs(3, True)
    with pytest.raises(ValueError, match=r"visibility: expected \[2, 7, 4\]"):
        module(embeddings, features, visibility[:, :5])


def test_every_function_of_the_released_checkpoint_is_in_one_place():
    for name in ("mmfs", "perceiver", "visual_tokenizer", "language_layers", "unet_mmfs"):
        assert callable(getattr(released, name))
