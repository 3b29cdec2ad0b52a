"""Which device we are on: CUDA with NCCL, or else CPUs with gloo.

The only file that knows that CUDA may be absent. Megatron-Core is written for CUDA; on a CPU
``prepare_megatron`` lets stand-ins answer in its place. They change what ``torch.cuda`` means for
the whole process, so they refuse to load where CUDA is present.

Two things are set up, both idempotent:

* ``prepare()``, by importing ``mmi_megatron``: torchvision can be imported beside a CPU build of
  torch. Costs nothing, imports nothing.
* ``prepare_megatron()``, by importing ``mmi_megatron.parallel``: Megatron-Core runs on this device.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.abc
import importlib.util
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

PRECISIONS = ("fp32", "bf16")

MEGATRON_CHATTER = (
    "Transformer Engine and Apex are not installed",  # the table of `mmi doctor` says so, once
    "full scope is deprecated",  # a default of its own
    r"`torch\.distributed\..*` is deprecated",  # its calls of torch
)
"""Warnings of Megatron that no user can do anything about, every rank would print them."""


# The device


def has_gpu() -> bool:
    """Whether a CUDA device can be used by this process."""
    import torch

    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def device_name() -> str:
    """The device in words, for tables and logs."""
    import torch

    if not has_gpu():
        return f"CPU, {usable_cores()} cores"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def backend() -> str:
    """The communication library of this device: ``nccl`` or ``gloo``."""
    return "nccl" if has_gpu() else "gloo"


def torch_build() -> str:
    """What this build of torch can run on: ``CUDA 13.0`` or ``CPU only``."""
    import torch

    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def default_ranks() -> int:
    """Ranks a machine carries when a layout leaves it open: one a GPU, or one."""
    import torch

    return torch.cuda.device_count() if has_gpu() else 1


def parameter_dtype(precision: str) -> torch.dtype:
    """Dtype of the parameters at ``train.precision``.

    Raises:
        ValueError: for a precision other than ``fp32`` and ``bf16``.
    """
    import torch

    if precision not in PRECISIONS:
        raise ValueError(f"train.precision: must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def usable_cores() -> int:
    """CPU cores this process may run on, which a batch system can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int = 0, local_ranks: int = 1) -> int:
    """Set torch's threads in this process.

    Args:
        threads: how many; 0 divides the usable cores among the ranks of this machine.
        local_ranks: ranks on this machine.

    Returns:
        The number set.
    """
    import torch

    chosen = threads or max(1, usable_cores() // local_ranks)
    torch.set_num_threads(chosen)
    return chosen


def random_states() -> dict[str, torch.Tensor]:
    """States of torch's generators: ``cpu``, and ``gpu`` where there is one."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    return states | {"gpu": torch.cuda.get_rng_state()} if has_gpu() else states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Set what ``random_states`` returned; on a CPU the GPU's state is left aside."""
    import torch

    torch.set_rng_state(states["cpu"])
    if has_gpu() and "gpu" in states:
        torch.cuda.set_rng_state(states["gpu"])


def synchronize() -> None:
    """Wait for everything that the device of this process has been given to do."""
    import torch

    if has_gpu():
        torch.cuda.synchronize()


class Upload:
    """Arrays of bytes on their way to the device, on a stream beside the one that computes.

    Args:
        arrays: uint8 NumPy arrays. On a CPU the tensors share their memory, if it may be written to.
    """

    _stream: Any = None

    def __init__(self, arrays: list[np.ndarray]):
        import torch

        self._event = None
        if not has_gpu():
            self._tensors = [torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays]
            return
        Upload._stream = Upload._stream or torch.cuda.Stream()
        with torch.cuda.stream(Upload._stream):
            pinned = [torch.empty(a.shape, dtype=torch.uint8, pin_memory=True) for a in arrays]
            for tensor, array in zip(pinned, arrays, strict=True):
                tensor.numpy()[...] = array
            self._tensors = [tensor.to(device(), non_blocking=True) for tensor in pinned]
            self._event = Upload._stream.record_event()

    def tensors(self) -> list[torch.Tensor]:
        """The tensors on the device; what is computed from here on waits for them."""
        import torch

        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
            for tensor in self._tensors:
                tensor.record_stream(torch.cuda.current_stream())
        return self._tensors


def memory_in_use() -> tuple[int, int]:
    """Bytes of this process' tensors on its GPU, and the most since ``reset_peak_memory``. On a CPU both
    are the memory of the whole process."""
    import psutil
    import torch

    if has_gpu():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    resident = psutil.Process().memory_info().rss
    return resident, resident


def reset_peak_memory() -> None:
    """Count the most memory in use from here on."""
    import torch

    if has_gpu():
        torch.cuda.reset_peak_memory_stats()


OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What plain RuntimeErrors say when memory ran out: torch's allocator for CPUs, and CUDA's libraries."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that memory ran out, of a GPU or of the machine."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def memory_report() -> dict[str, float]:
    """What is known about memory, in bytes: of the GPU by torch's allocator, of this process, of the
    machine."""
    import psutil
    import torch

    machine = psutil.virtual_memory()
    report = {
        "process_resident": psutil.Process().memory_info().rss,
        "machine_total": machine.total,
        "machine_available": machine.available,
    }
    if has_gpu():
        stats, (free, total) = torch.cuda.memory_stats(), torch.cuda.mem_get_info()
        for name in ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes"):
            report |= {f"gpu_{name}_{when}": stats[f"{name}.all.{when}"] for when in ("current", "peak")}
        report |= {"gpu_free": free, "gpu_total": total}
        report |= {f"gpu_{name}": stats[name] for name in ("num_alloc_retries", "num_ooms")}
    return report


PEAK_FLOPS = {
    "H200": 989.4e12,  # NVIDIA H200 data sheet: BF16 tensor core 1,979 TFLOP/s with sparsity, half dense
    "H100 PCIe": 756e12,  # NVIDIA H100 data sheet (2023), PCIe column: 1,513 with sparsity
    "H100 NVL": 835.5e12,  # the same, NVL column a GPU: 1,671 with sparsity
    "H100": 989.4e12,  # the same, SXM column: 1,979 with sparsity
    "A100": 312e12,  # NVIDIA A100 data sheet: BF16 tensor core, dense
    "L40S": 362.05e12,  # NVIDIA L40S data sheet: BF16 tensor core, dense
}
"""Dense bf16 operations a second of a GPU, by a part of its name; the first that fits."""


def peak_flops() -> tuple[float, str] | None:
    """The denominator of model FLOPs utilisation: dense bf16 operations a second of this process'
    device, and its name; None where no table has it (CPUs, other GPUs)."""
    import torch

    if not has_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next(((peak, name) for part, peak in PEAK_FLOPS.items() if part in name), None)


def init_process_group(timeout: int) -> None:
    """Join the world described by torchrun's environment variables.

    Args:
        timeout: seconds after which a collective that waits for a lost rank fails.
    """
    import torch
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=timeout)
    if has_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl", timeout=limit, device_id=device())
        return
    # gloo looks up this machine's name; where that leads nowhere, ranks of one machine still meet.
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    dist.init_process_group("gloo", timeout=limit)


# torchvision beside a CPU build of torch


class _TorchvisionCure(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators just before torchvision is imported for the first time."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare_torchvision_operators()


_torchvision_library: Any = None


def _declare_torchvision_operators() -> None:
    """Declare ``nms`` where torchvision's extension cannot: its wheel is built for a CUDA torch, and
    beside a CPU one the import of timm, transformers and torchmetrics fails for want of a schema.
    Nothing here calls the operator."""
    global _torchvision_library
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or torch.version.cuda or torch.version.hip:
        return
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        with contextlib.suppress(OSError):  # the very thing that is asked: can it be loaded?
            torch.ops.load_library(str(extension))
            return
    _torchvision_library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _torchvision_library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def prepare() -> None:
    """Let torchvision be imported beside a CPU build of torch, whenever that happens, and Megatron
    without its idle warnings."""
    for message in MEGATRON_CHATTER:
        warnings.filterwarnings("ignore", message=message)
    waiting = any(isinstance(finder, _TorchvisionCure) for finder in sys.meta_path)
    if not waiting and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _TorchvisionCure())


# Megatron-Core on a CPU

_megatron_on_cpu = False


def prepare_megatron() -> None:
    """Make Megatron-Core run on this device. Call it before anything of Megatron is used."""
    if not has_gpu() and not _megatron_on_cpu:
        _put_megatron_on_cpu()


def _put_megatron_on_cpu() -> None:
    """Load the stand-ins for CUDA.

    Raises:
        RuntimeError: where CUDA is present.
    """
    global _megatron_on_cpu
    import torch

    if has_gpu():
        raise RuntimeError("CUDA is present: Megatron-Core must run on it and not on stand-ins")
    # First: it imports Megatron, whose compiler front end reads torch.cuda's functions by identity.
    _stand_in_for_cuda_random_numbers(torch)
    _stand_in_for_cuda(torch)
    _stand_in_for_cuda_tensors(torch)
    _megatron_on_cpu = True


class _Nothing:
    """A CUDA stream or event where all work is done when a call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _do_nothing

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _do_nothing(*_: Any, **__: Any) -> None:
    """There is nothing to wait for and nothing to free."""


def _stand_in_for_cuda(torch: Any) -> None:
    """Streams, events and the current device."""
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    # A function of its own for each name: torch's compiler refuses one object under several.
    for name in ("synchronize", "empty_cache", "set_device", "set_stream"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_, **__: None)
    cuda.Stream = cuda.Event = cuda.stream = _Nothing
    cuda.current_stream = cuda.default_stream = _Nothing


def _stand_in_for_cuda_random_numbers(torch: Any) -> None:
    """The CPU's generator in place of the GPU's, so that Megatron's tracker really separates the
    tensor-parallel ranks' random numbers and brings back the common ones."""
    from megatron.core.tensor_parallel import random

    generator = torch.default_generator

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        if graph_safe:
            raise RuntimeError("CUDA graphs need CUDA")
        return generator.get_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        if graph_safe:
            raise RuntimeError("CUDA graphs need CUDA")
        generator.set_state(new_state)

    torch.cuda.manual_seed = generator.manual_seed
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = get_state, set_state
    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state

    # With one generator for both, the tracker finds "the CPU's" changed whenever it is used.
    expected = "CPU RNG state changed within GPU RNG context"
    logging.getLogger(random.__name__).addFilter(lambda record: record.getMessage() != expected)


_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "eye",
    "linspace",
    "rand",
    "randn",
)


def _stand_in_for_cuda_tensors(torch: Any) -> None:
    """Tensors asked for on CUDA are made on the CPU, and report the type that Megatron's
    optimizers insist on."""

    def on_cpu(where: Any) -> Any:
        named = where.type if isinstance(where, torch.device) else where
        return "cpu" if isinstance(named, str) and named.split(":")[0] == "cuda" else where

    def put_on_cpu(make: Callable) -> Callable:
        @wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            return make(*args, **kwargs)

        return made

    # `with torch.device(...)` knows the functions by identity; it must have seen the plain ones.
    torch.utils._device._device_constructors()
    # Only what makes tensors: a mode that sees every call of torch takes a fifth of a small model's step.
    for name in _FACTORIES:
        setattr(torch, name, put_on_cpu(getattr(torch, name)))
        if hasattr(torch, f"{name}_like"):
            setattr(torch, f"{name}_like", put_on_cpu(getattr(torch, f"{name}_like")))
        if hasattr(torch.Tensor, f"new_{name}"):
            setattr(torch.Tensor, f"new_{name}", put_on_cpu(getattr(torch.Tensor, f"new_{name}")))
    plain_to = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return plain_to(tensor, *(on_cpu(arg) for arg in args), **kwargs)

    torch.Tensor.to = to
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor

    plain_type = torch.Tensor.type

    def cuda_type(tensor: torch.Tensor, dtype: Any = None, *rest: Any, **options: Any) -> Any:
        if dtype is None:
            return f"torch.cuda.{plain_type(tensor).removeprefix('torch.')}"
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return plain_type(tensor, dtype, *rest, **options)

    torch.Tensor.type = cuda_type
