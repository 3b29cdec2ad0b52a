"""The platform layer: Megatron-Core really works on CPUs, and nothing is changed before it must be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mmi_megatron import platform

WIDTH = 8
needs_cpu = pytest.mark.skipif(platform.has_gpu(), reason="stand-ins are for machines without CUDA")


def in_fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def start(tensor: int) -> None:
    """A rank's world, through the platform layer."""
    platform.prepare_megatron()
    platform.set_threads(1)
    platform.init_process_group(60)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor)


def stop() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


# Random numbers


def draw_numbers() -> dict[str, torch.Tensor]:
    start(tensor=2)
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(7)
    tracker = get_cuda_rng_tracker()
    drawn = {"common": torch.rand(4)}
    with tracker.fork():
        drawn["own"] = torch.rand(4)
    drawn["common again"] = torch.rand(4)
    with tracker.fork():
        drawn["own again"] = torch.rand(4)
    stop()
    torch.manual_seed(7)
    drawn["unforked"] = torch.rand(8)
    return drawn


def test_tracker_separates_ranks_and_restores(ranks):
    first, second = ranks.run(2, draw_numbers)
    for name in ("common", "common again"):
        assert torch.equal(first[name], second[name])
    for name in ("own", "own again"):
        assert not torch.equal(first[name], second[name])
    assert not torch.equal(first["own"], first["own again"]), "a fork must go on where the last one stopped"
    together = torch.cat([first["common"], first["common again"]])
    assert torch.equal(together, first["unforked"]), "a fork must not advance the common numbers"


def recomputed_dropout() -> tuple[torch.Tensor, torch.Tensor, int]:
    start(tensor=2)
    import logging

    from megatron.core.tensor_parallel import (
        checkpoint,
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
    )

    model_parallel_cuda_manual_seed(7)

    def drop(x):
        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x, 0.5)

    seen: list[logging.LogRecord] = []
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    handler = logging.Handler()
    handler.emit = seen.append
    logger.addHandler(handler)
    x = torch.ones(64, requires_grad=True)
    out = checkpoint(drop, False, x)
    torch.rand(100)
    out.sum().backward()
    logger.removeHandler(handler)
    stop()
    return out.detach(), x.grad, len(seen)


def test_recomputation_draws_the_same_numbers(ranks):
    results = ranks.run(2, recomputed_dropout)
    for out, grad, warnings in results:
        assert torch.equal(out, grad)
        assert 0 < out.count_nonzero() < 64
        assert warnings == 0
    assert not torch.equal(results[0][0], results[1][0])


# Tensor parallelism


def column_parallel_linear(
    weight: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    start(tensor=2)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    layer = ColumnParallelLinear(
        WIDTH, len(weight), config=config, init_method=torch.nn.init.zeros_, bias=False, gather_output=True
    )
    with torch.no_grad():
        layer.weight.copy_(weight.chunk(2)[parallel_state.get_tensor_model_parallel_rank()])
    x = x.clone().requires_grad_()
    out, _ = layer(x)
    out.square().sum().backward()
    grads = x.grad, layer.weight.grad
    stop()
    return out.detach(), *grads


def test_column_parallel_linear_equals_the_whole_one(ranks):
    torch.manual_seed(0)
    weight, x = torch.randn(12, WIDTH), torch.randn(5, WIDTH)
    results = ranks.run(2, column_parallel_linear, weight, x)
    whole, inputs = weight.clone().requires_grad_(), x.clone().requires_grad_()
    expected = inputs @ whole.T
    expected.square().sum().backward()
    for rank, (out, grad_x, grad_weight) in enumerate(results):
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad_x, inputs.grad)
        torch.testing.assert_close(grad_weight, whole.grad.chunk(2)[rank])


# Megatron's optimizer


def optimize(bf16: bool) -> tuple[bool, float, float, str]:
    start(tensor=1)
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        bf16=bf16,
        params_dtype=dtype,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    init = torch.nn.init.ones_
    layer = ColumnParallelLinear(WIDTH, WIDTH, config=config, init_method=init, bias=False)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, layer)
    settings = OptimizerConfig(
        optimizer="adam", lr=0.1, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(settings, [model])
    model.zero_grad_buffer()
    out, _ = model(torch.ones(2, WIDTH, dtype=dtype))
    out.sum().backward()
    finalize_model_grads([model])
    fine, norm, _ = optimizer.step()
    moved = (layer.weight - 1).abs().mean().item()
    where = layer.weight.device.type
    stop()
    return bool(fine), float(norm), moved, where


@needs_cpu
@pytest.mark.parametrize("bf16", [False, True])
def test_distributed_optimizer_steps(ranks, bf16):
    """Its assertions on the tensors' type pass, and one Adam step moves each weight by the rate."""
    for fine, norm, moved, where in ranks.run(2, optimize, bf16):
        assert fine
        assert norm == pytest.approx(2 * WIDTH, rel=1e-2)
        assert moved == pytest.approx(0.1, rel=2e-2)
        assert where == "cpu"


# What is changed, and when


def stand_ins() -> dict[str, bool]:
    platform.prepare_megatron()
    before = torch.zeros, torch.Tensor.to
    platform.prepare_megatron()
    after = torch.zeros, torch.Tensor.to
    with torch.device("meta"):
        meta = torch.zeros(1)
    x = torch.zeros(2, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
        torch.cuda.Event(enable_timing=True).record()
    return {
        "once": before == after,
        "a device context is heeded": meta.is_meta and not torch.zeros(1).is_meta,
        "made on the CPU": x.device.type == "cpu",
        "moved to the CPU": x.to("cuda:0").to(torch.device("cuda")).cuda().device.type == "cpu",
        "other devices stay": torch.zeros(1, device="meta").to("meta").is_meta,
        "type": x.type() == "torch.cuda.BFloat16Tensor" and x.float().type() == "torch.cuda.FloatTensor",
        "conversion": x.type("torch.cuda.FloatTensor").dtype == x.type(torch.float32).dtype == torch.float32,
        "still no GPU": not platform.has_gpu(),
    }


@needs_cpu
def test_stand_ins(ranks):
    wrong = [name for name, fine in ranks.run(1, stand_ins)[0].items() if not fine]
    assert not wrong


def test_stand_ins_refuse_a_machine_with_cuda(monkeypatch):
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(platform, "_megatron_on_cpu", False)
    with pytest.raises(RuntimeError, match="CUDA is present"):
        platform._put_megatron_on_cpu()
    platform.prepare_megatron()
    assert not platform._megatron_on_cpu


def test_importing_the_package_is_cheap():
    code = "import sys, mmi_megatron\nassert not {'torch', 'megatron', 'torchvision'} & set(sys.modules)"
    done = in_fresh_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["", "import torch"])
def test_torchvision_beside_this_torch(first):
    code = f"{first}\nimport mmi_megatron, torchvision\nfrom torchvision.transforms.functional import resize"
    done = in_fresh_python(code)
    assert done.returncode == 0, done.stderr


# Small things


def test_device_and_backend_go_together():
    expected = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    assert (platform.device().type, platform.backend()) == expected


def test_parameter_dtype():
    assert platform.parameter_dtype("bf16") is torch.bfloat16
    assert platform.parameter_dtype("fp32") is torch.float32
    with pytest.raises(ValueError, match="train.precision: must be one of fp32, bf16, got 'fp8'"):
        platform.parameter_dtype("fp8")


def test_random_states_come_back():
    states = platform.random_states()
    drawn = torch.rand(3)
    platform.set_random_states(states)
    assert torch.equal(torch.rand(3), drawn)


def test_threads_divide_the_cores_among_the_ranks(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(platform, "usable_cores", lambda: 6)
    try:
        assert platform.set_threads(local_ranks=2) == 3 == torch.get_num_threads()
        assert platform.set_threads(local_ranks=64) == 1
        assert platform.set_threads(2, local_ranks=64) == 2 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    monkeypatch.undo()
    assert 1 <= platform.usable_cores() <= (os.cpu_count() or 1)
