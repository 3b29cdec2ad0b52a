"""One model at any layout: gradients of every parameter at step 1, losses, gradient norms, replicas.

A covering part of the layouts runs in ``make test``; all of them in ``make soak``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.matrix import (
    MUTATIONS,
    Layout,
    Result,
    Steps,
    assert_same_gradients,
    load_and_train,
    matrix_config,
    plain_gradients,
    run,
    story_steps,
    train_and_save,
)
from tests.ranks import Ranks

STEPS = 10

LAYOUTS = [
    Layout("TP2", tensor=2),
    Layout("TP2 images not divided", tensor=2, shard_images=False),
    Layout("TP2 + SP", tensor=2, sequence=True),
    Layout("TP2 + SP images not divided", tensor=2, sequence=True, shard_images=False),
    Layout("TP4", tensor=4),
    Layout("TP4 + SP", tensor=4, sequence=True),
    Layout("PP2", pipeline=2),
    Layout("PP2 last stage without layers", pipeline=2, stages=(4, 0)),
    Layout("PP2 interleaved", pipeline=2, virtual=2),
    Layout("PP2 interleaved, uneven", pipeline=2, virtual=2, stages=(1, 2, 1, 0)),
    Layout("PP4", pipeline=4),
    Layout("PP4 first stage without layers", pipeline=4, stages=(0, 2, 1, 1)),
    Layout("TP2 x PP2", tensor=2, pipeline=2),
    Layout("TP2 x PP2 + SP", tensor=2, pipeline=2, sequence=True),
    Layout("TP2 x PP2 interleaved + SP", tensor=2, pipeline=2, virtual=2, sequence=True),
    Layout("TP2 x PP2 + SP images not divided", tensor=2, pipeline=2, sequence=True, shard_images=False),
    Layout("DP2 without a distributed optimizer", data=2, overlap=False, copies=2),
    Layout("DP2 overlapped, without a distributed optimizer", data=2, copies=2),
    Layout("DP2 with distributed optimizer", data=2, overlap=False),
    Layout("DP2 with distributed optimizer, overlapped", data=2),
    Layout("DP4 overlapped", data=4),
    Layout("DP4 overlapped, two copies of the optimizer", data=4, copies=2),
    Layout("TP2 x DP2", tensor=2, data=2),
    Layout("TP2 x DP2 + SP", tensor=2, data=2, sequence=True),
    Layout("TP2 x DP2 without a distributed optimizer", tensor=2, data=2, copies=2),
    Layout("PP2 x DP2", pipeline=2, data=2),
    Layout("PP2 interleaved x DP2", pipeline=2, virtual=2, data=2),
    Layout("CP2", context=2),
    Layout("CP4", context=4),
    Layout("TP2 x CP2", tensor=2, context=2),
    Layout("TP2 x CP2 + SP", tensor=2, context=2, sequence=True),
    Layout("CP2 x PP2", context=2, pipeline=2),
    Layout("CP2 x PP2 interleaved", context=2, pipeline=2, virtual=2),
    Layout("CP2 x DP2 with distributed optimizer", context=2, data=2, overlap=False),
    Layout("CP2 x DP2 with distributed optimizer, overlapped", context=2, data=2),
    Layout("CP2 x DP2 without a distributed optimizer", context=2, data=2, copies=2),
]
SAVED = Layout("TP2 x PP2 + SP", tensor=2, pipeline=2, sequence=True)
AT = 2
"""The layout that checkpoints are saved at, and the step."""

SUBSET = {
    "TP2 x PP2 + SP",
    "PP2 interleaved",
    "TP2 x DP2",
    "DP2 without a distributed optimizer",
    "TP2 x CP2 + SP",
    "CP2 x PP2",
}
"""What ``make test`` runs, by name: every group, both schedules, payload under every kind of tensor and
context parallelism, overlapped exchanges, copies of the optimizer."""


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> tuple[Steps, int]:
    return story_steps(tmp_path_factory.mktemp("story"), AT + STEPS)


class Reference:
    """The single process's results, made once for each kind of training."""

    def __init__(self, pool: Ranks, story: tuple[Steps, int]):
        self.pool, (self.steps, self.vocabulary) = pool, story
        self.plain: dict[bool, dict[str, torch.Tensor]] = {}
        self.single: dict[tuple[bool, int], Result] = {}

    def gradients(self, frozen: bool) -> dict[str, torch.Tensor]:
        if frozen not in self.plain:
            self.plain[frozen] = plain_gradients(matrix_config(frozen, self.vocabulary), self.steps)
        return self.plain[frozen]

    def record(self, frozen: bool, steps: int):
        if (frozen, steps) not in self.single:
            [self.single[frozen, steps]] = self.train(Layout("TP1"), frozen, steps)
        return self.single[frozen, steps].record

    def train(self, layout: Layout, frozen: bool, steps: int, mutation: str = "") -> list[Result]:
        config = layout.apply(matrix_config(frozen, self.vocabulary))
        given = Steps(self.steps.special, self.steps.batches[:steps])
        return self.pool.run(layout.ranks, run, config, given, mutation)


@pytest.fixture(scope="module")
def reference(ranks, story) -> Reference:
    return Reference(ranks, story)


def assert_equal_replicas(results: list[Result]) -> None:
    """Bit for bit: over data and context parallelism everything, over tensor parallelism what is whole."""
    seen: dict[tuple, str] = {}
    for result in results:
        tensor, pipeline, *_ = result.place
        for (name, divided), digest in result.parameters.items():
            key = (pipeline, name, tensor if divided else None)
            assert seen.setdefault(key, digest) == digest, f"{name} differs between replicas: {result.place}"


def assert_same_run(results: list[Result], record, gradients) -> None:
    for place in {(tensor, context) for tensor, _, _, context in (result.place for result in results)}:
        merged = {}
        for result in results:
            tensor, _, data, context = result.place
            if (tensor, context) == place and data == 0:
                merged |= result.gradients
        assert_same_gradients(merged, gradients)
    for result in results:
        torch.testing.assert_close(torch.tensor(result.record), torch.tensor(record), atol=0, rtol=1e-5)
    assert_equal_replicas(results)


def test_images_need_not_divide_over_ranks(story):
    """What the layouts are compared on holds micro-batches without images (in the first two steps
    already), with fewer than four ranks, and with numbers that no even number of ranks divides."""
    for of in (lambda batch: len(batch.images), lambda batch: len(batch.drawn)):
        counts = [{of(batch) for batch in batches} for batches in story[0].batches[:STEPS]]
        early = counts[0] | counts[1]
        assert 0 in early and any(count % 2 for count in early)
        assert any(0 < count < 4 for count in set.union(*counts))


def check(reference: Reference, layout: Layout, frozen: bool, steps: int) -> None:
    results = reference.train(layout, frozen, steps)
    assert_same_run(results, reference.record(frozen, steps), reference.gradients(frozen))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.name in SUBSET], ids=lambda x: x.name)
def test_layout_trains_the_same_model(reference, layout):
    check(reference, layout, frozen=layout.data > 1, steps=2)


@pytest.mark.soak
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.name)
def test_every_layout_trains_the_same_model(reference, layout, frozen):
    check(reference, layout, frozen, STEPS)


CATCHES = {
    "dropped map gradient": (Layout("PP2", pipeline=2), "of its largest entry"),
    "missing sum over tensor ranks": (Layout("TP2 + SP", tensor=2, sequence=True), "of its largest entry"),
    "key by layout": (Layout("PP2", pipeline=2), "of its largest entry"),
    "positions without offset": (Layout("CP2", context=2), "of its largest entry"),
    "gradient of other context ranks": (Layout("CP2", context=2), "of its largest entry"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_broken_on_purpose_is_seen(reference, mutation):
    layout, message = CATCHES[mutation]
    results = reference.train(layout, False, 1, mutation)
    with pytest.raises(AssertionError, match=message):
        assert_same_run(results, reference.record(False, 2)[:1], reference.gradients(False))


def recomputed(reference: Reference, layout: Layout, ways: tuple[str, str, str], steps: int) -> None:
    """Bit for bit the same with and without, on every rank."""
    kept = reference.train(layout, False, steps)
    again = reference.train(replace(layout, recompute=ways), False, steps)
    for one, other in zip(kept, again, strict=True):
        assert one.record == other.record and one.parameters == other.parameters


def test_recomputation_changes_no_bit(reference):
    recomputed(reference, Layout("PP2", pipeline=2), ("full", "full", "selective"), steps=2)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(3), ids=["language", "vision", "decoder"])
@pytest.mark.parametrize("way", ["selective", "full"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout("TP2 + SP", tensor=2, sequence=True),
        Layout("PP2 interleaved", pipeline=2, virtual=2),
        Layout("CP2", context=2),
    ],
    ids=lambda x: x.name,
)
def test_recomputation_of_every_part_changes_no_bit(reference, layout, way, part):
    ways = tuple(way if index == part else "none" for index in range(3))
    recomputed(reference, layout, ways, STEPS)


def fresh(layout: Layout, frozen: bool, story, function, *arguments):
    """The ranks' results of a function in processes that have done nothing before."""
    steps, vocabulary = story
    with Ranks() as pool:
        return pool.run(
            layout.ranks, function, layout.apply(matrix_config(frozen, vocabulary)), steps, *arguments
        )


def check_checkpoints(story, folder, others: list[Layout], frozen: bool, after: int) -> None:
    """Saved at one layout, read at others and from there back: there the next steps are those of the run
    that was not disturbed, to the bit."""
    story = Steps(story[0].special, story[0].batches[: AT + after]), story[1]
    saved = fresh(SAVED, frozen, story, train_and_save, folder / "first", AT)
    record = torch.tensor(saved[0][0])
    for layout in others:
        back = folder / layout.name
        for got, _ in fresh(layout, frozen, story, load_and_train, folder / "first", AT, back):
            torch.testing.assert_close(torch.tensor(got), record, atol=0, rtol=1e-5)
        for (got, states), (want, before) in zip(
            fresh(SAVED, frozen, story, load_and_train, back, AT), saved, strict=True
        ):
            assert got == want, f"by way of {layout.name} the next steps are not the same to the bit"
            assert len(states) == len(before)
            for state, old in zip(states, before, strict=True):
                assert state.keys() == old.keys() and "step" in state
                assert all(torch.equal(state[name], old[name]) for name in state), layout.name


def test_checkpoint_of_one_layout_is_read_at_another(story, tmp_path):
    check_checkpoints(story, tmp_path, [Layout("DP2", data=2)], frozen=True, after=1)


@pytest.mark.soak
@pytest.mark.parametrize("frozen", [False, True], ids=["full", "frozen"])
def test_checkpoints_go_from_any_layout_to_any(story, tmp_path, frozen):
    others = [
        SAVED,
        Layout("TP1"),
        Layout("PP4", pipeline=4),
        Layout("DP2", data=2),
        Layout("DP2 without a distributed optimizer", data=2, copies=2),
        Layout("PP2 interleaved", pipeline=2, virtual=2),
        Layout("CP2", context=2),
        Layout("TP2 x CP2 + SP", tensor=2, context=2, sequence=True),
    ]
    check_checkpoints(story, tmp_path, others, frozen, after=STEPS)
