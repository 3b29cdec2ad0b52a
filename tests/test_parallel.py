"""The sharded model against the plain one: gradients of every parameter, then a run of 20 steps.

Everything starts from random gates, gammas, zero convolutions, offsets and tables, so that no path
hides behind a zero.
"""

from __future__ import annotations

import pytest
import torch

from tests.matrix import assert_same_gradients, load_random, plain_model
from tests.samples import SPECIAL, random_batch, small_config

SEED = 7


def sharded_model(config):
    """This rank's sharded model with the same random weights."""
    from mmi_megatron.parallel.model import build_model

    model = build_model(config, SPECIAL)
    load_random([model], plain_model(config, SPECIAL))
    return model


def loss_of(losses, config):
    weights = config.model.loss
    return weights.next_token * losses.tokens.mean() + weights.next_image * losses.images.mean() + losses.zero


def plain_gradients(frozen: bool):
    """Loss and gradients of the plain model, by plain name."""
    from mmi_megatron.model.mm_interleaved import prepare

    config = small_config(frozen=frozen)
    model = plain_model(config, SPECIAL)
    losses = model(prepare(random_batch(SEED), SPECIAL, config.model, torch.device("cpu")), SEED, 3)
    loss_of(losses, config).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return losses.tokens.detach(), losses.images.detach(), grads


def sharded_gradients(tensor: int, frozen: bool, shard_images: bool, drop_maps: bool):
    """The same on one rank of a tensor-parallel group; gathered to plain names."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from mmi_megatron.model.mm_interleaved import prepare
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.plain import gather_plain

    config = small_config(tensor, frozen)
    config.parallel.shard_images = shard_images
    groups.initialize(config)
    try:
        model = sharded_model(config)
        if drop_maps:
            model.image_ranks.own_part = lambda maps: maps.detach()
        losses = model(prepare(random_batch(SEED), SPECIAL, config.model, torch.device("cpu")), SEED, 3)
        loss_of(losses, config).backward()
        grads = {
            f"language_model.{n}": g for n, g in gather_plain(model.language_model, lambda p: p.grad).items()
        }
        group = parallel_state.get_tensor_model_parallel_group()
        for name, parameter in model.named_parameters():
            if name.startswith("language_model.") or not parameter.requires_grad:
                continue
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if shard_images:
                dist.all_reduce(grad, group=group)
            grads[name] = grad
        return losses.tokens.detach(), losses.images.detach(), grads
    finally:
        groups.destroy()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tensor, shard_images", [(1, True), (2, True), (2, False)])
def test_first_step_gradients_equal_the_plain_model(ranks, tensor, shard_images, frozen):
    tokens, images, want = plain_gradients(frozen)
    for got in ranks.run(tensor, sharded_gradients, tensor, frozen, shard_images, False):
        torch.testing.assert_close(got[0], tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[1], images, atol=1e-5, rtol=1e-5)
        assert_same_gradients(got[2], want)


def refusal(room: str, name: str, value: int) -> tuple[str, bool]:
    """On a rank: why a layout is refused, and whether a process group had been started."""
    import torch.distributed as dist

    from mmi_megatron.errors import ConfigError
    from mmi_megatron.parallel import groups

    config = small_config()
    setattr(getattr(config, room), name, value)
    try:
        groups.initialize(config)
    except ConfigError as error:
        return str(error), dist.is_initialized()
    groups.destroy()
    return "accepted", True


@pytest.mark.parametrize(
    ("room", "name", "value"),
    [
        ("parallel", "tensor", 3),
        ("parallel", "context", 3),
        ("parallel", "optimizer_copies", 3),
        ("train", "rows", 3),
        ("train", "micro_rows", 3),
    ],
)
def test_what_does_not_fit_the_world_is_refused_before_any_group_starts(ranks, room, name, value):
    for said, started in ranks.run(2, refusal, room, name, value):
        assert said.startswith(("parallel.", "train.rows")) and f"{value}" in said and not started


def test_a_dropped_gradient_of_the_maps_is_seen(ranks):
    _, _, want = plain_gradients(False)
    for got in ranks.run(2, sharded_gradients, 2, False, True, True):
        with pytest.raises(AssertionError, match="of its largest entry"):
            assert_same_gradients(got[2], want)


def twenty_steps(tensor: int):
    """Losses, gradient norms and the last weights of a short run with Megatron's optimizer."""
    from mmi_megatron.model.mm_interleaved import prepare
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.plain import gather_plain
    from mmi_megatron.train.optimizer import build_optimizer, finish, gather_parameters, wrap

    config = small_config(tensor)
    groups.initialize(config)
    try:
        model = sharded_model(config)
        ddp = wrap(model, config)
        optimizer, scheduler = build_optimizer(ddp, config)
        record = []
        for step in range(20):
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            inputs = prepare(random_batch(step), SPECIAL, config.model, torch.device("cpu"))
            losses = ddp(inputs, SEED, step)
            loss_of(losses, config).backward()
            norm, skipped = finish(ddp, optimizer)
            assert not skipped
            scheduler.step(increment=1)
            record.append((float(losses.tokens.mean()), float(losses.images.mean()), float(norm)))
        gather_parameters(ddp)
        weights = gather_plain(model.language_model)
        weights |= {n: p.detach() for n, p in model.named_parameters() if not n.startswith("language_model.")}
        return record, {name: tensor.clone() for name, tensor in weights.items()}
    finally:
        groups.destroy()


def test_twenty_steps_agree_at_one_and_two_ranks(ranks):
    [(one, weights)] = ranks.run(1, twenty_steps, 1)
    two = ranks.run(2, twenty_steps, 2)
    for record, _ in two:
        torch.testing.assert_close(torch.tensor(record), torch.tensor(one), atol=0, rtol=1e-5)
    for name, tensor in two[0][1].items():
        assert torch.equal(tensor, two[1][1][name]), f"{name} differs between the ranks"
    assert weights.keys() == two[0][1].keys()


def biased_gradients(tensor: int, sharded: bool):
    """The language model's losses and gradients by plain name, where queries, keys and values have a
    bias (Qwen2)."""
    from mmi_megatron.model.mm_interleaved import prepare
    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.plain import gather_plain

    config = small_config(tensor)
    config.model.language.qkv_bias = True
    groups.initialize(config)
    try:
        model = sharded_model(config) if sharded else plain_model(config, SPECIAL)
        losses = model(prepare(random_batch(SEED), SPECIAL, config.model, torch.device("cpu")), SEED, 3)
        loss_of(losses, config).backward()
        language = model.language_model
        if sharded:
            return losses.tokens.detach(), gather_plain(language, lambda p: p.grad)
        return losses.tokens.detach(), {name: p.grad for name, p in language.named_parameters()}
    finally:
        groups.destroy()


def test_biases_of_queries_keys_and_values_are_divided_as_their_weights(ranks):
    wanted, plain = ranks.run(1, biased_gradients, 1, False)[0]
    assert plain["layers.0.self_attn.k_proj.bias"].abs().max() > 0
    for found, got in ranks.run(2, biased_gradients, 2, True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert_same_gradients(got, plain)
