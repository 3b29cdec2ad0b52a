"""Ways of dividing the same work: MMFS by queries, the visual tokenizer ahead of the pipeline; and the bytes
that ranks send, counted and from the sizes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch

from tests.matrix import (
    ROWS,
    Layout,
    Steps,
    build,
    counts_of,
    load_and_train,
    matrix_config,
    plain_gradients,
    run,
    train_and_save,
    without_images,
)
from tests.samples import SPECIAL, random_batch, small_config
from tests.test_matrix import assert_same_run

SEQUENCE = Layout("TP2 + SP", tensor=2, sequence=True)
PIPELINE = Layout("PP2", pipeline=2)
CONTEXT = Layout("TP2 x CP2 + SP", tensor=2, context=2, sequence=True)
BOTH = Layout("TP2 x PP2 + SP", tensor=2, pipeline=2, sequence=True)


@pytest.fixture(scope="module")
def story() -> tuple[Steps, int]:
    """Two steps of random documents, in each a row without an image; and the vocabulary."""
    steps = [[random_batch(10 * step + row, 1, length=96) for row in range(ROWS)] for step in range(2)]
    for step, row in ((0, ROWS - 1), (1, 0)):
        steps[step][row] = without_images(steps[step][row], SPECIAL)
    return Steps(SPECIAL, steps), 61


def config_of(layout: Layout, story, frozen: bool = False, **parallel):
    config = layout.apply(matrix_config(frozen, story[1]))
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


TOKENS, IMAGES, MAPS_WIDTH, SHAPES = 24, 5, 12, ((4, 4), (2, 2))


def mmfs_alone(kind: str):
    """The plain MMFS, its norm of the maps and what they are given, all random, in float64."""
    from mmi_megatron.model.mmfs import MMFS

    generator = torch.Generator().manual_seed(5)
    language = small_config().model.language
    language.mmfs.kind, language.mmfs.levels = kind, [0, 1]
    attention = MMFS(language.width, MAPS_WIDTH, language.width, language.mmfs, SHAPES).double()
    norm = torch.nn.RMSNorm(MAPS_WIDTH, eps=language.norm_eps, dtype=torch.float64)
    with torch.no_grad():
        for parameter in [*attention.parameters(), *norm.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(TOKENS, language.width, generator=generator, dtype=torch.float64)
    maps = torch.randn(IMAGES, 20, MAPS_WIDTH, generator=generator, dtype=torch.float64)
    last = torch.arange(TOKENS) * (IMAGES + 1) // TOKENS
    visible = torch.stack([(last - 2).clamp_min(0), last], 1).int()
    weights = torch.randn(TOKENS, language.width, generator=generator, dtype=torch.float64)
    return language, attention, norm, hidden.requires_grad_(), maps.requires_grad_(), visible, weights


def plain_mmfs(kind: str) -> dict[str, torch.Tensor]:
    """Output and gradients of the plain MMFS."""
    _, attention, norm, hidden, maps, visible, weights = mmfs_alone(kind)
    out = attention(hidden, norm(maps), hidden.new_full((1, 2), 0.5, dtype=torch.float32), visible)
    (out * weights).sum().backward()
    named = {f"mmfs.attention.{name}": parameter.grad for name, parameter in attention.named_parameters()}
    named |= {"hidden": hidden.grad, "maps": maps.grad, "out": out.detach()}
    return named | {"mmfs.norm_maps.weight": norm.weight.grad}


def sharded_mmfs(kind: str, divide: str) -> dict[str, torch.Tensor]:
    """The same of the sharded one, under sequence parallelism, brought together from the ranks."""
    import torch.distributed as dist

    from mmi_megatron.parallel import groups
    from mmi_megatron.parallel.mmfs import ShardedMMFS
    from mmi_megatron.parallel.plain import layer_rules
    from mmi_megatron.parallel.spec import transformer_config

    config = small_config(2)
    config.parallel.sequence = True
    groups.initialize(config)
    try:
        language, attention, norm, hidden, maps, visible, weights = mmfs_alone(kind)
        megatron = transformer_config(config)
        megatron.params_dtype = torch.float64
        module = ShardedMMFS(megatron, 1, language.mmfs, MAPS_WIDTH, SHAPES, divide).double()
        prefix, rank = "cross_attention.", dist.get_rank()
        rules = {
            name.removeprefix(prefix): rule
            for name, rule in layer_rules(language, True, divide).items()
            if name.startswith(prefix)
        }
        values = {f"mmfs.attention.{name}": p.detach() for name, p in attention.named_parameters()}
        values["mmfs.norm_maps.weight"] = norm.weight.detach()
        named = dict(module.named_parameters())
        assert named.keys() == rules.keys()
        for name, rule in rules.items():
            named[name].data.copy_(rule.join([values[plain] for plain in rule.plain], 2)[rank])
        part = hidden.detach().chunk(2)[rank].unsqueeze(1).requires_grad_()
        out, _ = module(part, visible, maps.flatten(0, 1).unsqueeze(1))
        (out.squeeze(1) * weights.chunk(2)[rank]).sum().backward()
        dist.all_reduce(maps.grad)
        found = {"maps": maps.grad}
        for name, tensor in (("hidden", part.grad), ("out", out.detach())):
            pieces = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(pieces, tensor.contiguous())
            found[name] = torch.cat(pieces).squeeze(1)
        for name, rule in rules.items():
            gradient = named[name].grad
            if getattr(named[name], "sequence_parallel", False):  # finalize_model_grads does so
                dist.all_reduce(gradient)
            pieces = [torch.empty_like(gradient) for _ in range(2)]
            dist.all_gather(pieces, gradient.contiguous())
            found |= dict(zip(rule.plain, rule.part(pieces), strict=True))
        return found
    finally:
        groups.destroy()


@pytest.mark.parametrize("divide", ["heads", "queries"])
@pytest.mark.parametrize("kind", ["deformable", "dense"])
def test_mmfs_divided_either_way_is_the_plain_one(ranks, kind, divide):
    want = plain_mmfs(kind)
    for got in ranks.run(2, sharded_mmfs, kind, divide):
        assert got.keys() == want.keys()
        for name, expected in want.items():
            error = float((got[name] - expected).abs().max())
            assert error < 1e-10 * max(float(expected.abs().max()), 1), (name, error)


@pytest.mark.soak
@pytest.mark.parametrize("layout", [SEQUENCE, CONTEXT], ids=lambda x: x.name)
def test_queries_in_place_train_the_same_model(ranks, story, layout):
    plain = plain_gradients(config_of(layout, story), story[0])
    by_heads, by_queries = (
        ranks.run(layout.ranks, run, config_of(layout, story, mmfs=divide), story[0])
        for divide in ("heads", "queries")
    )
    assert_same_run(by_queries, by_heads[0].record, plain)


@pytest.mark.soak
def test_a_checkpoint_by_heads_goes_on_by_queries(ranks, story, tmp_path):
    by_heads, by_queries = (config_of(SEQUENCE, story, mmfs=divide) for divide in ("heads", "queries"))
    saved = ranks.run(2, train_and_save, by_heads, story[0], tmp_path / "heads", 1)
    back = tmp_path / "queries"
    for record, _ in ranks.run(2, load_and_train, by_queries, story[0], tmp_path / "heads", 1, back):
        torch.testing.assert_close(torch.tensor(record), torch.tensor(saved[0][0]), atol=0, rtol=1e-5)
    for (got, states), (want, before) in zip(
        ranks.run(2, load_and_train, by_heads, story[0], back, 1), saved, strict=True
    ):
        assert got == want
        for state, old in zip(states, before, strict=True):
            assert all(torch.equal(state[name], old[name]) for name in old)


def run_and_count(config, steps):
    """The run, and how many micro-batches this rank has tokenized ahead."""
    from mmi_megatron.parallel.model import ShardedMMInterleaved

    ahead = ShardedMMInterleaved.run_ahead
    with mock.patch.object(ShardedMMInterleaved, "run_ahead", autospec=True, side_effect=ahead) as called:
        return run(config, steps), called.call_count


def check_ahead(ranks, story, layout: Layout) -> None:
    """Bit for bit the same run; ahead are all micro-batches but the first of a step, on the first stage."""
    kept, ahead = (
        ranks.run(layout.ranks, run_and_count, config_of(layout, story, vision_ahead=way), story[0])
        for way in (False, True)
    )
    for (one, none), (other, count) in zip(kept, ahead, strict=True):
        assert one.record == other.record and one.parameters == other.parameters
        batches = len(story[0].batches) * (ROWS // layout.data - 1)
        assert none == 0 and count == (batches if one.place[1] == 0 else 0)


def test_the_visual_tokenizer_ahead_changes_no_bit(ranks, story):
    check_ahead(ranks, story, PIPELINE)


@pytest.mark.soak
@pytest.mark.parametrize(
    "layout",
    [
        BOTH,
        Layout("PP4", pipeline=4),
        Layout("PP2 x DP2", pipeline=2, data=2),
        Layout("CP2 x PP2", context=2, pipeline=2),
    ],
    ids=lambda x: x.name,
)
def test_the_visual_tokenizer_ahead_of_every_pipeline_changes_no_bit(ranks, story, layout):
    check_ahead(ranks, story, layout)


OF_DATA, OF_IMAGES = "data x context", "data x context x tensor"
"""Names of groups (``parallel.traffic``)."""


def sent(config, steps):
    """Bytes that this rank sends in the second of two steps: counted, and by the sizes."""
    from mmi_megatron.model.mm_interleaved import prepare
    from mmi_megatron.parallel import groups, schedule, traffic
    from mmi_megatron.train.optimizer import finish

    layout = groups.initialize(config)
    try:
        wrapped, optimizer, _ = build(config, steps)
        for step, batches in enumerate(steps.batches):
            mine = batches[layout.dp_rank :: layout.dp_size]
            inputs = [prepare(batch, steps.special, config.model, torch.device("cpu")) for batch in mine]
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            counted = traffic.Sent() if step else None
            with counted or nullcontext():
                schedule.train_step(wrapped, inputs, config.model.loss, counts_of(batches), 0, step)
                finish(wrapped, optimizer)
        sizes = traffic.expected(config, [chunk.module for chunk in wrapped], inputs, layout.dp_size)
        assert counted is not None
        return dict(counted.bytes), sizes
    finally:
        groups.destroy()


def check_bytes(pool, story, layout, frozen, busy, **parallel) -> None:
    """Within 5 %, group by group; ``busy``: the groups that send anything to speak of."""
    for counted, sizes in pool.run(
        layout.ranks, sent, config_of(layout, story, frozen, **parallel), story[0]
    ):
        for group in ("tensor", "context", "pipeline", OF_DATA, OF_IMAGES):
            assert (sizes[group] > 50_000) == (group in busy), (group, sizes)
            if group in busy:
                assert counted[group] == pytest.approx(sizes[group], rel=0.05), (layout.name, group)
            else:
                assert counted.get(group, 0) < 5_000, (layout.name, group)


@pytest.mark.parametrize(
    ("layout", "frozen", "busy"),
    [
        (Layout("TP2", tensor=2), False, {"tensor", OF_IMAGES}),
        (SEQUENCE, True, {"tensor", OF_IMAGES}),
        (PIPELINE, False, {"pipeline"}),
        (Layout("DP2", data=2), True, {OF_DATA, OF_IMAGES}),
        (Layout("CP2", context=2), False, {"context", OF_DATA, OF_IMAGES}),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_bytes_sent_are_those_of_the_sizes(ranks, story, layout, frozen, busy):
    check_bytes(ranks, story, layout, frozen, busy)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("layout", "frozen", "parallel", "busy"),
    [
        (Layout("TP2 images whole", tensor=2, shard_images=False), True, {}, {"tensor"}),
        (SEQUENCE, False, {"mmfs": "queries"}, {"tensor", OF_IMAGES}),
        (BOTH, False, {}, {"tensor", "pipeline", OF_IMAGES}),
        (Layout("TP2 x DP2", tensor=2, data=2), False, {}, {"tensor", OF_DATA, OF_IMAGES}),
        (Layout("PP2 interleaved", pipeline=2, virtual=2), False, {}, {"pipeline"}),
        (CONTEXT, False, {}, {"tensor", "context", OF_DATA, OF_IMAGES}),
        (Layout("CP2 x PP2", context=2, pipeline=2), False, {}, {"context", "pipeline", OF_DATA, OF_IMAGES}),
        (replace(SEQUENCE, recompute=("full", "none", "none")), False, {}, {"tensor", OF_IMAGES}),
        *[
            (
                Layout("CP2", context=2, recompute=(way, "none", "none")),
                False,
                {},
                {"context", OF_DATA, OF_IMAGES},
            )
            for way in ("selective", "full")
        ],
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_bytes_sent_at_other_layouts(ranks, story, layout, frozen, parallel, busy):
    check_bytes(ranks, story, layout, frozen, busy, **parallel)
