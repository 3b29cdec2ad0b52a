"""Streams run through kills, resumes and other numbers of ranks: what the tests of the feed share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_pipeline.feed import Division, Feed, Share, checksum_of
from data_pipeline.settings import DataSettings
from data_pipeline.stream import Stream
from tests.data_corpora import cut_jpeg, documents, make_settings, pairs

ROWS = 8
"""Rows of a step: what 1, 2, 4 and 8 ranks can divide."""


def mixed_settings(folder: Path) -> DataSettings:
    """Two interleaved sources and one of pairs, 2 : 1 : 1, with a bad picture in one."""
    first = documents(50)
    first[7].content[1] = cut_jpeg()
    settings = make_settings(folder, {"a": first, "b": documents(31, "e", 1), "pairs": pairs(40)})
    settings.sources[0].weight = 2.0
    settings.failure_limit = 0.5
    return settings


def feeds(settings: DataSettings, executor: str, ranks: int = 1, state: dict | None = None) -> list[Feed]:
    """One feed a rank, each with its own stream, as in processes of their own."""
    own = replace(settings, executor=executor)
    made = []
    for rank in range(ranks):
        feed = Feed(Stream(own, global_rows=ROWS), Division(rank, ranks, 1, ROWS // ranks))
        if state is not None:
            feed.load_state(state)
        made.append(feed)
    return made


def step(made: list[Feed]) -> tuple[int, Share]:
    """Checksum of the next step, and the share of one rank."""
    shares = [feed.next() for feed in made]
    return checksum_of(shares), shares[0]


def checksums(settings: DataSettings, executor: str, ranks: int = 1, steps: int = 24) -> list[int]:
    """The checksums of the first steps."""
    made = feeds(settings, executor, ranks)
    try:
        return [step(made)[0] for _ in range(steps)]
    finally:
        for feed in made:
            feed.close()
