"""Loads settings: a preset or a file, then what the command line changes, into a typed ``Config``.

A file may name one other to start from, ``defaults: paper-13b``, and fragments to lay over it, ``use:
[llm/mistral-7b]``: parts of a model under ``presets/fragments``. Values may refer to others,
``${model.vision.image_size}``. Whatever does not exist in the tree, or has the wrong type, is an error
that says where it stands and what was probably meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmi_megatron.checks import check_config
from mmi_megatron.config import Config
from mmi_megatron.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
FRAGMENTS = PRESETS / "fragments"
DEFAULTS, USE = "defaults", "use"
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def fragments() -> list[str]:
    """Names of the fragments that come with the package, such as ``llm/mistral-7b``."""
    return sorted(str(path.relative_to(FRAGMENTS).with_suffix("")) for path in FRAGMENTS.glob("*/*.yaml"))


def load_config(preset: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load, complete and check the settings of a run.

    Args:
        preset: name of a preset, or path of a YAML file (a run's ``config.yaml``, say).
        overrides: ``key=value`` with a dotted key and a value in YAML; entries of lists by number,
            ``data.sources.0.path=/corpus``. ``use=llm/mistral-7b,decoder/sd-1.5`` lays fragments over
            the preset; the other overrides count after them, wherever they stand.

    Raises:
        ConfigError: one line naming the file or the command line, the key, and what to do.
    """
    tree = dataclasses.asdict(Config())
    changes = [_parse(override) for override in overrides]
    used = [layer for key, value in changes if key == USE for layer in _used(value, "command line")]
    for label, layer in [*_layers(preset), *used]:
        _check_names(layer, label)
        tree = _merged(tree, layer)
    for key, value in changes:
        if key != USE:
            _set(tree, key, value)
    _check_names(tree, "command line")
    config = build(Config, _resolved(tree))
    check_config(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the whole tree as YAML; ``load_config`` reads it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(config))


def dump(config: Config) -> str:
    """The whole tree as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, default_flow_style=None, width=100)


# Files


def _locate(name: str | Path, start: Path) -> Path:
    """Path of a preset, or of a file given relative to ``start``."""
    path = PRESETS / f"{name}.yaml"
    if path.is_file():
        return path
    path = start / name
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        raise ConfigError(f"{path}: no such file of settings")
    near = difflib.get_close_matches(str(name), presets(), n=1, cutoff=0)
    raise ConfigError(
        f"no preset or file {str(name)!r}; did you mean {near[0]!r}? Presets: {', '.join(presets())}"
    )


def _layers(name: str | Path) -> list[tuple[str, dict]]:
    """The trees to merge, the one to start from first, each with the name of its file."""
    layers: list[tuple[str, dict]] = []
    seen: list[Path] = []
    start = Path()
    wanted: str | Path | None = name
    while wanted is not None:
        path = _locate(wanted, start).resolve()
        if path in seen:
            raise ConfigError(f"{path}: starts from itself: {' -> '.join(p.name for p in [*seen, path])}")
        seen.append(path)
        tree = _read(path)
        wanted, start = tree.pop(DEFAULTS, None), path.parent
        if not isinstance(wanted, str | None):
            raise ConfigError(f"{path}: {DEFAULTS}: expected the name of one preset or file, got {wanted!r}")
        used = _used(tree.pop(USE, []), str(path))
        layers = [*used, (str(path), tree), *layers]
    return layers


def _used(names: Any, label: str) -> list[tuple[str, dict]]:
    """The trees of fragments, each with the name of its file, given as a list or with commas between."""
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{label}: {USE}: expected names of fragments, got {names!r}")
    for name in names:
        if name not in fragments():
            near = difflib.get_close_matches(name, fragments(), n=1, cutoff=0)[0]
            raise ConfigError(
                f"{label}: {USE}: no fragment {name!r}; did you mean {near!r}? "
                f"Fragments: {', '.join(fragments())}"
            )
    return [(str(path), _read(path)) for path in (FRAGMENTS / f"{name}.yaml" for name in names)]


def _read(path: Path) -> dict:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected settings, 'key: value', got {NAMES.get(type(tree), 'a list')}")
    return tree


def _merged(tree: Any, layer: Any) -> Any:
    """``layer`` over ``tree``: sections are merged, everything else is replaced."""
    if not isinstance(tree, dict) or not isinstance(layer, dict):
        return layer
    return tree | {key: _merged(tree.get(key), value) for key, value in layer.items()}


# The command line


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key=value, as in train.steps=100")
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{key}: {text!r} cannot be read as YAML: {' '.join(str(error).split())}"
        ) from error
    container = OmegaConf.to_container(value, resolve=False)
    return key, typing.cast(dict, container)["value"]


def _set(tree: dict, key: str, value: Any) -> None:
    """Set one value of the tree in place."""
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_index(node, part, parents[:depth])]
    index = _index(node, last, parents)
    node[index] = _merged(node[index], value) if isinstance(node, list) else _merged(node.get(index), value)


def _index(node: Any, part: str, parents: list[str]) -> Any:
    where = ".".join(parents)
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"command line: {where} is a value and has no settings inside, such as {part!r}")
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"command line: {where} has {len(node)} entries, counted from 0: no entry {part!r}")
    return int(part)


def _resolved(tree: dict) -> dict:
    """The tree with its ``${references}`` filled in."""
    try:
        return typing.cast(dict, OmegaConf.to_container(OmegaConf.create(tree), resolve=True))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key}: {reason}; ${{...}} must name another setting in full"
        ) from error


# The typed tree


def build(kind: type, tree: dict) -> Any:
    """Make a dataclass of a plain tree; what the tree leaves out keeps its default.

    Raises:
        ConfigError: for a key the dataclass lacks, and a value of the wrong type.
    """
    _check_names(tree, "settings", kind)
    return _fill(kind(), tree, "")


def _fill(section: Any, tree: dict, path: str) -> Any:
    hints = typing.get_type_hints(type(section))
    values = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        values[key] = _convert(hints[key], value, where, getattr(section, key))
    return dataclasses.replace(section, **values)


def _convert(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    """The value as its type, or the error that says what was expected."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _fill(default if default is not None else typing.cast(type, kind)(), value, path)
    if typing.get_origin(kind) is list and isinstance(value, list):
        (inner,) = typing.get_args(kind)
        return [_convert(inner, entry, f"{path}.{index}") for index, entry in enumerate(value)]
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"{path}: expected {describe(hint)}, got {_shown(value)}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    return f"{value!r} ({NAMES.get(type(value), 'a list')})" if value is not None else "null"


def describe(hint: Any) -> str:
    """A type in words, for messages."""
    if _is_union(hint):
        return " or ".join(describe(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        return f"a list, each entry {describe(inner)}"
    if dataclasses.is_dataclass(hint):
        return "a section with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return NAMES[hint]


def keys(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the tree, dotted, and its type; entries of lists under ``0``."""
    for name, hint in typing.get_type_hints(kind).items():
        yield prefix + name, hint
        inner = typing.get_args(hint)[0] if _is_union(hint) else hint
        if typing.get_origin(inner) is list:
            (inner,), name = typing.get_args(inner), f"{name}.0"
        if dataclasses.is_dataclass(inner):
            yield from keys(typing.cast(type, inner), f"{prefix}{name}.")


def _check_names(tree: dict, label: str, kind: type = Config) -> None:
    """Check that every key of a tree exists, and that sections are sections.

    Raises:
        ConfigError: with the nearest key there is and what it expects.
    """
    known = dict(keys(kind))
    for path, value in _paths(tree):
        general = ".".join("0" if part.isdigit() else part for part in path.split("."))
        if general not in known:
            near = max(known, key=lambda key: _likeness(general, key))
            raise ConfigError(
                f"{label}: unknown setting {path!r}; did you mean {near!r} ({describe(known[near])})?"
            )
        if dataclasses.is_dataclass(known[general]) and not isinstance(value, dict):
            raise ConfigError(f"{label}: {path}: expected {describe(known[general])}, got {_shown(value)}")


def _paths(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a plain tree, dotted, and its value."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        path = f"{prefix}{key}"
        if isinstance(node, dict):
            yield path, value
        if isinstance(value, dict | list):
            yield from _paths(value, f"{path}.")


def _likeness(wrong: str, key: str) -> float:
    """How probably ``key`` was meant: the last part counts for more than the way to it."""
    last = difflib.SequenceMatcher(None, wrong.rpartition(".")[2], key.rpartition(".")[2]).ratio()
    return 0.6 * last + 0.4 * difflib.SequenceMatcher(None, wrong, key).ratio()
