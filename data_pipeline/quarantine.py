"""The ledger of bad samples: nothing is left out without being counted and named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipeline.errors import DataError, TooManyFailures

MINIMUM_FAILURES = 8
"""Below this many bad samples a source never stops the run, whatever their fraction."""
MAX_LINES = 100_000
"""Bad samples that are named; all are counted."""


@dataclass(frozen=True)
class Failure:
    """One bad sample: where it is, why it is left out (``reason``, counted) and what was found."""

    source: str
    shard: str
    key: str
    reason: str
    detail: str = ""


@dataclass
class Ledger:
    """Failures of a run.

    Attributes:
        limit: fraction of a source's samples that may be bad.
        lines: each bad sample once, the first ``MAX_LINES`` of them.
        failed: times a sample was bad, by (source, reason); a sample drawn twice counts twice.
        seen: samples looked at, by source.
        unnamed: bad samples beyond the lines.
    """

    limit: float
    lines: list[Failure] = field(default_factory=list)
    failed: Counter = field(default_factory=Counter)
    seen: Counter = field(default_factory=Counter)
    unnamed: int = 0
    _known: set = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        """Bad samples, each once."""
        return len(self.lines) + self.unnamed

    def record(
        self, seen: Mapping[str, int], failures: Sequence[Failure], reasons: Mapping[str, int] | None = None
    ) -> None:
        """Add samples looked at and the bad ones among them.

        Args:
            seen: samples looked at, by source.
            failures: the bad ones.
            reasons: how many there were of the one source in ``seen``, by reason, where ``failures``
                names only some of them.

        Raises:
            TooManyFailures: when a source exceeds the limit.
        """
        self.seen.update(seen)
        for failure in failures:
            self.failed[failure.source, failure.reason] += 1
            if failure in self._known:
                continue
            if len(self.lines) == MAX_LINES:
                self.unnamed += 1
                continue
            self._known.add(failure)
            self.lines.append(failure)
        if reasons is not None:
            (source,) = seen
            named = Counter(failure.reason for failure in failures)
            for reason, count in reasons.items():
                self.failed[source, reason] += count - named[reason]
                self.unnamed += count - named[reason]
        for source in {failure.source for failure in failures}:
            self._check(source)

    def counts(self, source: str) -> dict[str, int]:
        """Bad samples of a source by reason."""
        return {reason: n for (name, reason), n in sorted(self.failed.items()) if name == source and n}

    def totals(self) -> dict[str, dict[str, int]]:
        """Of each source the samples looked at (``seen``) and the bad ones by reason."""
        return {source: {"seen": seen, **self.counts(source)} for source, seen in self.seen.items()}

    def _check(self, source: str) -> None:
        counts = self.counts(source)
        bad, seen = sum(counts.values()), max(self.seen[source], 1)
        if bad >= MINIMUM_FAILURES and bad > self.limit * seen:
            last = next((line for line in reversed(self.lines) if line.source == source), None)
            where = f"; the last: {last.shard}, key {last.key!r}: {last.reason} {last.detail}" if last else ""
            reasons = ", ".join(f"{reason} {n}" for reason, n in counts.items())
            raise TooManyFailures(
                f"source {source!r}: {bad} of {seen} samples are bad, more than data.failure_limit="
                f"{self.limit} allows ({reasons}){where}".rstrip()
            )


class LedgerFile:
    """The ledger of a run on disk, as far as one process writes it.

    ``NAME.jsonl`` has a line for each bad sample, ``{"step", "source", "shard", "key", "reason", "detail"}``,
    each once, also when the run is resumed and meets it again; ``NAME.json`` the numbers by source and reason
    (``Ledger.totals``) since the process began.

    Args:
        folder: made when there is something to write.
        name: of the process.
    """

    def __init__(self, folder: Path, name: str):
        self.lines, self.counts = folder / f"{name}.jsonl", folder / f"{name}.json"
        self._known: set[str] | None = None

    def add(self, step: int, failures: Sequence[Failure], totals: Mapping[str, Mapping[str, int]]) -> None:
        """Write what was found up to a step.

        Raises:
            DataError: when it cannot be written.
        """
        if not failures:
            return
        try:
            self.lines.parent.mkdir(parents=True, exist_ok=True)
            known = self._read() if self._known is None else self._known
            with self.lines.open("a", encoding="utf-8") as file:
                for failure in failures:
                    text = json.dumps(asdict(failure), ensure_ascii=False)
                    if text not in known:
                        file.write(f'{{"step": {step}, {text[1:]}\n')
                        known.add(text)
            draft = self.counts.with_suffix(".tmp")
            draft.write_text(json.dumps(totals, ensure_ascii=False), encoding="utf-8")
            draft.replace(self.counts)
        except OSError as error:
            raise DataError(
                f"{self.lines.parent}: the ledger of bad samples cannot be written ({error})"
            ) from None
        self._known = known

    def _read(self) -> set[str]:
        """The samples of an earlier process; a line cut off by a kill is taken away."""
        if not self.lines.exists():
            return set()
        text = self.lines.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            self.lines.write_text(text, encoding="utf-8")
        return {"{" + line.split(", ", 1)[1] for line in text.splitlines()}
