"""Our modules behind the release's names: against tensors recorded from the release itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmi_megatron.convert import released
from mmi_megatron.convert.rules import Table, load, save
from tests.test_mmfs import literal

DATA = Path(__file__).parent / "data"
MMFS_CASES = ("A", "B", "D")


def recorded(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """State dict, other tensors and configuration of a recording."""
    tensors = load_file(DATA / f"{name}.safetensors")
    state = {
        key.removeprefix("state_dict."): t for key, t in tensors.items() if key.startswith("state_dict.")
    }
    other = {key: tensor for key, tensor in tensors.items() if not key.startswith("state_dict.")}
    return state, other, json.loads((DATA / f"{name}.json").read_text())


def mmfs_state(name: str) -> tuple[released.ReleasedMMFS, dict[str, Tensor], Table]:
    state, other, config = recorded(f"mmfs_{name}")
    table = released.mmfs_table(config["n_heads"], config["n_levels"], config["n_points"])
    return released.mmfs(state, config), other, table


@pytest.mark.parametrize("name", MMFS_CASES)
def test_mmfs_and_all_its_gradients(name):
    module, other, table = mmfs_state(name)
    query = other["inputs.query"].requires_grad_()
    features = other["inputs.input_flatten"].requires_grad_()
    out = module(query, other["inputs.reference_points"], features, other["inputs.attention_mask"])
    torch.testing.assert_close(out, other["output"], rtol=0, atol=1e-10)
    out.backward(other["grad_output"])
    torch.testing.assert_close(query.grad, other["grads.query"], rtol=0, atol=1e-10)
    torch.testing.assert_close(features.grad, other["grads.input_flatten"], rtol=0, atol=1e-10)
    ours = {key: parameter.grad for key, parameter in module.core.named_parameters()}
    for key, gradient in save(ours, table).items():
        torch.testing.assert_close(gradient, other[f"grads.{key}"], rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("seed", range(4))
def test_mmfs_with_gaps_in_what_is_seen(seed):
    """Only the images seen count for how far back one is; against the definition written out."""
    module, other, _ = mmfs_state("B")
    generator = torch.Generator().manual_seed(seed)
    query, points = other["inputs.query"], other["inputs.reference_points"]
    features = torch.cat([other["inputs.input_flatten"], other["inputs.input_flatten"].flip(1) * 0.7], 1)
    features.requires_grad_()
    mask = torch.rand(2, 9, 6, generator=generator) < 0.5
    found = module(query, points, features, mask.long())
    wanted = torch.stack(
        [literal(module.core, query[n], features[n], points[0, :, 0], mask[n]) for n in range(2)]
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(out.square().sum(), features)[0] for out in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)


def test_mmfs_takes_the_last_rows_of_a_longer_visibility():
    module, other, _ = mmfs_state("B")
    query, features = other["inputs.query"], other["inputs.input_flatten"]
    out = module(
        query[:, -2:], other["inputs.reference_points"][:, -2:], features, other["inputs.attention_mask"]
    )
    torch.testing.assert_close(out, other["output"][:, -2:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_cached_decoding_with_gaps_and_a_visibility_of_any_type(kind):
    module, other, _ = mmfs_state("B")
    query, points = other["inputs.query"], other["inputs.reference_points"]
    mask = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    wanted = module(query, points, other["inputs.input_flatten"], mask.long())
    for first in (0, 4, 8):
        found = module(query[:, first:], points[:, first:], other["inputs.input_flatten"], mask.to(kind))
        torch.testing.assert_close(found, wanted[:, first:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mmfs_runs_in_the_dtype_of_its_tensors(dtype):
    state, other, config = recorded("mmfs_B")
    module = released.mmfs({name: tensor.to(dtype) for name, tensor in state.items()}, config)
    names = ("query", "reference_points", "input_flatten", "attention_mask")
    query, points, features, mask = (other[f"inputs.{name}"].to(dtype) for name in names)
    out = module(query, points, features, mask)
    error = (out.double() - other["output"]).abs().max()
    assert out.dtype == dtype and error < {torch.float32: 1e-6}.get(dtype, 0.03)
    nothing = module(query, points, features[:, :0], mask[..., :0])
    torch.testing.assert_close(nothing, module(query, points, features, torch.zeros_like(mask)))


def test_mmfs_takes_one_visibility_for_all_queries_and_a_point_for_each_row():
    module, other, _ = mmfs_state("D")
    inputs = [
        other[f"inputs.{key}"] for key in ("query", "reference_points", "input_flatten", "attention_mask")
    ]
    query, points, features, mask = inputs
    gap = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    features = torch.cat([features, features[:, :1] * 0.3], 1)
    found = module(query, points.expand(3, -1, -1, -1), features, gap)
    torch.testing.assert_close(found, module(query, points, features, gap[:, None].expand(-1, 64, -1)))
    picked = module(query[:1], points, features[:1, [0, 2]], torch.ones(1, 2))
    torch.testing.assert_close(found[:1], picked)
    with pytest.raises(ValueError, match="visibility"):
        module(query, points, features, mask)


def test_intervals_leave_neighbours_in_place_and_gather_around_gaps():
    order, visible = released.intervals(torch.tensor([[[0, 0, 0], [1, 1, 0]], [[0, 1, 1], [1, 1, 1]]]))
    assert order is None
    assert visible.tolist() == [[0, 0], [0, 2], [4, 6], [3, 6]]
    order, visible = released.intervals(torch.tensor([[[1, 0, 1], [0, 0, 0]], [[1, 0, 1], [1, 0, 1]]]))
    seen = [order[first:last].tolist() for first, last in visible.tolist()]
    assert seen == [[0, 2], [], [3, 5], [3, 5]]
    assert len(order) == 4
    order, visible = released.intervals(torch.zeros(2, 3, 0))
    assert order is None and visible.tolist() == [[0, 0]] * 6


def test_perceiver():
    state, other, config = recorded("perceiver")
    module = released.perceiver(state, config)
    with torch.no_grad():
        assert (module(other["x"]) - other["out_nomask"]).abs().max() < 1e-5
        assert (module(other["x"], other["mask"]) - other["out_mask"]).abs().max() < 1e-5
    assert (other["out_mask"] - other["out_nomask"]).abs().max() > 1e-2


def test_visual_tokenizer():
    state, other, config = recorded("tokenizer")
    module = released.visual_tokenizer(state, config["clip"], config["perceiver"])
    with torch.no_grad():
        tokens, maps = module(other["image"])
    pairs = [(tokens, other["tokens"]), *((maps[level], other[f"maps.{level}"]) for level in range(4))]
    for found, wanted in pairs:
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def cases() -> list[tuple[str, object]]:
    """Every builder with its state dict, configuration and table."""
    made = []
    for name in ("mmfs_B", "perceiver", "tokenizer"):
        state, _, config = recorded(name)
        if name == "mmfs_B":
            table = released.mmfs_table(config["n_heads"], config["n_levels"], config["n_points"])
            made.append((name, (released.mmfs, state, (config,), lambda _, table=table: table)))
        elif name == "perceiver":
            table = released.perceiver_table(released.resampler_config(config))
            made.append((name, (released.perceiver, state, (config,), lambda _, table=table: table)))
        else:
            arguments = (config["clip"], config["perceiver"])
            made.append((name, (released.visual_tokenizer, state, arguments, released.tokenizer_table)))
    return made


CASES = [pytest.param(*case, id=name) for name, case in cases()]


@pytest.mark.parametrize(("builder", "state", "config", "table"), CASES)
def test_what_is_loaded_is_what_is_saved(builder, state, config, table):
    """Every tensor comes back equal; but for dead logit rows (zero) and recomputed constants."""
    module = builder(state, *config)
    names = table(module.core)
    saved = save(module.core.state_dict(), names)
    assert saved.keys() == state.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == state[name].dtype, name
        if name in names.constants:
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6)
        elif name.startswith("attention_weights"):
            alive = tensor != 0
            assert torch.equal(tensor[alive], state[name][alive])
            assert alive.sum() * 5 == tensor.numel() * 4  # 4 points and a dead slot
        else:
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_modules_have_the_dtype_of_the_tensors(dtype):
    state, other, config = recorded("perceiver")
    module = released.perceiver({name: tensor.to(dtype) for name, tensor in state.items()}, config)
    assert module(other["x"].to(dtype)).dtype == dtype


@pytest.mark.parametrize(("builder", "state", "config", "table"), CASES)
def test_a_bad_state_dict_is_refused_by_name(builder, state, config, table):
    constants = table(builder(state, *config).core).constants
    matrices = [name for name in state if state[name].ndim == 2 and name not in constants]
    matrix = next(name for name in matrices if state[name].shape[0] != state[name].shape[1])
    with pytest.raises(ValueError, match=f"missing.*{matrix}"):
        builder({name: tensor for name, tensor in state.items() if name != matrix}, *config)
    with pytest.raises(ValueError, match="left over.*surplus.weight"):
        builder(state | {"surplus.weight": torch.zeros(2)}, *config)
    with pytest.raises(ValueError, match=f"{matrix} has shape"):
        builder(state | {matrix: state[matrix].T}, *config)


def test_an_empty_state_dict_is_refused_by_name():
    _, _, config = recorded("mmfs_B")
    with pytest.raises(ValueError, match="released MMFS: missing .*query_relpos.weight"):
        released.mmfs({}, config)


def test_constants_may_be_absent_but_not_different():
    state, _, config = recorded("tokenizer")
    arguments = (config["clip"], config["perceiver"])
    constants = ("pos_embed", "clip_mean", "clip_std", "encoder.vision_model.embeddings.position_ids")
    released.visual_tokenizer({k: v for k, v in state.items() if k not in constants}, *arguments)
    for name in constants:
        with pytest.raises(ValueError, match=f"{name} is a constant"):
            released.visual_tokenizer(state | {name: state[name] + 1}, *arguments)


def test_a_refused_state_dict_changes_nothing():
    state, _, config = recorded("perceiver")
    module = released.perceiver(state, config).core
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    bad = {name: tensor + 1 for name, tensor in state.items()} | {"queries": torch.zeros(3)}
    with pytest.raises(ValueError, match="queries has shape"):
        load(module, bad, released.perceiver_table(module.config), "resampler")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
