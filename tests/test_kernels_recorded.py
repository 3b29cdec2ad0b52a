"""The fused operator against tensors recorded from the released model's MMFS module, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.test_kernels_oracle import implementation, implementations, oracle_mmfs

DATA = Path(__file__).parent / "data"


def intervals(mask: Tensor, images: int) -> Tensor:
    """Half-open intervals [G, 2] over all rows' images from a visibility mask [N, (Lq,) M]."""
    by_group = mask.reshape(len(mask), -1, images).bool()
    first = by_group.int().argmax(-1)
    count = by_group.sum(-1)
    spans = torch.arange(images) - first[..., None]
    assert torch.equal(by_group, (spans >= 0) & (spans < count[..., None])), "visibility has gaps"
    offset = (torch.arange(len(mask)) * images)[:, None]
    return torch.stack([first + offset, first + count + offset], -1).flatten(0, 1).int()


def run_module(function, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients of the module built around ``function``, and the recorded ones."""
    recorded = load_file(DATA / f"mmfs_{name}.safetensors")
    config = json.loads((DATA / f"mmfs_{name}.json").read_text())
    weights = {k.removeprefix("state_dict."): v for k, v in recorded.items() if k.startswith("state_dict.")}
    weights = {k: v.requires_grad_() for k, v in weights.items()}
    query = recorded["inputs.query"].requires_grad_()
    features = recorded["inputs.input_flatten"].requires_grad_()

    heads, points, levels = config["n_heads"], config["n_points"], config["n_levels"]
    batch, length, _ = query.shape
    images = features.shape[1]

    def linear(x: Tensor, name: str, bias: bool = True) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"] if bias else None)

    def project(x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
        offsets = linear(x, "sampling_offsets", bias).view(-1, heads, points, 2)
        logits = linear(x, "attention_weights", bias).view(-1, heads, levels, points + 1)
        return offsets, logits[..., :points]

    value = linear(features, "value_proj").flatten(0, 1).unflatten(-1, (heads, -1))
    queried = linear(query, "dynamic_offset_mask").flatten(0, 1)
    out = function(
        value,
        tuple((s, s) for s in config["spatial_shapes"]),
        *project(queried, True),
        *project(weights["query_relpos.weight"], False),
        recorded["inputs.reference_points"][0, :, 0].repeat(batch, 1),
        intervals(recorded["inputs.attention_mask"], images),
        base=config["base_spatial_shape"],
        sink_value=weights["ignore_token"].view(heads, -1),
    )
    output = linear(out.flatten(1).view(batch, length, -1), "output_proj")
    output.backward(recorded["grad_output"])
    found = {"output": output.detach(), "query": query.grad, "input_flatten": features.grad}
    found.update({k: v.grad for k, v in weights.items()})
    expected = {k.removeprefix("grads."): v for k, v in recorded.items() if k.startswith("grads.")}
    return found, {"output": recorded["output"], **expected}


@pytest.mark.parametrize("name", ["A", "B", "D"])
@pytest.mark.parametrize("kind", ["oracle", *implementations()])
def test_the_released_module_is_reproduced(kind, name):
    if kind == "oracle":
        found, expected = run_module(oracle_mmfs, name)
    else:
        with implementation(kind) as (mmfs, _):
            found, expected = run_module(mmfs, name)
    assert set(found) == set(expected)
    for key, want in expected.items():
        error = float((found[key] - want).abs().max())
        assert error < 1e-10, f"{key}: {error:.2e}"
