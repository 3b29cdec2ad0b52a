"""The data service on Ray: the same steps as inline, while actors, a node, the feeder are lost."""

from __future__ import annotations

import time
from dataclasses import replace

import psutil
import pytest

from data_pipeline.feed import Division
from tests.data_soak import ROWS, checksums, mixed_settings, step

pytestmark = pytest.mark.soak

STEPS = 60


def patiently(start):
    """Ray gives its own processes 30 seconds to come up, which a busy machine may not have."""
    for attempt in range(5):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == 4:
                raise
    raise AssertionError


@pytest.fixture(scope="module")
def cluster():
    """A head where the trainer and the feeder are, and two nodes that decode."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from data_pipeline.executors.ray_actors import RESOURCE

    made = patiently(
        lambda: Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 << 20},
        )
    )
    room = {"num_cpus": 2, "resources": {RESOURCE: 2}, "object_store_memory": 200 << 20}
    nodes = [patiently(lambda: made.add_node(**room)) for _ in range(2)]
    made.decoding = nodes
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, cluster):
    return replace(
        mixed_settings(tmp_path_factory.mktemp("ray")),
        executor="ray",
        ray_address=cluster.address,
        workers=3,
        prefetch=3,
    )


@pytest.fixture(scope="module")
def expected(mixed):
    return checksums(mixed, "inline", steps=STEPS)


OPEN: list = []


@pytest.fixture(autouse=True)
def let_go():
    """Feeders give their actors back: the next test needs the room."""
    yield
    while OPEN:
        OPEN.pop().close()


def remote(settings, ranks: int = 1, state: dict | None = None) -> list:
    from data_pipeline.ray_service import RemoteFeed

    made = [RemoteFeed(settings, Division(rank, ranks, 1, ROWS // ranks), ROWS) for rank in range(ranks)]
    for feed in made:
        if state is not None:
            feed.load_state(state)
    OPEN.extend(made)
    return made


def processes(feed) -> list[int]:
    """Processes of the actors that decode."""
    import ray

    return [pid for _, pid in ray.get(feed.feeder.workers.remote())]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_steps_as_inline_at_any_number_of_ranks(mixed, expected, ranks):
    made = remote(mixed, ranks)
    assert [step(made)[0] for _ in range(12)] == expected[:12]


def test_actors_the_feeder_a_trainer_and_a_whole_node_are_lost_and_the_stream_goes_on(
    cluster, mixed, expected
):
    import os
    import signal

    import ray

    made = remote(mixed)
    seen = []
    for number in range(STEPS):
        if number == 8:  # an actor
            (feeder,) = [made[0].feeder]
            os.kill(processes(made[0])[0], signal.SIGKILL)
        if number == 20:  # a whole node, with its actors and its object store
            gone = cluster.decoding[0].node_id
            until = time.monotonic() + 60  # the one that took the lost actor's place may be starting there
            while not (there := sum(node == gone for node, _ in ray.get(feeder.workers.remote()))):
                assert time.monotonic() < until
                time.sleep(0.1)
            cluster.remove_node(cluster.decoding[0], allow_graceful=False)
        if number == 30:  # one that was only starting there Ray itself starts elsewhere
            noticed = time.monotonic() + 60
            while ray.get(feeder.lost.remote()) < 1 + there:
                assert time.monotonic() < noticed
                time.sleep(0.1)
            ray.kill(feeder)
        if number == 40:  # the trainer comes back, with another number of ranks
            state = made[0].state()
            made = remote(mixed, 2, state)
        seen.append(step(made)[0])
    assert seen == expected


def test_a_trainer_finds_its_feeder_again(mixed, expected):
    (first,) = remote(mixed)
    for _ in range(3):
        step([first])
    state = first.state()
    (second,) = remote(mixed, 1, state)
    assert second.feeder._actor_id == first.feeder._actor_id
    assert [step([second])[0] for _ in range(3)] == expected[3:6]


def test_a_slow_actor_is_replaced(mixed, expected):
    import os
    import signal

    import ray

    (feed,) = remote(replace(mixed, task_timeout=5.0, workers=2))
    assert step([feed])[0] == expected[0]
    started = time.monotonic()
    while len(processes(feed)) < 2:  # one may have been placed on a node that was lost just before
        assert time.monotonic() - started < 60
        time.sleep(0.1)
    before = ray.get(feed.feeder.lost.remote())
    slow = processes(feed)[0]
    os.kill(slow, signal.SIGSTOP)
    started = time.monotonic()
    assert [step([feed])[0] for _ in range(8)] == expected[1:9]
    assert time.monotonic() - started < 120
    assert ray.get(feed.feeder.lost.remote()) == before + 1
    os.kill(slow, signal.SIGKILL)


def test_validation_and_held_out_documents_come_over_ray(tmp_path, cluster):
    from data_pipeline.stream import Stream
    from tests.data_corpora import documents, make_settings

    settings = make_settings(tmp_path, {"a": documents(60)}, holdout=0.3)
    here = Stream(settings).validation_batches("a", 8, 2)
    (feed,) = remote(replace(settings, executor="ray", ray_address=cluster.address, workers=1))
    there = feed.validation_batches("a", 8, 2)
    assert [b.images.tobytes() for b in there] == [b.images.tobytes() for b in here]
    stream = Stream(settings)
    expected = stream.row_of(stream.heldout_documents(3))
    assert feed.heldout(3).tokens.tolist() == expected.tokens.tolist()


def test_a_cluster_without_room_is_an_error_by_name(mixed, monkeypatch):
    from data_pipeline.errors import DataError
    from data_pipeline.executors import ray_actors
    from data_pipeline.feed import setup_of
    from data_pipeline.ray_service import connect
    from data_pipeline.stream import Stream

    class Greedy(ray_actors.RayActors):
        def _start(self):
            self.options["num_cpus"] = 1000
            return super()._start()

    connect(mixed)
    monkeypatch.setattr(ray_actors, "START", 3.0)
    stream = Stream(mixed, global_rows=ROWS)
    executor = Greedy(setup_of(stream))
    try:
        with pytest.raises(DataError, match="no data actor came up within 3 s"):
            executor.submit(stream.next().task([0]))[0].result(timeout=60)
    finally:
        executor.close()


def test_memory_of_a_trainer_does_not_grow_over_two_thousand_steps(mixed):
    """Private memory: pixels in the object store are shared with it."""
    (feed,) = remote(mixed)
    held = {}
    for number in range(2001):
        feed.next()
        if number in (500, 2000):
            held[number] = psutil.Process().memory_full_info().uss
    print(f"{held[500] >> 20} MiB after 500 steps, {held[2000] >> 20} MiB after 2000")
    assert held[2000] < held[500] + (8 << 20)
