"""The report of a conversion: where every tensor went."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """What became of a tensor.

    Attributes:
        theirs: names on the other side; several where they are joined, none where it is computed.
        ours: name in our plain model; empty where it has no place there.
        shape: of ours, or of theirs where there is none.
        dtype: as stored by the side that is read.
        how: what was done besides giving it another name.
    """

    theirs: tuple[str, ...]
    ours: str
    shape: tuple[int, ...]
    dtype: str
    how: str = ""


@dataclass
class Report:
    """A conversion's rows, and what a person should know besides."""

    what: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {"what": self.what, "tensors": [asdict(row) for row in self.rows], "notes": self.notes}

    def as_table(self) -> Table:
        """Everything, for people: rows that differ by the numbers in their names alone are one."""
        table = Table(title=self.what, box=box.SIMPLE_HEAD, padding=(0, 1), caption="; ".join(self.notes))
        table.add_column("theirs", overflow="fold")
        table.add_column("ours", overflow="fold")
        table.add_column("shape", no_wrap=True)
        table.add_column("dtype", no_wrap=True)
        table.add_column("n", justify="right", no_wrap=True)
        table.add_column("how", overflow="fold")
        for row, count in self._folded():
            shape = " x ".join(map(str, row.shape))
            table.add_row("\n".join(row.theirs), row.ours, shape, row.dtype, str(count), row.how)
        return table

    def _folded(self) -> Iterator[tuple[Row, int]]:
        counts: dict[Row, int] = {}
        for row in self.rows:
            theirs = tuple(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in row.theirs)
            ours = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.ours)
            key = Row(theirs, ours, row.shape, row.dtype, row.how)
            counts[key] = counts.get(key, 0) + 1
        yield from counts.items()
