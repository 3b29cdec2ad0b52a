"""The optimizer: against torch's AdamW, between layouts, and in its groups."""

from __future__ import annotations

import math

import pytest
import torch


def gradients(tensor: int, mark: bool = True) -> tuple[dict[str, torch.Tensor], float, float]:
    """On a rank: whole gradients of step 1, the loss and the gradient norm."""
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(tensor, optimizer__clip=0.0), mark) as run:
        ((loss, norm),) = run.train(1)
        return run.gradients(), loss, norm


@pytest.fixture(scope="module")
def alone(ranks):
    """Gradients, loss and norm of one rank."""
    return ranks.run(1, gradients, 1)[0]


@pytest.mark.parametrize("tensor", [1, 2], ids=["data-parallel", "tensor-parallel"])
def test_two_ranks_have_the_gradients_of_one(ranks, alone, tensor):
    expected, loss, norm = alone
    results = ranks.run(2, gradients, tensor)
    for found, found_loss, found_norm in results:
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert found_norm == pytest.approx(norm, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert results[0][2] == results[1][2], "the norm must be the same number on all ranks"


def test_norm_is_that_of_all_gradients(alone):
    gradients, _, norm = alone
    assert norm == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in gradients.values())), rel=1e-6
    )


def test_unmarked_image_parts_lose_the_other_ranks_images(ranks, alone):
    expected, _, _ = alone
    found, _, _ = ranks.run(2, gradients, 2, False)[0]
    weight = expected["image_decoder.weight"]
    assert (found["image_decoder.weight"] - weight).abs().max() > 0.1 * weight.abs().max()


def against_torch() -> float:
    """On a rank: largest difference to torch's AdamW with the paper's groups after 6 steps."""
    from tests.tiny import Run, tiny_config, whole_values

    config = tiny_config(optimizer__clip=0.5)
    settings, worst = config.optimizer, 0.0
    twins = {n: torch.nn.Parameter(v.clone()) for n, v in whole_values().items() if "frozen" not in n}
    plain = torch.optim.AdamW(
        [{"params": [p], "name": n} for n, p in twins.items()],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
    with Run(config) as run:
        for step in range(6):
            warm = min(1.0, step / 2)
            cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 2) / 18))
            for group in plain.param_groups:
                name = group["name"]
                peak = 1e-3 if "offsets" in name else 2e-3 if "decoder" in name else 1e-2
                group["lr"] = peak * warm * cosine
                matrix = twins[name].dim() > 1 and "offsets" not in name
                group["weight_decay"] = settings.weight_decay if matrix else 0.0
            run.train(1)
            for name, gradient in run.gradients().items():
                twins[name].grad = gradient
            torch.nn.utils.clip_grad_norm_(twins.values(), settings.clip)
            plain.step()
            for name, value in run.parameters().items():
                if name in twins:
                    worst = max(worst, float((value - twins[name]).abs().max()))
    return worst


def test_six_clipped_steps_are_those_of_torch_adamw(ranks):
    assert ranks.run(1, against_torch)[0] < 2e-6


def groups_of(tensor: int) -> dict:
    """On a rank: each parameter's learning rate and decay at the peak, and what is frozen."""
    from tests.tiny import Run, tiny_config

    with Run(tiny_config(tensor, optimizer__schedule="constant")) as run:
        before = run.parameters()
        run.train(3)
        module = run.model.module
        buffered = {p for b in run.model.buffers + run.model.expert_parallel_buffers for p in b.params}
        rates = {}
        for part in run.optimizer.chained_optimizers:
            for parameter, (group, _) in part.model_param_group_index_map.items():
                settings = part.optimizer.param_groups[group]
                name = next(n for n, p in module.named_parameters() if p is parameter)
                rates[name] = (settings["lr"], settings["weight_decay"])
        after = run.parameters()
        return {
            "rates": rates,
            "buffered": {n for n, p in module.named_parameters() if p in buffered},
            "moved": {n for n in before if not torch.equal(before[n], after[n])},
        }


def test_groups_of_the_paper_and_frozen_parts(ranks):
    both = ranks.run(2, groups_of, 2)
    rates = both[0]["rates"] | both[1]["rates"]
    decay = 0.05
    assert rates == {
        "vision.proj.weight": (1e-2, decay),
        "vision.proj.bias": (1e-2, 0),
        "vision.offsets.weight": (1e-3, 0),
        "vision.offsets.bias": (1e-3, 0),
        "vision.gate": (1e-2, 0),
        "norm.weight": (1e-2, 0),
        "up.weight": (1e-2, decay),
        "up.bias": (1e-2, 0),
        "down.weight": (1e-2, decay),
        "down.bias": (1e-2, 0),
        "image_decoder.weight": (2e-3, decay),
        "image_decoder.bias": (2e-3, 0),
    }
    for found in both:
        assert found["buffered"] == found["moved"] == rates.keys()


def rule(name: str) -> tuple[float, bool]:
    """On a rank: learning rate and decay of a matrix of this name."""
    from mmi_megatron.config import Config
    from mmi_megatron.train.optimizer import decays, learning_rate

    return learning_rate(name, Config()), decays(name, torch.nn.Parameter(torch.zeros(2, 2)))


def test_offsets_are_known_by_name_wherever_they_are(ranks):
    sharded = "module.language_model.decoder.layers.0.cross_attention.offsets_weight"
    for name in (sharded, "module.visual_tokenizer.adapter.injectors.0.offsets.weight"):
        assert ranks.run(1, rule, name)[0] == (1e-5, False)
    assert ranks.run(1, rule, "module.image_decoder.unet.conv_in.weight")[0] == (1e-5, True)


def skipping() -> list:
    """On a rank: a step whose gradient holds a NaN on one rank, then a good one."""
    from mmi_megatron.train.optimizer import finish
    from tests.tiny import Run, tiny_config

    with Run(tiny_config()) as run:
        run.train(2)
        before = run.parameters()
        run.backward()
        if run.layout.rank == 1:
            run.model.module.up.weight.main_grad[0, 0] = float("nan")
        norm, skipped = finish(run.model, run.optimizer)
        kept = all(torch.equal(before[n], v) for n, v in run.parameters().items())
        return [norm, skipped, kept, run.train(1)[0][1]]


def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(ranks):
    for norm, skipped, kept, later in ranks.run(2, skipping):
        assert math.isnan(norm) and skipped and kept and math.isfinite(later)


def half_precision() -> tuple[set, set, bool, bool]:
    """On a rank: dtypes in bf16 training, and whether steps below bf16's resolution add up."""
    from mmi_megatron.train.optimizer import parts
    from tests.tiny import Run, tiny_config

    config = tiny_config(train__precision="bf16", optimizer__warmup_steps=0, optimizer__lr=1e-5)
    with Run(config) as run:
        before = run.parameters()["up.weight"]
        mains = [part.optimizer.param_groups[0]["params"] for part in parts(run.optimizer)]
        start = [p.clone() for group in mains for p in group]
        run.train(3)
        weights = {p.dtype for p in run.model.module.parameters()}
        grads = {p.main_grad.dtype for p in run.model.module.parameters() if p.requires_grad}
        states = {
            v.dtype
            for part in parts(run.optimizer)
            for s in part.optimizer.state.values()
            for v in s.values()
        }
        moved = all(not torch.equal(a, b) for a, b in zip(start, (p for g in mains for p in g), strict=True))
        close = float((run.parameters()["up.weight"] - before).abs().max()) < 1e-3
        return weights, grads | states, moved, close


def test_bf16_keeps_fp32_main_gradients_weights_and_states(ranks):
    weights, others, moved, close = ranks.run(1, half_precision)[0]
    assert weights == {torch.bfloat16} and others == {torch.float32} and moved and close


def refuse(room: str, name: str, value) -> str:
    """On a rank: the error a setting raises."""
    from mmi_megatron.parallel import groups
    from tests.tiny import Run, tiny_config

    try:
        with Run(tiny_config(**{f"{room}__{name}": value})):
            return "no error"
    except ValueError as error:
        return str(error)
    finally:
        groups.destroy()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (("optimizer", "warmup_steps", 20), "must be below train.steps"),
        (("optimizer", "min_lr_ratio", 2.0), "min_lr_ratio: must be within 0 and 1"),
        (("parallel", "tensor", 3), "does not divide the 1 of this run"),
        (("train", "micro_rows", 3), "train.rows: 4 is no multiple"),
    ],
)
def test_settings_that_do_not_fit_are_refused(ranks, setting, said):
    assert said in ranks.run(1, refuse, *setting)[0]


def alone_without_torchrun() -> tuple:
    """On a process that torchrun did not start: its layout, and whether the environment stayed."""
    import os

    from mmi_megatron.parallel import groups
    from tests.tiny import tiny_config

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        os.environ.pop(name, None)
    layout = groups.initialize(tiny_config())
    groups.destroy()
    return layout, [name for name in names if name in os.environ]


def test_a_process_without_torchrun_is_a_world_of_its_own(ranks):
    from mmi_megatron.parallel.groups import Layout

    layout, left = ranks.run(1, alone_without_torchrun)[0]
    assert layout == Layout(0, 1, 0, 1, 0, 1, 0, 1) and left == []
