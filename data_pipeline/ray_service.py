"""The data service on Ray: a feeder on each node of trainers, actors that decode wherever there is room.

The feeder plans and keeps steps under way; a trainer asks it for its share and takes the batches out of its
node's object store without a copy. Nothing is kept that cannot be made again: a trainer whose feeder is
lost starts another at the position it has reached, and one that comes back finds its feeder waiting.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.errors import DataError
from data_pipeline.executors import collect_rarely
from data_pipeline.executors.ray_actors import RayActors, Stored, fetch
from data_pipeline.feed import Division, Feed, Share, setup_of
from data_pipeline.optional import ray
from data_pipeline.ray_cluster import NAMESPACE, connect
from data_pipeline.settings import DataSettings
from data_pipeline.stream import Stream
from data_pipeline.task import Produced

IDLE = 300.0
"""Seconds after which a feeder that nobody asks ends itself."""

RETRIES = 5
"""Feeders that a trainer starts one after the other before it gives up."""

LEAVE = 30.0
"""Seconds a rank waits for its feeder to let it go."""

PULL = 60.0
"""Seconds for a batch to come from another node before it is made again."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Client:
    """A rank that is fed: its feed, which one request uses at a time, and the last share it was given."""

    feed: Feed
    lock: threading.Lock = field(default_factory=threading.Lock)
    share: Share | None = None


class Feeder:
    """The actor of a node of trainers: plans their steps and has them made.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: DataSettings):
        self.settings = settings
        self.lock = threading.Lock()
        self.clients: dict[str, Client] = {}
        self.executor: RayActors | None = None
        self.requests = 0
        self.asked = time.monotonic()
        collect_rarely()
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def open(self, name: str, division: Division, global_rows: int, state: dict | None) -> dict[str, Any]:
        """Begin to feed a rank, or go on with it.

        Args:
            name: of the rank.
            division: which part of each step it takes.
            global_rows: rows of a step.
            state: where to start, None for the beginning.

        Returns:
            The position.
        """
        with self._request():
            stream = Stream(self.settings, "train", global_rows)
            if state is not None:
                stream.load_state(state)
            with self.lock:
                if self.executor is not None and self.executor.failure is not None:
                    self.executor.close()  # an earlier trainer has been told why
                    self.executor = None
                self.executor = self.executor or RayActors(setup_of(stream))
                for other, client in list(self.clients.items()):
                    if other == name or client.feed.division.ranks != division.ranks:  # an earlier trainer's
                        client.feed.drop()
                        del self.clients[other]
                feed = Feed(stream, division, self.executor)
                self.clients[name] = Client(feed)
            return feed.state()

    def next(self, name: str, number: int) -> tuple[bytes, list[Stored]]:
        """A rank's share of the step of that number, which follows the last one asked for, or is it: pickled
        here, which takes less than half as long as Ray's own pickling; and where its batches are."""
        with self._client(name) as client:
            share = self._share(name, client, number)
        return pickle.dumps(replace(share, batches=[], elsewhere=[]), 5), share.elsewhere

    def again(self, name: str, number: int, index: int) -> Produced:
        """A micro-batch of the share of that step made once more; this feeder may be a new one, which has
        not made it yet."""
        with self._client(name) as client:
            self._share(name, client, number)
            return client.feed.again(index)

    def validation(self, name: str, *arguments: Any) -> list[Produced]:
        """See ``Feed.validation``."""
        with self._client(name) as client:
            return client.feed.validation(*arguments)

    def heldout(self, name: str, documents: int) -> Batch:
        """See ``Feed.heldout``."""
        with self._client(name) as client:
            return client.feed.heldout(documents)

    def leave(self, name: str) -> None:
        """A rank needs no more; with the last one the actors are given back."""
        with self.lock:
            client = self.clients.pop(name, None)
            if client is not None:
                client.feed.drop()
            if not self.clients and self.executor is not None:
                self.executor.close()
                self.executor = None

    def settle(self, name: str) -> None:
        """See ``Feed.settle``."""
        with self._client(name) as client:
            client.feed.settle()

    def lost(self) -> int:
        """Actors replaced so far."""
        return self.executor.lost if self.executor else 0

    def workers(self) -> list[tuple[str, int]]:
        """Node and process of each actor that is up."""
        return [a.where for a in self.executor.actors if a.where] if self.executor else []

    @staticmethod
    def _share(name: str, client: Client, number: int) -> Share:
        if client.share is None or client.share.number != number:
            client.share = client.feed.next()
        if client.share.number != number:
            raise DataError(
                f"feeder: {name} asks for step {number}, the next is {client.share.number}; is there another "
                "run with the same data settings on this node?"
            )
        return client.share

    @contextmanager
    def _client(self, name: str) -> Iterator[Client]:
        """A rank, for a request; another one that has begun is waited for."""
        with self._request():
            with self.lock:
                client = self.clients.get(name)
            if client is None:
                raise DataError(
                    f"feeder: {name} is not open; has a trainer with another number of ranks and the same "
                    "data settings begun on this node?"
                )
            with client.lock:
                yield client

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Around what somebody has asked for: the feeder is not idle."""
        with self.lock:
            self.requests += 1
        try:
            yield
        finally:
            with self.lock:
                self.requests -= 1
                self.asked = time.monotonic()

    def _end_when_idle(self) -> None:
        while self.requests or time.monotonic() - self.asked < IDLE:
            time.sleep(IDLE / 10)
        os._exit(0)  # a detached actor ends with its process; its own actors end with it


class RemoteFeed:
    """A rank's shares of the steps, from the feeder of its node; in use like ``feed.Feed``.

    Args:
        settings: of the run; ``ray_address`` says where.
        division: which part of each step is this rank's.
        global_rows: rows of a step.

    Raises:
        DataError: when there is no cluster, or the data cannot be opened.
    """

    def __init__(self, settings: DataSettings, division: Division, global_rows: int):
        connect(settings)
        self.settings, self.division, self.global_rows = settings, division, global_rows
        self.client = f"rank {division.rank} of {division.ranks}"
        self._opened = False
        self.feeder = self._find()
        self._state = self._call("open", self.client, division, global_rows, None)
        self._opened = True
        self._asked: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> Share:
        """The next step's share; see ``Feed.next``."""
        number = self._state["cursor"]["step"]
        asked = self._retried(lambda: ray.get(self._asked or self.feeder.next.remote(self.client, number)))
        share: Share = pickle.loads(asked[0])
        held: dict[Any, Any] = {}
        batches = [self._fetched(number, index, stored, held) for index, stored in enumerate(asked[1])]
        self._state = share.state
        self._asked = self.feeder.next.remote(self.client, number + 1)
        return replace(share, batches=batches)

    def ready(self) -> bool:
        """Whether the next share is made."""
        return self._asked is not None and bool(ray.wait([self._asked], timeout=0)[0])

    def settle(self) -> None:
        """Wait until everything that is under way is made."""
        if self._asked is not None:
            ray.wait([self._asked])
        self._call("settle", self.client)

    def state(self) -> dict[str, Any]:
        """Position after the last share handed over."""
        return self._state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; see ``Stream.load_state``."""
        asked, self._asked = self._asked, None
        self._state = self._call("open", self.client, self.division, self.global_rows, state)
        _forget(asked)

    def validation_batches(
        self, source: str | int, documents: int, rows_per_micro_batch: int, rank: int = 0, ranks: int = 1
    ) -> list[Batch]:
        """See ``Feed.validation_batches``."""
        arguments = (source, documents, rows_per_micro_batch, rank, ranks)
        for _ in range(RETRIES):
            made = self._call("validation", self.client, *arguments)
            held: dict[Any, Any] = {}
            try:
                return [fetch(produced.elsewhere, held, PULL) for produced in made]
            except ray.exceptions.RayError as error:
                log.warning("held-out batches were lost on the way (%s); asked again", error)
        raise DataError(f"held-out batches were lost {RETRIES} times on their way from the data service")

    def heldout(self, documents: int) -> Batch:
        """See ``Feed.heldout``."""
        batch = self._call("heldout", self.client, documents)
        ours = {own.name: np.array(getattr(batch, own.name)) for own in fields(batch)}
        return replace(batch, **ours)  # Ray's arrays cannot be written to

    def close(self) -> None:
        """Let go; the feeder gives back its actors, and ends by itself when nobody asks."""
        asked, self._asked = self._asked, None
        with suppress(ray.exceptions.RayError):  # it is lost, and its actors with it
            ray.get(self.feeder.leave.remote(self.client), timeout=LEAVE)
            _forget(asked)

    def _fetched(self, number: int, index: int, stored: Stored, held: dict[Any, Any]) -> Batch:
        """A micro-batch of a step; made again when it was lost with its node."""
        for _ in range(RETRIES):
            try:
                return fetch(stored, held, PULL)
            except ray.exceptions.RayError as error:
                log.warning("a batch was lost on the way (%s); it is made again", str(error).split("\n")[0])
                stored = self._call("again", self.client, number, index).elsewhere
        raise DataError(f"a batch was lost {RETRIES} times on its way from the data service")

    def _find(self) -> Any:
        """This node's feeder, started if there is none."""
        node = ray.get_runtime_context().get_node_id()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        options = {
            "name": f"feeder-{_digest(self.settings)}-{node[:16]}",
            "namespace": NAMESPACE,
            "get_if_exists": True,
            "lifetime": "detached",
            "num_cpus": 0,
            "max_concurrency": 64,
            "scheduling_strategy": here,
        }
        return ray.remote(Feeder).options(**options).remote(self.settings)

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._retried(lambda: ray.get(getattr(self.feeder, method).remote(*arguments)))

    def _retried(self, ask) -> Any:
        """What the feeder answers; when it is lost another takes its place at this rank's position."""
        for attempt in range(RETRIES):
            try:
                return ask()
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, Exception) else error) from None
            except ray.exceptions.RayError as error:
                log.warning("the feeder was lost (%s); another takes its place", str(error).split("\n")[0])
                time.sleep(0.5 * attempt)
                self._asked = None
                self.feeder = self._find()
                if self._opened:
                    self._reopen()
        raise DataError(f"{RETRIES} feeders of the data service were lost one after the other")

    def _reopen(self) -> None:
        try:
            arguments = (self.client, self.division, self.global_rows, self._state)
            ray.get(self.feeder.open.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except ray.exceptions.RayError as error:
            log.warning("the new feeder was lost as well (%s)", str(error).split("\n")[0])


def _forget(asked: Any) -> None:
    """Look at what became of a request that has been overtaken: Ray prints errors that nobody looks at."""
    if asked is not None:
        with suppress(ray.exceptions.RayError):
            ray.get(asked, timeout=LEAVE)


def _digest(settings: DataSettings) -> str:
    text = json.dumps(asdict(settings), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
