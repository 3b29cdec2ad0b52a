"""Which part of a step a rank is in, and in some steps what each part takes: time and memory.

Parts are told apart where their methods are called and, in the backward pass, where gradients arrive
at what they returned. That is always on, for the signs of life and for reports of faults; it costs
some calls of Python. Time and memory are measured in chosen steps alone: there the device is waited
for at every border, and communication is told apart at the process groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmi_megatron import platform
from mmi_megatron.train.pulse import Pulse

TOKENIZER, LANGUAGE, MMFS, DECODER = "visual tokenizer", "language model", "MMFS", "image decoder"
DATA, COMMUNICATION, OPTIMIZER, OTHER = "data", "communication", "optimizer", "other"
FORWARD, BACKWARD = "forward", "backward"

COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
"""Methods of a process group that communicate; what is asynchronous is waited for by ``Work.wait``."""


class Anatomy:
    """The parts of this rank's steps.

    Args:
        pulse: gets every part as a sign of life.

    Attributes:
        part: the one that this rank is in, ``image decoder backward``, say.
        failed_in: the innermost part that an error has left, None while there was none.
    """

    def __init__(self, pulse: Pulse | None = None):
        self.pulse = pulse
        self.part = OTHER
        self.failed_in: str | None = None
        self.seconds: dict[str, float] | None = None
        self.peak: dict[str, int] = {}
        self._since = 0.0
        self._started = 0.0

    # Which part

    def attach(self, model: nn.Module) -> None:
        """Tell the parts of a model apart: those of ``MMInterleaved`` that are there."""
        tokenizer = getattr(model, "visual_tokenizer", None)
        language = getattr(model, "language_model", None)
        decoder = getattr(model, "image_decoder", None)
        self._wrap(tokenizer, "forward", TOKENIZER)
        for name in ("embed", "enter", "run", "leave", "forward", "token_losses"):
            self._wrap(language, name, LANGUAGE)
        for name in ("loss", "sample"):
            self._wrap(decoder, name, DECODER)
        for name, module in [] if language is None else list(language.named_modules()):
            if name.endswith(("cross_attention", "mmfs.attention")):
                self._wrap(module, "forward", MMFS, after=LANGUAGE)

    def _wrap(self, owner: Any, name: str, label: str, after: str | None = None) -> None:
        """Put a method inside a part. ``after``: the part whose backward pass goes on after its own."""
        if owner is None or not hasattr(owner, name):
            return
        method = getattr(owner, name)

        @wraps(method)
        def within(*arguments: Any, **named: Any) -> Any:
            with self.inside(f"{label} {_direction()}"):
                returned = method(*arguments, **named)
            self._on_gradient(returned, f"{label} {BACKWARD}")
            self._on_gradient(arguments, f"{after or OTHER} {BACKWARD}")
            return returned

        setattr(owner, name, within)

    def _on_gradient(self, values: Any, label: str) -> None:
        """Enter a part of the backward pass when the gradient of any of these tensors is there."""
        for value in values if isinstance(values, tuple | list) else (values,):
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
                value.register_hook(lambda _, label=label: self.enter(label))

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Be in a part, and then again in the one before."""
        before = self.part
        self.enter(part)
        try:
            yield
        except BaseException:
            self.failed_in = self.failed_in or self.part
            raise
        finally:
            self.enter(before)

    def enter(self, part: str) -> None:
        """Be in another part from here on."""
        if self.seconds is not None:
            self._account()
        self.part = part
        if self.pulse is not None:
            self.pulse.beat(part=part)

    # What the parts take

    def _account(self) -> None:
        """Count what has gone by since the last border to the part that it was in."""
        assert self.seconds is not None
        platform.synchronize()
        now = time.perf_counter()
        self.seconds[self.part] = self.seconds.get(self.part, 0.0) + now - self._since
        self.peak[self.part] = max(self.peak.get(self.part, 0), platform.memory_in_use()[1])
        platform.reset_peak_memory()
        self._since = time.perf_counter()

    @contextmanager
    def step(self, number: int, measured: bool) -> Iterator[None]:
        """One step; what its parts take is in ``seconds`` and ``peak`` then, if it is measured."""
        if self.pulse is not None:
            self.pulse.beat(step=number)
        self.failed_in, self.part = None, OTHER
        if not measured:
            self.seconds = None
            yield
            return
        self.seconds, self.peak = {}, {}
        platform.synchronize()
        platform.reset_peak_memory()
        self._since = time.perf_counter()
        with self._communication():
            yield
        self.enter(OTHER)

    @contextmanager
    def _communication(self) -> Iterator[None]:
        """Tell communication apart from what it is called in.

        Methods are replaced for the time of the step because torch has nothing else that works on every
        backend at no cost: its completion hooks are NCCL's alone, and a dispatch mode (as
        ``parallel.traffic.Sent``) slows down every operation of the step that is measured.
        """
        work = torch._C._distributed_c10d.Work
        # As the classes hold them: what getattr gives would not bind again.
        plain: dict[tuple[type, str], Any] = {
            (dist.ProcessGroup, name): vars(dist.ProcessGroup)[name] for name in COLLECTIVES
        }
        plain[work, "wait"] = vars(work)["wait"]
        for kind, name in plain:
            setattr(kind, name, self._communicating(getattr(kind, name)))
        try:
            yield
        finally:
            for (kind, name), method in plain.items():
                setattr(kind, name, method)

    def _communicating(self, method: Callable) -> Callable:
        @wraps(method)
        def within(*arguments: Any, **named: Any) -> Any:
            with self.inside(COMMUNICATION):
                return method(*arguments, **named)

        return within


def _direction() -> str:
    """``backward`` where a forward pass is repeated within the backward pass (recomputation)."""
    return FORWARD if torch._C._current_graph_task_id() == -1 else BACKWARD


def table(parts: list[dict[str, float]], peaks: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    """What the parts of a step took over the ranks.

    Args:
        parts: of each rank, seconds by part.
        peaks: of each rank, largest memory by part, bytes.

    Returns:
        Of each part the mean and the largest time in seconds, the rank that took longest, and the
        largest memory of any rank in bytes.
    """
    rows = {}
    for part in sorted({name for rank in parts for name in rank}):
        times = [rank.get(part, 0.0) for rank in parts]
        slowest = max(range(len(times)), key=times.__getitem__)
        rows[part] = {
            "mean": sum(times) / len(times),
            "most": times[slowest],
            "slowest_rank": slowest,
            "memory": max(rank.get(part, 0) for rank in peaks),
        }
    return rows


def as_text(
    rows: dict[str, dict[str, float]],
    flops: dict[str, float],
    peak: tuple[float, str] | None,
    ranks: int,
) -> str:
    """The measurements of a step for people.

    Args:
        rows: of ``table``.
        flops: of the whole step, by ``part/forward``, ``part/inputs`` and ``part/weights``.
        peak: operations a second of one rank's device and its name, None where unknown.
        ranks: how many there are.
    """
    whole = sum(row["mean"] for row in rows.values())
    lines = [f"{'part':<26}{'mean s':>10}{'share':>8}{'most s':>10}{'rank':>6}{'memory MiB':>12}"]
    for part, row in sorted(rows.items(), key=lambda entry: -entry[1]["mean"]):
        lines.append(
            f"{part:<26}{row['mean']:>10.4f}{row['mean'] / whole:>8.1%}{row['most']:>10.4f}"
            f"{row['slowest_rank']:>6.0f}{row['memory'] / 2**20:>12.1f}"
        )
    lines += ["", f"{'model FLOPs':<26}{FORWARD:>14}{'to inputs':>14}{'to weights':>14}"]
    for part in dict.fromkeys(name.rpartition("/")[0] for name in flops):
        kinds = [flops[f"{part}/{kind}"] for kind in ("forward", "inputs", "weights")]
        lines.append(f"{part:<26}" + "".join(f"{value:>14.4g}" for value in kinds))
    total = sum(flops.values())
    lines.append(f"{'all':<26}{total:>14.4g}, {total / whole:.4g} a second in this step")
    if peak is not None:
        share = total / whole / (peak[0] * ranks)
        lines.append(
            f"model FLOPs utilisation {share:.1%}, of {ranks} x {peak[0]:.4g} a second ({peak[1]}, bf16)"
        )
    return "\n".join(lines) + "\n"


def straggler(parts: list[dict[str, float]], factor: float) -> str | None:
    """The rank that is slow by its own doing, in words; None where none is.

    Own time is all but communication, in which the others wait for it.

    Args:
        parts: of each rank, seconds by part.
        factor: times the median of the ranks' own time.
    """
    own = [sum(seconds for part, seconds in rank.items() if part != COMMUNICATION) for rank in parts]
    slow = max(range(len(own)), key=own.__getitem__)
    usual = median(own[:slow] + own[slow + 1 :]) if len(own) > 1 else own[0]
    if not factor or own[slow] < factor * usual:
        return None
    others = [rank for number, rank in enumerate(parts) if number != slow]
    excess = {
        part: seconds - median([rank.get(part, 0.0) for rank in others])
        for part, seconds in parts[slow].items()
        if part != COMMUNICATION
    }
    worst = max(excess, key=excess.__getitem__)
    return (
        f"rank {slow} is slow: {own[slow]:.3g} s of its own against {usual:.3g} s (median of the others; "
        f"{min(own):.3g} to {max(own):.3g} s over all), most of it in {worst}: "
        f"{parts[slow][worst]:.3g} s against {median([rank.get(worst, 0.0) for rank in others]):.3g} s"
    )


def median(values: list[float]) -> float:
    """Middle value, the mean of the two middle ones for an even number."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
