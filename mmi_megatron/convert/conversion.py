"""Other programs' weights to a sharded checkpoint: what is read, how names map, what is written.

A ``Conversion`` is all that is known before a single value is read. ``matched`` checks it completely;
only then is anything written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mmi_megatron.config import LanguageConfig
from mmi_megatron.convert import sharded
from mmi_megatron.convert.report import Report, Row
from mmi_megatron.convert.rules import ConvertError, Rule, Table, cast, check_constant, unmatched
from mmi_megatron.convert.source import Source

SETTINGS, REPORT = "settings.yaml", "report.json"


class Sources(Mapping[str, Tensor]):
    """Several sources under one roof, each under a prefix, and names changed on the way.

    Attributes:
        like: name to a tensor of the same shape and dtype without values.
        stored_as: name to the one that its file has, below the prefix.
        order: name to where it lies, for reading file by file.

    Args:
        sources: prefix to source.
        renamed: to be applied to a name below its prefix.

    Raises:
        ConvertError: when two names become one.
    """

    def __init__(self, sources: Mapping[str, Source], renamed: Callable[[str], str] = lambda name: name):
        self.sources = sources
        self._of: dict[str, tuple[Source, str]] = {}
        self.stored_as: dict[str, str] = {}
        for prefix, source in sources.items():
            for name in source:
                new = prefix + renamed(name)
                if new in self._of:
                    raise ConvertError(f"{source.file_of[name]}: {name} is there twice, as {new}")
                self._of[new] = source, name
                self.stored_as[new] = prefix + name
        self.like = {name: source.like[old] for name, (source, old) in self._of.items()}
        files = [file for source in sources.values() for file in source.files]
        self.order = {
            name: (files.index(source.file_of[old]), place)
            for place, (name, (source, old)) in enumerate(self._of.items())
        }

    def __getitem__(self, name: str) -> Tensor:
        source, old = self._of[name]
        return source[old]

    def __contains__(self, name: object) -> bool:
        return name in self._of  # the inherited one would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


@dataclass
class Conversion:
    """A conversion before it is done.

    Attributes:
        what: for people, with the path.
        source: the tensors that are read.
        table: their names against those of our plain model.
        targets: tensors of our plain model that are made, without values.
        settings: of ours that the source fixes, as a tree under ``model``.
        language: settings of the language model, where it is converted.
        left_out: pattern of a name of theirs to why it has no place with us.
        computed: our name to a tensor that is no tensor of theirs, and what it is of.
        notes: what a person should know.
        extra: what an export needs besides the settings.
    """

    what: str
    source: Sources
    table: Table
    targets: dict[str, Tensor]
    settings: dict[str, Any]
    language: LanguageConfig | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    computed: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def matched(conversion: Conversion) -> Report:
    """Check names, shapes, dtypes and constants, and say where every tensor goes.

    Raises:
        ConvertError: naming what does not fit. Nothing has been written then.
    """
    what, source, table = conversion.what, conversion.source, conversion.table
    left = {name: why for name in source if (why := _reason(name, conversion.left_out))}
    found = set(source) - set(left)
    missing, extra = unmatched(set(conversion.targets) - set(conversion.computed), found, table, what)
    if missing or extra:
        raise ConvertError(
            f"{what}: {len(missing)} tensors missing {_some(missing)}, {len(extra)} left over {_some(extra)}"
        )
    rows = [_checked(conversion, rule) for rule in table.rules]
    try:
        for name, value in (table.constants | table.legacy).items():
            if name in source:
                check_constant(what, name, source[name], value)
                theirs = (source.stored_as[name],)
                rows.append(Row(theirs, "", tuple(value.shape), _short(value), "a constant, checked"))
    except ValueError as error:
        raise ConvertError(str(error)) from None
    for name, why in left.items():
        like = source.like[name]
        theirs = (source.stored_as[name],)
        rows.append(Row(theirs, "", tuple(like.shape), _short(like), f"left out: {why}"))
    for ours, (tensor, origin) in conversion.computed.items():
        rows.append(Row((), ours, tuple(tensor.shape), _short(tensor), origin))
    return Report(what, rows, conversion.notes)


def _reason(name: str, left_out: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in left_out.items() if re.match(pattern, name)), None)


def _some(names: list[str]) -> str:
    return f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else ""


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _checked(conversion: Conversion, rule: Rule) -> Row:
    """The row of a rule, its shapes and dtypes checked."""
    what, ours = conversion.what, conversion.targets[rule.ours]
    wanted = rule.save(ours)
    for name, like in zip(rule.theirs, wanted, strict=True):
        found = conversion.source.like[name]
        if found.shape != like.shape:
            hint = " (transposed?)" if found.shape == like.shape[::-1] else ""
            raise ConvertError(
                f"{what}: {name} has shape {tuple(found.shape)}, expected {tuple(like.shape)}{hint}"
            )
        if found.is_floating_point() != ours.is_floating_point():
            raise ConvertError(f"{what}: {name} is {_short(found)}, expected {_short(ours)} or the like")
    kinds = {_short(conversion.source.like[name]) for name in rule.theirs}
    if len(kinds) > 1:
        raise ConvertError(
            f"{what}: {', '.join(rule.theirs)} are joined but of different types {sorted(kinds)}"
        )
    theirs = tuple(conversion.source.stored_as[name] for name in rule.theirs)
    return Row(theirs, rule.ours, tuple(ours.shape), kinds.pop(), rule.how)


def write(
    conversion: Conversion, out: Path, layout: sharded.Layout, dtype: torch.dtype | None = None
) -> Report:
    """Check a conversion and write it as a checkpoint that ``train.init_from`` takes.

    One tensor of ours is in memory at a time, with those of theirs that it is made of.

    Args:
        conversion: what.
        out: folder of the checkpoint, which must not exist.
        layout: into which files and slices it is divided.
        dtype: of all floating-point tensors; None keeps them as they are.

    Raises:
        ConvertError: naming what does not fit; ``out`` does not exist then.
    """
    report = matched(conversion)
    rules = {rule.ours: rule for rule in conversion.table.rules}

    def kind(like: Tensor) -> torch.dtype:
        return dtype if dtype is not None and like.is_floating_point() else like.dtype

    def read(name: str) -> Tensor:
        if name in conversion.computed:
            value = conversion.computed[name][0]
        else:
            rule = rules[name]
            value = rule.load([conversion.source[theirs] for theirs in rule.theirs])
        if value.shape != conversion.targets[name].shape:
            raise ConvertError(f"{name}: made of shape {tuple(value.shape)}, which is a slip in its rule")
        return cast(name, value, kind(value))

    order = conversion.source.order
    names = [rule.ours for rule in conversion.table.rules] + list(conversion.computed)
    things = sharded.entries(names, conversion.language)
    things.sort(
        key=lambda entry: min(
            (order[n] for p in entry.names if p in rules for n in rules[p].theirs), default=(0, 0)
        )
    )
    extra = {"converted": conversion.what, "settings": conversion.settings} | conversion.extra
    files = {
        SETTINGS: yaml.safe_dump({"model": conversion.settings}, sort_keys=False, default_flow_style=None),
        REPORT: json.dumps(report.as_json(), indent=1),
    }
    sharded.write(out, things, conversion.targets, read, layout, extra, files)
    return report
