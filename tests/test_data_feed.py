"""The executors: the same steps from each of them, at any number of ranks and workers, after kills."""

import os
import signal
import threading
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError, TooManyFailures
from data_pipeline.executors import ATTEMPTS, make_executor
from data_pipeline.feed import Division, Feed, setup_of
from data_pipeline.formats import Document
from data_pipeline.state import row_checksums
from data_pipeline.stream import Stream
from tests.data_corpora import cut_jpeg, documents, make_settings
from tests.data_soak import checksums, feeds, mixed_settings, step

SLOW = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return mixed_settings(tmp_path_factory.mktemp("feed"))


@pytest.fixture(scope="module")
def expected(mixed):
    return checksums(mixed, "inline", steps=24)


@pytest.mark.parametrize(
    ("executor", "ranks"),
    [*((name, ranks) for name in ("inline", "threads") for ranks in (1, 2, 4, 8)), ("processes", 2)],
)
def test_the_same_checksums_from_every_executor_at_any_number_of_ranks(mixed, expected, executor, ranks):
    assert checksums(mixed, executor, ranks, 24) == expected
    assert len(set(expected)) == 24


def test_a_checksum_changes_with_a_pixel_a_token_and_an_id(mixed):
    stream = Stream(mixed, global_rows=4)
    batch = stream.next().batches(0, 1, 4, 1)[0]
    boi = stream.tokenizer.special.boi
    before = row_checksums(batch, boi)
    for name in ("tokens", "labels", "images", "drawn", "image_ids", "sample_ids", "source"):
        array = getattr(batch, name).copy()
        array.flat[0] += 1
        after = row_checksums(replace(batch, **{name: array}), boi)
        assert (after != before).sum() >= 1, name
        assert (after[1:] == before[1:]).sum() >= 2, name
    turned = replace(batch, images=batch.images[..., ::-1].copy())
    assert (row_checksums(turned, boi) != before).any()


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_resuming_goes_on_after_what_was_handed_over_whatever_was_made_ahead(mixed, expected, executor):
    (feed,) = feeds(replace(mixed, prefetch=4), executor)
    seen = [step([feed])[0] for _ in range(5)]
    state = feed.state()
    assert state["cursor"]["step"] == 5
    seen += [step([feed])[0] for _ in range(3)]
    assert seen == expected[:8]
    feed.load_state(state)
    assert [step([feed])[0] for _ in range(3)] == expected[5:8]
    feed.close()
    other = feeds(replace(mixed, workers=1), "inline", 4, state)
    assert [step(other)[0] for _ in range(4)] == expected[5:9]


def test_a_killed_and_a_stopped_worker_are_replaced_and_the_stream_goes_on(mixed, expected):
    (feed,) = feeds(replace(mixed, task_timeout=1.5), "processes")
    workers = feed.executor.workers
    seen = []
    for number in range(16):
        if number == 4:
            os.kill(workers[0].process.pid, signal.SIGKILL)
        if number == 8:
            os.kill(workers[1].process.pid, signal.SIGSTOP)
        seen.append(step([feed])[0])
    assert seen == expected[:16]
    assert feed.executor.lost >= 1
    pids = [worker.process.pid for worker in feed.executor.workers]
    feed.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_task_that_kills_its_workers_ends_the_run_by_name(mixed):
    (feed,) = feeds(replace(mixed, task_timeout=1e-6), "processes")
    with pytest.raises(DataError, match=rf"{ATTEMPTS} data workers were lost on .*/.*task_timeout=1e-06"):
        feed.next()
    feed.close()


def test_workers_with_another_decoder_or_tokenizer_are_refused(mixed):
    stream = Stream(replace(mixed, executor="processes"))
    setup = setup_of(stream)
    for changed in (replace(setup, decoder="another"), replace(setup, tokenizer="another")):
        with pytest.raises(DataError, match="is .*, the trainer's 'another'"):
            make_executor(changed).submit(stream.next().task([0]))[0].result(timeout=60)


def test_shared_memory_is_used_again_and_never_under_a_batch_in_use(mixed):
    (feed,) = feeds(mixed, "processes")
    held, made = [], []
    for _ in range(12):
        share = feed.next()
        held.append((share.batches[0], share.batches[0].images.copy()))
        made.append(feed.executor.blocks.made)
    assert all(np.array_equal(batch.images, pixels) for batch, pixels in held)
    del held, share
    for _ in range(30):
        feed.next()
    assert feed.executor.blocks.made <= made[-1] + 2
    feed.close()


def test_steps_ahead_are_bounded_in_number_and_bytes(mixed):
    (feed,) = feeds(replace(mixed, prefetch=5), "threads")
    feed.next()
    assert len(feed._ahead) == 5
    feed.close()
    (feed,) = feeds(replace(mixed, prefetch=5, prefetch_bytes=1), "threads")
    for _ in range(3):
        feed.next()
        assert len(feed._ahead) == 1
    feed.close()


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_too_many_bad_samples_stop_the_run_by_name_with_any_executor(tmp_path, executor):
    bad = [Document(f"k{i}", ["x", cut_jpeg()], {}) for i in range(20)]
    settings = make_settings(tmp_path, {"a": bad}, failure_limit=0.3, executor=executor)
    with (
        Feed(Stream(settings, global_rows=4), Division(0, 1, 4, 1)) as feed,
        pytest.raises(TooManyFailures, match="source 'a'"),
    ):
        for _ in range(5):
            feed.next()


def test_validation_comes_from_the_workers_and_is_the_same(tmp_path):
    settings = make_settings(tmp_path, {"a": documents(60)}, holdout=0.3)
    here = Stream(settings).validation_batches("a", 8, 2)
    for executor in ("inline", "processes"):
        with Feed(Stream(replace(settings, executor=executor)), Division()) as feed:
            there = feed.validation_batches("a", 8, 2)
        assert len(there) == len(here) > 1
        for one, other in zip(here, there, strict=True):
            assert all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def test_a_worker_process_imports_no_torch(mixed):
    (feed,) = feeds(mixed, "processes")
    while not all(worker.ready for worker in feed.executor.workers):  # one may be much faster than the other
        feed.next()
    for worker in feed.executor.workers:
        loaded = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert "numpy" in loaded
        assert "libtorch" not in loaded
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("mmi-data")}
    assert names == {"mmi-data-dispatch"}
    feed.close()


@SLOW
@given(data=st.data())
def test_kills_and_resumes_at_random_with_other_ranks_and_workers(mixed, expected, data):
    position, state = 0, None
    while position < len(expected):
        ranks, workers = data.draw(st.sampled_from([1, 2, 4, 8])), data.draw(st.integers(1, 4))
        made = feeds(replace(mixed, workers=workers), "threads", ranks, state)
        for _ in range(min(data.draw(st.integers(1, 12)), len(expected) - position)):
            value, share = step(made)
            assert value == expected[position]
            position, state = position + 1, share.state
        for feed in made:
            feed.close()
