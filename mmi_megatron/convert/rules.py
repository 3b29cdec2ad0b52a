"""Rules between another program's tensors and ours, one table for both directions.

What is loaded by a table is what is exported by it. A rule names one tensor of ours and the ones it
is made of; constants are tensors that the other side stores and we compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mmi_megatron.errors import ConfigError

CONSTANT_TOLERANCE = 2e-3
"""A stored constant may have been rounded to half precision or bfloat16 relative to 1."""


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ConvertError(ConfigError):
    """Weights that cannot be converted; the message names the file and the tensors."""


def dtype_of(name: str | None) -> torch.dtype | None:
    """A dtype by its short name, None for None. Raises ConvertError for one that is not in ``DTYPES``."""
    if name is not None and name not in DTYPES:
        raise ConvertError(f"--dtype {name!r}: expected one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type. Raises ConvertError when a number of it is beyond that type's largest."""
    made = tensor.to(dtype)
    if made.dtype != tensor.dtype and made.isinf().any() and not tensor.isinf().any():
        largest = tensor.abs().max().item()
        raise ConvertError(
            f"{name}: {largest:g} in it is beyond {str(dtype).removeprefix('torch.')}; keep its type"
        )
    return made


@dataclass(frozen=True)
class Rule:
    """How one tensor of ours is made of tensors of theirs.

    Attributes:
        ours: our name.
        theirs: their names, in the order ``load`` takes and ``save`` gives them.
        load: our tensor from theirs.
        save: theirs from ours.
        how: what is done to them, for people; nothing where only the name changes.
    """

    ours: str
    theirs: tuple[str, ...]
    load: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]
    save: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor]
    how: str = ""


@dataclass
class Table:
    """Rules, and what is not covered by rules.

    Attributes:
        rules: of every tensor that both sides hold.
        constants: their name to the value we compute; may be absent there, and is checked where present.
        ours_only: names of ours that the other side does not hold; they keep their values.
        legacy: constants that only older files hold: checked where present, never written.
    """

    rules: list[Rule] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    ours_only: set[str] = field(default_factory=set)
    legacy: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Table) -> Table:
        return Table(
            self.rules + other.rules,
            self.constants | other.constants,
            self.ours_only | other.ours_only,
            self.legacy | other.legacy,
        )

    def under(self, ours: str, theirs: str) -> Table:
        """The same table below a prefix on either side."""
        rules = [
            replace(rule, ours=ours + rule.ours, theirs=tuple(theirs + name for name in rule.theirs))
            for rule in self.rules
        ]
        constants = {theirs + name: value for name, value in self.constants.items()}
        legacy = {theirs + name: value for name, value in self.legacy.items()}
        return Table(rules, constants, {ours + name for name in self.ours_only}, legacy)


def rename(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,))


def renames(pairs: Mapping[str, str], parts: Iterable[str] = ("weight", "bias")) -> list[Rule]:
    """Modules of the same kind on both sides: each part under the other name."""
    return [rename(f"{ours}.{part}", f"{theirs}.{part}") for ours, theirs in pairs.items() for part in parts]


def unsqueezed(ours: str, theirs: str, axes: int) -> Rule:
    """A tensor that the other side stores with ``axes`` axes of length 1 in front."""

    def save(tensor: Tensor) -> list[Tensor]:
        return [tensor.reshape(*[1] * axes, *tensor.shape)]

    return Rule(ours, (theirs,), lambda tensors: tensors[0].flatten(0, axes), save)


def squeezed(ours: str, theirs: str, axes: int) -> Rule:
    """A tensor that we store with ``axes`` axes of length 1 in front."""

    def load(tensors: list[Tensor]) -> Tensor:
        return tensors[0].reshape(*[1] * axes, *tensors[0].shape)

    return Rule(ours, (theirs,), load, lambda tensor: [tensor.flatten(0, axes)])


def joined(ours: str, theirs: Iterable[str]) -> Rule:
    """Tensors of equal shape that we keep as one, along the first axis."""
    names = tuple(theirs)
    return Rule(ours, names, torch.cat, lambda tensor: list(tensor.chunk(len(names))), "joined")


def grown(ours: str, theirs: str, rows: int, text_rows: int, mean: bool = False) -> Rule:
    """A table over the vocabulary, of ``rows`` rows with us and ``text_rows`` there.

    The rows for the image tokens and the padding are zero, or, with ``mean``, the mean of the others:
    what a new word starts as in transformers' ``resize_token_embeddings``, without its noise.
    """

    def load(tensors: list[Tensor]) -> Tensor:
        text = tensors[0]
        new = text.float().mean(0).to(text.dtype) if mean else text.new_zeros(text.shape[1:])
        return torch.cat([text, new.expand(rows - text_rows, *text.shape[1:])])

    how = f"{text_rows} rows grown to {rows}" if rows != text_rows else ""
    return Rule(ours, (theirs,), load, lambda tensor: [tensor[:text_rows]], how)


@torch.no_grad()
def load(module: nn.Module, state: Mapping[str, Tensor], table: Table, what: str) -> None:
    """Fill a module from the other side's tensors.

    Args:
        module: ours; takes the values in its own dtype.
        state: their name to tensor.
        table: covers every name of either side.
        what: what is being loaded, for errors.

    Raises:
        ValueError: naming their tensors that are missing, left over, of another shape, or, for a
            constant, of another value. The module is unchanged then.
    """
    targets = module.state_dict()
    missing, extra = unmatched(set(targets), set(state), table, what)
    if missing or extra:
        raise ValueError(f"{what}: missing {missing[:8] or 'nothing'}, left over {extra[:8] or 'nothing'}")
    for rule in table.rules:
        for name, like in zip(rule.theirs, rule.save(targets[rule.ours]), strict=True):
            _same_shape(what, name, state[name].shape, like.shape)
    for name, value in (table.constants | table.legacy).items():
        if name in state:
            check_constant(what, name, state[name], value)
    for rule in table.rules:
        targets[rule.ours].copy_(rule.load([state[name] for name in rule.theirs]))


def unmatched(ours: set[str], theirs: set[str], table: Table, what: str) -> tuple[list[str], list[str]]:
    """Their names that the table wants and are not there, and those that it has no use for.

    Raises:
        ValueError: when the table does not cover every tensor of ours exactly.
    """
    uncovered = ours ^ ({rule.ours for rule in table.rules} | table.ours_only)
    if uncovered:
        raise ValueError(f"{what}: the table of names does not fit our module: {sorted(uncovered)[:8]}")
    wanted = [name for rule in table.rules for name in rule.theirs]
    missing = [name for name in wanted if name not in theirs]
    return missing, sorted(theirs - set(wanted) - set(table.constants) - set(table.legacy))


def check_constant(what: str, name: str, found: Tensor, value: Tensor) -> None:
    """Refuse a stored constant that is not the one we compute.

    Raises:
        ValueError: naming it.
    """
    _same_shape(what, name, found.shape, value.shape)
    if not torch.allclose(found.to(value), value, rtol=CONSTANT_TOLERANCE, atol=CONSTANT_TOLERANCE):
        raise ValueError(f"{what}: {name} is a constant of the model and has another value there")


def _same_shape(what: str, name: str, found: Sequence[int], like: Sequence[int]) -> None:
    if tuple(found) != tuple(like):
        raise ValueError(f"{what}: {name} has shape {tuple(found)}, expected {tuple(like)}")


@torch.no_grad()
def save(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The other side's tensors from ours; constants are computed anew."""
    saved = dict(table.constants)
    for rule in table.rules:
        saved |= dict(zip(rule.theirs, rule.save(state[rule.ours]), strict=True))
    return saved
