"""A rank's way from its start to its first step: phase by phase, all ranks together.

Before a phase begins all ranks meet, through the store that they also join the process groups by, so that
one that hangs, or has never started, is missed by name: on one machine or many, with the folder of the run
on common storage or not.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from mmi_megatron.errors import ConfigError
from mmi_megatron.train import pulse
from mmi_megatron.train.pulse import Pulse

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)

LOOK = 0.5
"""Seconds between two looks at whether the others have come, at most."""


FAILED = "failed"
"""Key of the store under which a rank says that it will not come any more."""


class Absent(RuntimeError):
    """Ranks did not come to a meeting in time, or will not come; the message names them and what they were
    to do before."""


class SetUp:
    """Takes this rank through its set-up.

    Args:
        pulse: of this rank; gets every phase as a sign of life.
        limit: seconds that a phase may take, on all ranks.
    """

    def __init__(self, pulse: Pulse, limit: float):
        self.pulse, self.limit = pulse, limit
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Store | None = None
        self._meetings = 0
        self._before = pulse.sign.part

    def phase(self, name: str) -> None:
        """Wait until all ranks have come here, having finished the phase before; this one is in the phase
        of this name from now on.

        Raises:
            Absent: when some have not come in time.
        """
        if self.world > 1:
            self.pulse.beat(part=f"waiting for all ranks to finish {self._before}")
            self._meet()
        self.pulse.beat(part=name)
        self._before = name

    def give_up(self, error: BaseException) -> None:
        """Tell those who wait for this rank that it ends with an error; launchers of other nodes may not."""
        if self._store is None or isinstance(error, Absent):  # of which the others know
            return
        from torch.distributed import DistError

        said = (str(error).strip().splitlines() or [""])[0]
        with suppress(DistError):  # the store may be what was lost
            self._store.set(FAILED, f"rank {self.pulse.rank} ended: {type(error).__name__}: {said}")

    def _meet(self) -> None:
        deadline, pause = time.monotonic() + self.limit, 0.01
        if self._store is None:
            self._store = self._join(deadline)
        store, number = self._store, self._meetings
        self._meetings += 1
        store.set(f"{number}/{self.pulse.rank}", "")
        if store.add(f"{number}/come", 1) == self.world:
            store.set(f"{number}/all", "")
        while not store.check([f"{number}/all"]):
            if store.check([FAILED]):
                said = store.get(FAILED).decode()
                time.sleep(pulse.COURTESY)
                raise Absent(f"set-up: {said}")
            if time.monotonic() > deadline:
                self._miss([rank for rank in range(self.world) if rank != self.pulse.rank])
            time.sleep(pause)
            pause = min(2 * pause, LOOK)
            self.pulse.beat()

    def _join(self, deadline: float) -> Store:
        """The store of this job: torchrun's or our launcher's, else one that rank 0 holds, as in torch."""
        from torch.distributed import PrefixStore, TCPStore

        unset = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if unset:
            raise ConfigError(
                f"{' and '.join(unset)} must name rank 0's machine and a free port of it where WORLD_SIZE is "
                "set; torchrun sets them"
            )
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        holds = self.pulse.rank == 0 and not agents
        if not holds:
            self._reach(host, port, deadline, "the process that started the job" if agents else "rank 0")
        # Clients find it at once; rank 0's own serves the process groups too (multi_tenant).
        store = TCPStore(
            host,
            port,
            self.world,
            is_master=holds,
            timeout=timedelta(seconds=self.limit),
            wait_for_workers=False,
            multi_tenant=True,
        )
        return PrefixStore(f"set-up/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _reach(self, host: str, port: int, deadline: float, who: str) -> None:
        """Wait until somebody listens there."""
        while True:
            try:
                socket.create_connection((host, port), timeout=LOOK).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Absent(
                        f"set-up: {who} cannot be reached at {host}:{port} (MASTER_ADDR, MASTER_PORT) within "
                        f"{self.limit:g} s (train.setup_timeout): {error}"
                    ) from error
            time.sleep(LOOK)
            self.pulse.beat()

    def _miss(self, others: Sequence[int]) -> None:
        """Raise what names the ranks that have not come. The first that has come says it first."""
        absent = self._not_there(others)
        if not absent:  # they came in the last moment
            return
        come = set(range(self.world)) - set(absent)
        if self.pulse.rank != min(come):
            time.sleep(pulse.COURTESY)
        signs = {rank: pulse.read(self.pulse.folder, rank) for rank in absent}
        said = "; ".join(f"rank {rank} {_last(sign)}" for rank, sign in signs.items())
        names = f"{pulse.ranks_in_words(absent)} of {self.world} did not finish {self._before}"
        raise Absent(f"set-up: {names} within {self.limit:g} s (train.setup_timeout): {said}")

    def _not_there(self, ranks: Sequence[int]) -> list[int]:
        """Those of some ranks that have not come to the meeting, in few requests however many ranks."""
        assert self._store is not None
        if not ranks or self._store.check([f"{self._meetings - 1}/{rank}" for rank in ranks]):
            return []
        if len(ranks) == 1:
            return list(ranks)
        half = len(ranks) // 2
        return self._not_there(ranks[:half]) + self._not_there(ranks[half:])


def _last(sign: pulse.Sign | None) -> str:
    if sign is None:
        return "has given no sign of life in this run's folder"
    return f"was last at {sign}, {sign.age:.0f} s ago"
