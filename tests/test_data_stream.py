"""The stream of steps: exact order at any number of ranks, exact resume, masked bad samples."""

import json
import os
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.batch import IGNORED, IMAGE_ID_BITS, PADDING
from data_pipeline.errors import DataError, ResumeError, TooManyFailures
from data_pipeline.formats import Document, read_document, write_documents
from data_pipeline.plan import SAMPLE_BITS
from data_pipeline.rows import describe_stream
from data_pipeline.settings import SourceSettings
from data_pipeline.stream import Stream
from tests.data_corpora import (
    WORDS,
    cut_jpeg,
    documents,
    huge_png,
    make_settings,
    make_tokenizer,
    pairs,
    photo,
    picture,
    words,
)

SLOW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two interleaved sources and one of pairs, 2 : 1 : 1."""
    sources = {"a": documents(50), "b": documents(31, "e", 1), "pairs": pairs(40)}
    chosen = make_settings(tmp_path_factory.mktemp("mixed"), sources)
    chosen.sources[0].weight = 2.0
    return chosen


def same(one, other):
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def rows_of(batches):
    """Each row of some batches as (tokens, labels, sources, samples, image bytes), sorted."""
    found = []
    for batch in batches:
        image = np.searchsorted(np.flatnonzero(batch.tokens == 3), batch.row_starts)
        for row in range(len(batch.row_starts) - 1):
            at = slice(*batch.row_starts[row : row + 2])
            documents = (batch.cu_seqlens[:-1] >= at.start) & (batch.cu_seqlens[:-1] < at.stop)
            pixels = batch.images[image[row] : image[row + 1]].tobytes()
            ids = batch.image_ids[image[row] : image[row + 1]].tobytes()
            values = (
                batch.tokens[at],
                batch.labels[at],
                batch.source[documents],
                batch.sample_ids[documents],
            )
            found.append((*(value.tobytes() for value in values), pixels, ids))
    return sorted(found)


def test_batches_fit_the_contract(mixed):
    stream = Stream(mixed, global_rows=8)
    special = stream.tokenizer.special
    for _ in range(6):
        for batch in stream.next().batches(0, 1, 4, 2):
            batch.validate()
            assert batch.row_starts.tolist() == [0, 64, 128, 192, 256]
            assert batch.images.shape[1:] == (8, 8, 3)
            assert batch.drawn.shape[1:] == (12, 12, 3)
            assert len(batch.images) == (batch.tokens == special.boi).sum()
            assert (batch.tokens == special.image).sum() == 4 * len(batch.images)
            starts = batch.cu_seqlens[:-1]
            assert ((batch.tokens[starts] == special.bos) == (batch.source != PADDING)).all()
            kinds = np.repeat(batch.source == 2, np.diff(batch.cu_seqlens))
            described = describe_stream(batch.tokens, batch.row_starts, special, pair_source=kinds)
            assert np.array_equal(described.labels, batch.labels)
            assert np.array_equal(np.flatnonzero(described.image_loss), batch.drawn_index)
            for row in range(4):
                own = batch.source[(starts >= 64 * row) & (starts < 64 * (row + 1))]
                assert len(set(own.tolist()) - {PADDING}) == 1


def test_every_document_comes_whole_once_an_epoch(mixed):
    stream = Stream(mixed, global_rows=1)
    seen = [Counter(), Counter(), Counter()]
    drawn = [0, 0, 0]
    while drawn[0] < 3 * 50:
        rows, drawn = stream.planner.window(drawn)
        for part in (part for row in rows for part in row):
            pieces = stream.corpus.sources[part.source].entry(part.number).pieces
            for piece in range(len(pieces)) if part.segments is None else {s.piece for s in part.segments}:
                seen[part.source][part.number, piece] += 1
    for source, count in enumerate(drawn):
        size = len(stream.corpus.sources[source])
        times = Counter({number: n for (number, _), n in seen[source].items()})
        assert set(times.values()) <= {count // size, -(-count // size)}
        assert sum(times.values()) == count
    assert max(abs(drawn[i] - sum(drawn) * share) for i, share in enumerate((0.5, 0.25, 0.25))) < 1


def test_text_and_pictures_of_a_document_arrive_unchanged(mixed):
    stream = Stream(mixed, global_rows=4)
    for batch in stream.next().batches(0, 1, 4, 1):
        image = 0
        for n, (source, sample) in enumerate(zip(batch.source, batch.sample_ids, strict=True)):
            if source == PADDING:
                continue
            assert sample >> SAMPLE_BITS == source
            original = stream.corpus.sources[source].document(int(sample & ((1 << SAMPLE_BITS) - 1)))
            tokens = batch.tokens[batch.cu_seqlens[n] : batch.cu_seqlens[n + 1]]
            text = "".join(piece for piece in original.content if isinstance(piece, str))
            assert stream.tokenizer.decode(tokens) == text
            for number, blob in enumerate(original.images):
                assert batch.image_ids[image] == int(sample) << IMAGE_ID_BITS | number
                value = int(batch.images[image, 4, 4, 0]) + 256 * int(batch.images[image, 4, 4, 1])
                assert blob == picture(value)
                image += 1
        assert image == len(batch.images)


@given(seed=st.integers(0, 100), split=st.sampled_from([(2, 4, 1), (2, 1, 4), (4, 2, 1), (1, 2, 4)]))
@SLOW
def test_the_same_rows_at_any_number_of_ranks(mixed, seed, split):
    mixed.seed = seed
    ranks, rows, count = split
    one, many = Stream(mixed, global_rows=8), Stream(mixed, global_rows=8)
    for _ in range(5):
        alone = one.next().batches(0, 1, 8, 1)
        step = many.next()
        divided = [batch for rank in range(ranks) for batch in step.batches(rank, ranks, rows, count)]
        assert len(divided) == ranks * count
        assert rows_of(divided) == rows_of(alone)
    mixed.seed = 0


@given(stop=st.integers(0, 40), rows=st.sampled_from([1, 3, 7]))
@SLOW
def test_resuming_gives_the_steps_the_undisturbed_run_has(mixed, stop, rows):
    whole = Stream(mixed, global_rows=rows)
    for _ in range(stop):
        step = whole.next()
    state = json.loads(json.dumps(step.state if stop else whole.state()))
    assert len(json.dumps(state)) < 1500
    resumed = Stream(mixed, global_rows=rows)
    for _ in range(3):
        resumed.next()
    resumed.load_state(state)
    for _ in range(6):
        one, other = whole.next(), resumed.next()
        assert (one.number, one.rows, one.state) == (other.number, other.rows, other.state)
        assert same(one.batches(0, 1, rows, 1)[0], other.batches(0, 1, rows, 1)[0])


def test_reading_ahead_does_not_move_the_saved_position(mixed):
    stream = Stream(mixed, global_rows=5)
    first = stream.next()
    kept = first.state
    second = [stream.next() for _ in range(20)][0]
    again = Stream(mixed, global_rows=5)
    again.load_state(kept)
    assert again.next().rows == second.rows


def test_the_global_batch_may_change_when_a_run_resumes(mixed):
    whole, part = Stream(mixed, global_rows=4), Stream(mixed, global_rows=4)
    rows = [row for _ in range(12) for row in whole.next().rows]
    for _ in range(4):
        state = part.next().state
    other = Stream(mixed, global_rows=2)
    other.load_state(state)
    assert [row for _ in range(16) for row in other.next().rows] == rows[16:]


def test_resume_refuses_other_data_tokenizer_and_settings_by_name(tmp_path):
    chosen = make_settings(tmp_path, {"a": documents(20)})
    stream = Stream(chosen)
    stream.next()
    state = stream.state()

    chosen.context_length, chosen.seed = 128, 7
    with pytest.raises(ResumeError, match=r"data.context_length was 64, now 128; data.seed was 0, now 7"):
        Stream(chosen).load_state(state)
    chosen.context_length, chosen.seed = 64, 0
    chosen.sources[0].weight = 2.0
    chosen.sources[0].kind = "pairs"
    with pytest.raises(ResumeError, match="data.sources was"):
        Stream(chosen).load_state(state)
    chosen.sources[0].weight, chosen.sources[0].kind = 1.0, "interleaved"

    (tmp_path / "other").mkdir()
    chosen.tokenizer = make_tokenizer(tmp_path / "other", 290)
    with pytest.raises(ResumeError, match="another tokenizer") as caught:
        Stream(chosen).load_state(state)
    assert "manifest" not in str(caught.value)
    chosen.tokenizer = str(tmp_path / "tokenizer.json")

    write_documents(documents(1, "new"), tmp_path / "more")
    (tmp_path / "more" / "000000.tar").rename(tmp_path / "a" / "000001.tar")
    with pytest.raises(ResumeError, match="manifest"):
        Stream(chosen).load_state(state)
    with pytest.raises(ResumeError, match="not one this version can read"):
        Stream(chosen).load_state({"schema": 99})


def test_a_change_of_weights_is_refused_or_recorded(tmp_path):
    chosen = make_settings(tmp_path, {"a": documents(60), "b": documents(60, "e", 1)})
    stream = Stream(chosen, global_rows=4)
    for _ in range(9):
        state = stream.next().state
    chosen.sources[0].weight = 3.0
    with pytest.raises(ResumeError, match=r"weights of data.sources were \[1, 1\], now \[3, 1\]"):
        Stream(chosen, global_rows=4).load_state(state)
    chosen.accept_changes = ["weights"]
    changed = Stream(chosen, global_rows=4)
    changed.load_state(state)
    left = len(stream._window[0]) - stream._row  # the window under way keeps its weights
    ours, theirs = ([row for _ in range(-(-left // 4)) for row in s.next().rows] for s in (stream, changed))
    assert ours[:left] == theirs[:left]
    first, second = changed.state()["mix"]
    assert (first["weights"], second["weights"]) == ([1, 1], [3, 1])
    base, drawn = second["drawn"], list(second["drawn"])
    for n in range(1, 400):
        drawn[changed.planner.mix(sum(drawn)).next_source(drawn)] += 1
        assert abs((drawn[0] - base[0]) - 0.75 * n) < 1
    after = changed.next()
    again = Stream(chosen, global_rows=4)  # the record is enough to go on as if it had run through
    again.load_state(after.state)
    assert [again.next().rows for _ in range(9)] == [changed.next().rows for _ in range(9)]
    with pytest.raises(ValueError, match="positive whole"):
        changed.change_weights([1, 0])


def test_a_text_of_the_same_length_is_another_manifest(tmp_path):
    found = []
    texts = (["one two"], ["two one"], ["ab", "c"], ["a", "bc"], ["one two"])
    for number, content in enumerate(texts):
        (tmp_path / str(number)).mkdir()
        chosen = make_settings(tmp_path / str(number), {"a": [Document("d", content, {})]})
        found.append(Stream(chosen).state()["manifest"])
    assert found[0] == found[4]
    assert len(set(found)) == 4


def test_moving_the_data_does_not_matter(tmp_path):
    (tmp_path / "x").mkdir()
    chosen = make_settings(tmp_path / "x", {"a": documents(20)})
    stream = Stream(chosen)
    step = stream.next()
    (tmp_path / "x" / "a").rename(tmp_path / "b")
    chosen.sources[0].path = str(tmp_path / "b")
    moved = Stream(chosen)
    moved.load_state(step.state)
    assert moved.next().rows == stream.next().rows


def test_pairs_are_turned_half_of_the_time_and_text_before_an_image_is_not_predicted(tmp_path):
    chosen = make_settings(tmp_path, {"pairs": pairs(200)}, window=200)
    stream = Stream(chosen, global_rows=1)
    special = stream.tokenizer.special
    rows, after = stream.planner.window([0])
    later, _ = stream.planner.window(after)
    first, second = ({p.number: p.flipped for row in given for p in row} for given in (rows, later))
    assert 70 < sum(first.values()) < 130
    assert 60 < sum(first[n] != second[n] for n in first) < 140
    batch = stream.produce(rows)
    for n in np.flatnonzero(batch.source != PADDING):
        at = slice(batch.cu_seqlens[n], batch.cu_seqlens[n + 1])
        tokens, labels = batch.tokens[at], batch.labels[at]
        boi = int(np.flatnonzero(tokens == special.boi)[0])
        number = int(batch.sample_ids[n])
        assert first[number] == (boi > 1)
        assert (labels[: boi - 1] == IGNORED).all()
        if boi > 1:
            assert labels[boi - 1] == special.boi
        else:
            assert (labels[boi + 4 : -1] == tokens[boi + 5 :]).all()
    assert len(batch.drawn) == sum(first.values())


def test_over_long_documents_start_anew_and_end_once(tmp_path):
    long = [Document("long", [words(40), picture(1), words(50, 3), picture(2), words(130), picture(3)], {})]
    chosen = make_settings(tmp_path, {"a": long}, window=1)
    stream = Stream(chosen)
    special = stream.tokenizer.special
    rows, _ = stream.planner.window([0])
    parts = sorted((part for row in rows for part in row), key=lambda part: part.first_image)
    assert len(parts) > 3
    batch = stream.produce(rows)
    assert not stream.ledger.lines
    good = batch.source != PADDING
    assert (batch.tokens[batch.cu_seqlens[:-1][good]] == special.bos).all()
    assert (batch.tokens == special.eos).sum() == 1
    assert sorted(batch.image_ids & 0xFFFF) == [0, 1, 2]
    text = Counter(batch.tokens[batch.tokens > special.image].tolist())
    assert text == Counter(t for piece in long[0].content[::2] for t in stream.tokenizer.encode(piece))


def test_images_of_a_row_are_capped(tmp_path):
    chosen = make_settings(tmp_path, {"a": documents(40)}, max_images_per_row=3)
    rows, _ = Stream(chosen).planner.window([0])
    assert max(sum(part.images for part in row) for row in rows) == 3


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (cut_jpeg(), "image cannot be read"),
        (huge_png(), "image is too large"),
        (b"no image", "image cannot be read"),
        (b"", "image cannot be read"),
    ],
    ids=["cut", "huge", "text", "empty"],
)
def test_a_bad_image_is_masked_and_the_plan_does_not_move(tmp_path, blob, reason):
    good = documents(30)
    bad = [Document(d.key, list(d.content), d.metadata) for d in good]
    bad[7].content[1] = blob
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    clean = Stream(make_settings(tmp_path / "good", {"a": good}, failure_limit=0.5), global_rows=4)
    stream = Stream(make_settings(tmp_path / "bad", {"a": bad}, failure_limit=0.5), global_rows=4)
    masked = 0
    for _ in range(8):
        one, other = clean.next(), stream.next()
        assert one.rows == other.rows
        a, b = one.batches(0, 1, 4, 1)[0], other.batches(0, 1, 4, 1)[0]
        b.validate()
        assert np.isin(b.row_starts, b.cu_seqlens).all()
        span = np.repeat((a.sample_ids == 7), np.diff(a.cu_seqlens))
        masked += span.any()
        assert (b.tokens[span] == stream.tokenizer.special.pad).all()
        assert (b.labels[span] == IGNORED).all()
        assert np.array_equal(a.tokens[~span], b.tokens[~span])
        kept = a.image_ids >> IMAGE_ID_BITS != 7
        assert np.array_equal(a.images[kept], b.images)
        assert 7 not in b.sample_ids
    assert masked
    assert stream.ledger.counts("a") == {reason: masked}
    assert [(line.shard, line.key) for line in stream.ledger.lines] == [("000000.tar", "d00007")]


def test_too_many_bad_images_stop_the_run_by_name(tmp_path):
    bad = [Document(f"k{i}", ["x", cut_jpeg()], {}) for i in range(20)]
    stream = Stream(make_settings(tmp_path, {"a": bad}, failure_limit=0.3), global_rows=4)
    with pytest.raises(TooManyFailures, match="source 'a'"):
        for _ in range(5):
            stream.next().batches(0, 1, 4, 1)


def test_a_shard_that_shrinks_under_a_run_is_masked(tmp_path):
    stream = Stream(make_settings(tmp_path, {"a": documents(10)}, failure_limit=0.9), global_rows=2)
    (tmp_path / "a" / "000000.tar").write_bytes(b"short")
    batch = stream.next().batches(0, 1, 2, 1)[0]
    assert (batch.source == PADDING).all()
    assert batch.cu_seqlens.tolist() == batch.row_starts.tolist()
    assert len(batch.images) == len(batch.drawn) == 0
    assert set(stream.ledger.counts("a")) == {"shard has changed"}


def test_a_source_without_a_good_document_is_an_error(tmp_path):
    chosen = make_settings(tmp_path, {"a": documents(1)})
    whole = (tmp_path / "a" / "000000.tar").read_bytes()
    (tmp_path / "a" / "000000.tar").write_bytes(whole[:600])
    with pytest.raises(DataError, match="source 'a': no usable document"):
        Stream(chosen)
    (tmp_path / "a" / "000000.tar").unlink()
    with pytest.raises(DataError, match=r"source 'a': no \*.tar shards"):
        Stream(chosen)


def test_held_out_documents_are_kept_from_training_and_come_in_a_fixed_order(tmp_path):
    chosen = make_settings(tmp_path, {"a": documents(100), "pairs": pairs(60)}, holdout=0.2)
    stream = Stream(chosen, global_rows=4)
    held = stream.heldout_documents(10, "a")
    chosen.seed = 9
    assert [d.key for d in Stream(chosen).heldout_documents(10, 0)] == [d.key for d in held]
    assert all(d.metadata["index"] == int(d.key[1:]) for d in held)
    numbers = {n for shard in range(5) for n in stream.corpus.sources[0].numbers("heldout", shard).tolist()}
    trained = {int(p.number) for _ in range(40) for row in stream.next().rows for p in row if p.source == 0}
    assert len(trained) + len(numbers) == 100
    assert not trained & numbers

    for name in ("a", "pairs"):
        batches = stream.validation_batches(name, 5, 2)
        again = Stream(chosen, "heldout").validation_batches(name, 5, 2)
        ids = {int(i) for batch in batches for i in batch.sample_ids if i != PADDING}
        assert len(ids) == 5
        source = stream.corpus.sources[stream._source(name)]
        held = {n for shard in range(len(source.shards)) for n in source.numbers("heldout", shard).tolist()}
        assert {i & ((1 << SAMPLE_BITS) - 1) for i in ids} <= held
        assert [len(b.row_starts) for b in batches[:-1]] == [3] * (len(batches) - 1)
        assert all(map(same, batches, again)) or name == "pairs"
        split = [stream.validation_batches(name, 5, 2, rank, 2) for rank in (0, 1)]
        assert len(split[0]) + len(split[1]) == len(batches)
        assert all(map(same, split[1], batches[1::2]))


def test_validation_without_held_out_documents_says_what_to_change(tmp_path):
    chosen = make_settings(tmp_path, {"a": documents(5)})
    with pytest.raises(DataError, match="data.holdout"):
        Stream(chosen).validation_batches("a", 4, 1)
    with pytest.raises(DataError, match="data.holdout"):
        Stream(chosen, "heldout").next()
    with pytest.raises(DataError, match="not one of a"):
        Stream(chosen).validation_batches("b", 4, 1)


def test_bad_held_out_documents_are_passed_over_and_counted(tmp_path):
    good = documents(20)
    good[3].content[1] = cut_jpeg()
    stream = Stream(make_settings(tmp_path, {"a": good}, holdout=0.9))
    held = stream.corpus.sources[0].numbers("heldout", 0)
    assert 3 in held
    assert len(stream.heldout_documents(100)) == len(held) - 1
    assert stream.ledger.counts("a") == {"image cannot be read": 1}


def test_a_given_document_becomes_a_row(tmp_path):
    stream = Stream(make_settings(tmp_path, {"a": documents(5)}))
    special = stream.tokenizer.special
    (tmp_path / "0.jpg").write_bytes(photo())
    prompt = {"content": [{"text": "one two"}, {"image": "0.jpg"}, {"text": " three"}]}
    (tmp_path / "doc.json").write_text(json.dumps(prompt))
    document = read_document(tmp_path / "doc.json")
    batch = stream.row_of(document, end=False)
    expected = [special.bos, *stream.tokenizer.encode("one two"), special.boi, *[special.image] * 4]
    assert batch.tokens.tolist() == expected + stream.tokenizer.encode(" three")
    assert batch.image_ids[0] > 0
    both = stream.row_of([document, documents(1)[0]])
    assert len(both.row_starts) == 3
    assert both.tokens[both.row_starts[1] - 1] == both.tokens[-1] == special.eos
    with pytest.raises(DataError, match="'long'.*context_length=64"):
        stream.row_of(Document("long", [words(100)]))
    with pytest.raises(DataError, match="'cut'.*cannot be read"):
        stream.row_of(Document("cut", ["one", cut_jpeg()]))


def test_a_step_refuses_a_division_that_does_not_come_out_even(mixed):
    step = Stream(mixed, global_rows=8).next()
    for rank, ranks, rows, count in [(0, 3, 1, 2), (2, 2, 2, 2), (0, 2, 8, 1)]:
        with pytest.raises(ValueError, match="does not divide"):
            step.batches(rank, ranks, rows, count)


def test_ranks_cost_about_the_same(mixed):
    mixed_rows = Stream(mixed, global_rows=32)
    images = np.array(
        [
            [sum(len(b.images) for b in step.batches(r, 4, 2, 4)) for r in range(4)]
            for step in [mixed_rows.next()]
        ]
    )
    assert images.max() / images.mean() < 1.1


def test_two_sources_of_one_name_or_a_wrong_split_are_refused(mixed):
    with pytest.raises(ValueError, match="split"):
        Stream(mixed, "test")
    twice = replace(mixed, sources=[*mixed.sources, SourceSettings("a", mixed.sources[0].path)])
    with pytest.raises(DataError, match="unique"):
        Stream(twice)


def test_the_limit_of_pixels_is_ours_to_set(tmp_path):
    stream = Stream(
        make_settings(tmp_path, {"a": documents(4)}, max_pixels=399, failure_limit=0.9), global_rows=1
    )
    assert (stream.next().batches(0, 1, 1, 1)[0].source == PADDING).all()
    assert set(stream.ledger.counts("a")) == {"image is too large"}
    (line, *_) = stream.ledger.lines
    assert line.detail == "20 x 20, at most 399 pixels"


def test_text_that_changes_under_a_run_does_not_reach_it(tmp_path):
    chosen = make_settings(tmp_path, {"a": documents(4)})
    stream, twin = Stream(chosen, global_rows=1), Stream(chosen, global_rows=1)
    expected = [twin.next().batches(0, 1, 1, 1)[0] for _ in range(3)]
    path = tmp_path / "a" / "000000.tar"
    blob = written = path.read_bytes()
    for word in WORDS:
        blob = blob.replace(f" {word}".encode(), b"~" * (1 + len(word)))
    before = path.stat().st_mtime_ns
    path.write_bytes(blob)
    os.utime(path, ns=(before, before))
    assert blob != written
    assert all(same(batch, stream.next().batches(0, 1, 1, 1)[0]) for batch in expected)
    assert not stream.ledger.lines
