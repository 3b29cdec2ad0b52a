"""The classic deformable-attention kernel (kernels/csrc/baseline/classic.cu), to compare with.

It is compiled when first called, by nvcc for tensors on a GPU, and called through ctypes: nothing of
it is in the package's library.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmi_kernels import build, library

SOURCE = library.SOURCES / "baseline" / "classic.cu"
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_CHANNELS = 1024  # a block's threads

SIZES = ("batch", "positions", "heads", "channels", "queries", "levels", "points")
POINTERS = ("value", "shapes", "locations", "weights", "grad_out")
RESULTS = ("out", "grad_value", "grad_locations", "grad_weights")


class Call(ctypes.Structure):
    """``ClassicCall`` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_void_p) for name in (*POINTERS, *RESULTS)),
    ]


@functools.cache
def compiled() -> ctypes.CDLL:
    """The kernels, compiled by nvcc.

    Raises:
        mmi_kernels.build.BuildError: no nvcc, or it refused the source.
    """
    tool = build.nvcc()
    if tool is None:
        raise build.BuildError("the classic kernel needs nvcc: put it on the PATH or set CUDA_HOME")
    targets = [f"-gencode=arch={virtual},code={real}" for real, virtual in library.CUDA_TARGETS.items()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "classic.so"
        build._run([tool, *library.NVCC_FLAGS, *targets, "-shared", str(SOURCE), "-o", str(out)])
        return load(out)


def load(path: Path) -> ctypes.CDLL:
    """A compiled library, its function declared."""
    found = ctypes.CDLL(str(path))
    found.mmi_classic.restype = ctypes.c_char_p
    found.mmi_classic.argtypes = [ctypes.POINTER(Call), ctypes.c_int, ctypes.c_bool, ctypes.c_void_p]
    return found


def level_table(shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """int64 [L, 3]: height, width and first position of each level."""
    sizes = [height * width for height, width in shapes]
    rows = [(*shape, sum(sizes[:level])) for level, shape in enumerate(shapes)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def forward(
    value: Tensor, levels: Tensor, locations: Tensor, weights: Tensor, kernels: ctypes.CDLL | None = None
) -> Tensor:
    """Deformable attention with given locations and weights.

    Args:
        value: [N, S, H, D], contiguous, D <= 1024.
        levels: of ``level_table``.
        locations: [N, Q, H, L, P, 2] as (x, y) in 0..1, contiguous; float64 for a float64 value, else
            float32, as are the weights.
        weights: [N, Q, H, L, P], contiguous.
        kernels: the library; None: compiled by nvcc.

    Returns:
        [N, Q, H, D] in the dtype of ``value``.
    """
    out = value.new_empty(*weights.shape[:3], value.shape[3])
    given = {"value": value, "shapes": levels, "locations": locations, "weights": weights, "out": out}
    _call(kernels, False, given)
    return out


def backward(
    grad_out: Tensor,
    value: Tensor,
    levels: Tensor,
    locations: Tensor,
    weights: Tensor,
    kernels: ctypes.CDLL | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``forward`` with respect to value, locations and weights, in the locations' dtype."""
    grads = (
        torch.zeros_like(value, dtype=weights.dtype),
        torch.empty_like(locations),
        torch.empty_like(weights),
    )
    given = {
        "value": value, "shapes": levels, "locations": locations, "weights": weights, "grad_out": grad_out,
        **dict(zip(RESULTS[1:], grads, strict=True)),
    }  # fmt: skip
    _call(kernels, True, given)
    return grads


def _call(kernels: ctypes.CDLL | None, is_backward: bool, given: dict[str, Tensor]) -> None:
    value, weights = given["value"], given["weights"]
    if value.shape[3] > MAX_CHANNELS:
        raise ValueError(
            f"value: the classic kernel takes up to {MAX_CHANNELS} channels, got {value.shape[3]}"
        )
    for name, tensor in given.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: the classic kernel takes contiguous tensors")
    batch, queries, heads, levels, points = weights.shape
    sizes = (batch, value.shape[1], heads, value.shape[3], queries, levels, points)
    call = Call(*sizes, **{name: tensor.data_ptr() for name, tensor in given.items()})
    stream = torch.cuda.current_stream(value.device).cuda_stream if value.is_cuda else None
    problem = (kernels or compiled()).mmi_classic(call, TYPES.index(value.dtype), is_backward, stream)
    if problem is not None:
        raise RuntimeError(f"classic kernel: {problem.decode()}")
