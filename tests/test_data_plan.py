"""Order, mixing, splitting, packing and balancing: exact properties, over random cases."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.balance import balance, row_cost
from data_pipeline.errors import SettingsError
from data_pipeline.index import IMAGE
from data_pipeline.keys import keyed
from data_pipeline.mix import next_source
from data_pipeline.pack import pack
from data_pipeline.plan import Part, Permutation, parts_of, split_document
from data_pipeline.planner import Order
from data_pipeline.settings import DataSettings, SourceSettings, check_settings, whole_weights
from data_pipeline.stream import Stream
from tests.data_corpora import documents, make_settings, pairs


@given(st.integers(1, 400), st.integers(-5, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_permutation_meets_each_once_and_depends_on_its_key(count, seed, epoch):
    permutation = Permutation(count, seed, epoch)
    order = permutation(0, count).tolist()
    assert sorted(order) == list(range(count))
    assert [Permutation(count, seed, epoch)(i, 1).item() for i in range(count)] == order
    assert permutation(count // 2, count - count // 2).tolist() == order[count // 2 :]
    if count > 20:
        assert order != Permutation(count, seed, epoch + 1)(0, count).tolist()


def test_the_order_is_the_one_that_runs_have_begun_with():
    assert Permutation(12, 7, 1)(0, 12).tolist() == [5, 10, 2, 8, 7, 6, 4, 11, 3, 1, 9, 0]


def test_permutation_is_uniform_and_cheap_far_out():
    starts = Counter(Permutation(10, seed)(0, 1).item() for seed in range(2000))
    assert len(starts) == 10
    assert max(starts.values()) < 300
    assert 0 <= Permutation(10**11 + 7, 3)(10**11, 1).item() < 10**11 + 7
    assert keyed(1, 2) != keyed(2, 1)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_mixing_is_within_one_sample_at_every_prefix(weights):
    drawn = [0] * len(weights)
    for n in range(1, 400):
        drawn[next_source(drawn, weights)] += 1
        for count, weight in zip(drawn, weights, strict=True):
            assert abs(count * sum(weights) - n * weight) < sum(weights)


def test_mixing_is_exact_where_taking_the_largest_deficit_is_not():
    weights = [1, 1, 60, 1, 60, 1, 8, 8]
    total = sum(weights)

    def stray(choose):
        drawn, worst = [0] * len(weights), 0.0
        for n in range(1, 2 * total):
            drawn[choose(drawn)] += 1
            worst = max(worst, *(abs(c - n * w / total) for c, w in zip(drawn, weights, strict=True)))
        return worst

    def largest_deficit(drawn):
        n = sum(drawn) + 1
        return max(range(len(weights)), key=lambda i: n * weights[i] - drawn[i] * total)

    assert stray(largest_deficit) > 1.2
    assert stray(lambda drawn: next_source(drawn, weights)) < 1


def test_weights_are_exact_fractions():
    sources = [SourceSettings("a", "x", 0.1), SourceSettings("b", "x", 0.25), SourceSettings("c", "x", 2.0)]
    assert whole_weights(DataSettings(sources=sources)) == [2, 5, 40]


PIECES = st.lists(st.just(IMAGE) | st.integers(0, 60), min_size=1, max_size=30)


@given(PIECES, st.integers(8, 40), st.integers(1, 5), st.none() | st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_parts_hold_the_whole_document_once_in_order(pieces, room, image_tokens, max_images):
    parts = parts_of(pieces, 0, 0, room=room, image_tokens=image_tokens, max_images=max_images)
    at = {}
    order = []
    for number, part in enumerate(parts):
        assert part.last == (number == len(parts) - 1)
        assert part.length <= room
        assert part.images <= (max_images or 99)
        assert part.first_image == sum(p.images for p in parts[:number])
        length = 1 + part.last
        for segment in part.segments:
            assert segment.start == at.get(segment.piece, 0) < segment.stop
            at[segment.piece] = segment.stop
            order.append(segment.piece)
            length += segment.stop - segment.start
            if pieces[segment.piece] == IMAGE:
                assert (segment.start, segment.stop) == (0, image_tokens + 1)
        assert part.length == length
        assert part.segments or len(parts) == 1
    assert order == sorted(order)
    assert at == {i: image_tokens + 1 if n == IMAGE else n for i, n in enumerate(pieces) if n}


def test_text_is_cut_only_when_it_is_longer_than_a_row():
    parts = split_document([5, 5, IMAGE, 5], room=12, image_tokens=3, max_images=None)
    assert [[segment.piece for segment in part] for part in parts] == [[0, 1], [2, 3]]
    long = split_document([25], room=12, image_tokens=3, max_images=None)
    assert [(s.start, s.stop) for part in long for s in part] == [(0, 11), (11, 22), (22, 25)]


def test_the_last_part_always_has_room_for_its_end():
    parts = parts_of([4, 7], 0, 0, room=12, image_tokens=3, max_images=None)
    assert [part.length for part in parts] == [5, 9]
    parts = parts_of([11], 0, 0, room=12, image_tokens=3, max_images=None)
    assert [part.length for part in parts] == [6, 8]


def part(length: int, images: int = 0) -> Part:
    return Part(0, 0, False, (), 0, images, length, True)


@given(st.lists(st.tuples(st.integers(2, 50), st.integers(0, 4)), max_size=60), st.none() | st.integers(4, 8))
@settings(max_examples=200, deadline=None)
def test_packing_loses_nothing_and_keeps_the_limits(sizes, max_images):
    parts = [part(*size) for size in sizes]
    rows = pack(parts, 50, max_images)
    assert Counter(id(p) for row in rows for p in row) == Counter(id(p) for p in parts)
    for row in rows:
        assert sum(p.length for p in row) <= 50
        assert sum(p.images for p in row) <= (max_images or 10**6)
    if max_images is None and rows:
        assert sum(sum(p.length for p in row) <= 25 for row in rows) <= 1


def mmc4_like(count: int, rng: np.random.Generator) -> list[Part]:
    """Documents of 1 to 6 images of 65 tokens with a log-normal text to each."""
    parts = []
    for _ in range(count):
        images = int(rng.integers(1, 7))
        text = int(np.clip(rng.lognormal(4.8, 0.9, images), 3, 2000).sum())
        parts.append(part(min(2 + 65 * images + text, 2048), images))
    return parts


@pytest.mark.parametrize(("room", "least"), [(2048, 0.98), (8192, 0.98)])
def test_packing_fills_rows_at_lengths_like_mmc4(room, least):
    rng = np.random.default_rng(0)
    fills = []
    for _ in range(4):
        rows = pack(mmc4_like(1024, rng), room)
        fills.append(sum(p.length for row in rows for p in row) / (room * len(rows)))
    assert min(fills) > least


@pytest.mark.parametrize(
    ("room", "pairs", "each", "most"),
    [
        (8192, 0, 4, 1.01),
        (2048, 0, 4, 1.02),
        (2048, 614, 6, 1.02),
        (2048, 614, 4, 1.02),
        (2048, 341, 4, 1.02),
    ],
    ids=["MMC4, 8192 tokens", "MMC4, 2048 tokens", "2:1:1:1, the paper's 384 rows"]
    + ["2:1:1:1, 256 rows", "2:1, 256 rows"],
)
def test_the_cost_of_64_ranks_is_even_at_lengths_like_mmc4(room, pairs, each, most):
    rng = np.random.default_rng(0)
    chosen = DataSettings(context_length=room)
    rows = []
    while len(rows) < 4 * 64 * each:  # windows of 1,024 samples, their rows shuffled
        window = pack(mmc4_like(1024 - pairs, rng), room)
        window += pack([part(67 + int(n), 1) for n in rng.integers(8, 60, pairs)], room)
        rows += [window[i] for i in rng.permutation(len(window))]
    spreads, unbalanced = [], []
    for at in range(0, len(rows) - 64 * each + 1, 64 * each):
        costs = [row_cost(row, chosen) for row in rows[at : at + 64 * each]]
        load = [sum(costs[i] for i in own) for own in balance(costs, 64)]
        spreads.append(max(load) / np.mean(load))
        in_order = np.array(costs).reshape(64, each).sum(1)
        unbalanced.append(in_order.max() / in_order.mean())
    assert len(spreads) > 3
    assert max(spreads) <= most < min(unbalanced)


def order_of(shards: list[int], together: int, seed: int) -> Order:
    """The order of a source whose shards hold so many documents; its indexes are never read."""

    class Numbers:
        def __init__(self):
            self.starts = np.cumsum([0, *shards])

        def counts(self, split):
            return np.array(shards)

        def fetch(self, wanted):
            assert len(wanted) <= together

        def numbers(self, split, shard):
            return np.arange(self.starts[shard], self.starts[shard + 1])

    return Order(Numbers(), "train", together, seed)


def drawn(order, first, count):
    """Numbers of documents."""
    return [number for _, numbers in order.drawn(first, count) for number in numbers.tolist()]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any), st.integers(1, 6), st.integers(0, 99)
)
@settings(max_examples=100, deadline=None)
def test_a_pass_meets_every_document_once_with_few_shards_open(shards, together, seed):
    order = order_of(shards, together, seed)
    total = sum(shards)
    starts = np.cumsum([0, *shards])
    for epoch in (0, 1):
        met = drawn(order, epoch * total, total)
        assert sorted(met) == list(range(total))
        anew = order_of(shards, together, seed)  # no state
        assert drawn(anew, epoch * total + total // 2, total) == [
            *met[total // 2 :],
            *drawn(order, (epoch + 1) * total, total // 2),
        ]
        own = [int(np.searchsorted(starts, number, side="right")) - 1 for number in met]
        spans = [(own.index(s), len(own) - own[::-1].index(s)) for s in set(own)]
        assert all(sum(a <= at < b for a, b in spans) <= together for at in range(total))


@given(st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_balancing_deals_equal_counts_of_all(bins, each, random):
    costs = [random.random() for _ in range(bins * each)]
    dealt = balance(costs, bins)
    assert [len(own) for own in dealt] == [each] * bins
    assert sorted(i for own in dealt for i in own) == list(range(bins * each))


def test_balancing_evens_out_costs():
    costs = np.random.default_rng(0).lognormal(0, 0.4, 64 * 8).tolist()
    load = [sum(costs[i] for i in own) for own in balance(costs, 64)]
    in_order = np.array(costs).reshape(64, 8).sum(1)
    assert max(load) / np.mean(load) < 1.05 < in_order.max() / in_order.mean()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sources": []}, "data.sources"),
        ({"sources": [SourceSettings(str(i), "x") for i in range(257)]}, "at most 256"),
        ({"sources": [SourceSettings("a", "x"), SourceSettings("a", "y")]}, "name"),
        ({"sources": [SourceSettings("a", "x", 0.0)]}, "weight"),
        ({"sources": [SourceSettings("a", "x", float("nan"))]}, "weight"),
        ({"sources": [SourceSettings("a", "x", 1.0, "pair")]}, "interleaved, pairs"),
        ({"context_length": 66}, "context_length"),
        ({"image_size": 0}, "image_size"),
        ({"holdout": 1.0}, "holdout"),
        ({"max_images_per_row": 0}, "max_images_per_row"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(change, named):
    with pytest.raises(SettingsError, match=named):
        check_settings(DataSettings(**{"sources": [SourceSettings("a", "x")], **change}))


def test_settings_fit_a_structured_configuration():
    from omegaconf import OmegaConf

    tree = OmegaConf.structured(DataSettings)
    tree = OmegaConf.merge(
        tree, {"sources": [{"name": "a", "path": "x", "weight": 2}], "context_length": 128}
    )
    made = OmegaConf.to_object(tree)
    assert made == DataSettings(sources=[SourceSettings("a", "x", 2.0)], context_length=128)


@pytest.mark.parametrize("changes", [{}, {"max_images_per_row": 2}, {"context_length": 24}], ids=str)
def test_a_window_takes_documents_as_they_are_taken_one_by_one(tmp_path, changes):
    sources = {"a": documents(50), "b": documents(31, "e", 1), "pairs": pairs(40)}
    planner = (stream := Stream(make_settings(tmp_path, sources, **changes))).planner
    for source, order in enumerate(planner.orders):
        found = planner.samples(source, 0, 2 * order.documents)
        passes = [(epoch, n) for epoch, own in order.drawn(0, 2 * order.documents) for n in own.tolist()]
        one_by_one = [p for epoch, number in passes for p in planner.parts(source, number, epoch, True)]
        assert [p._replace(segments=None) for p in found] == [p._replace(segments=None) for p in one_by_one]
        for one, other in zip(found, one_by_one, strict=True):
            ours, theirs = stream.task([[one]]), stream.task([[other]])
            assert np.array_equal(ours.tokens, theirs.tokens)
            assert (ours.images, ours.cu_seqlens.tolist()) == (theirs.images, theirs.cu_seqlens.tolist())
