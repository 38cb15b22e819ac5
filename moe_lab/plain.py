"""Configurations as plain data, for YAML and JSON, and back with every wrong key named. No torch."""

import difflib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TypeVar

import yaml

from moe_lab.config import MoEConfig, RunConfig
from moe_lab.paths import CourseError

Config = TypeVar("Config")


def to_plain(config: object) -> dict:
    """The configuration as dictionaries, lists, strings and numbers, for JSON and YAML; `from_plain` reads it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in _plain_items(config)}


def _plain_items(config: object) -> list[tuple[str, object]]:
    values = ((item.name, getattr(config, item.name)) for item in fields(config))
    return [(name, to_plain(value) if is_dataclass(value) else value) for name, value in values]


def from_plain(kind: type[Config], values: Mapping, where: str = "") -> Config:
    """The configuration that plain data describe. An expert layer's `d_model` may be left out: it is the model's.

    Args:
        where: the key under which the values stand, for messages.

    Raises:
        ValueError: keys that do not exist, each with the nearest that does; keys that are missing; wrong values.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the configuration'} is {values!r}: expected keys and values ({kind.__name__}).")
    known = {item.name: item for item in fields(kind)}
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"{_in(where)}unknown {_nearest(unknown, list(known))}.")
    types = typing.get_type_hints(kind)
    inherited = {"d_model": values["d_model"]} if "d_model" in values else {}
    made = {}
    for key, value in values.items():
        inner = next((t for t in _alternatives(types[key]) if is_dataclass(t)), None)
        if inner is not None and value is not None:
            given = inherited | dict(value) if inner is MoEConfig and isinstance(value, Mapping) else value
            made[key] = from_plain(inner, given, f"{where}.{key}" if where else key)
        else:
            made[key] = _as_number(value) if float in _alternatives(types[key]) else value
    required = [name for name in known if _is_required(kind, name)]
    if missing := [name for name in required if name not in made]:
        raise ValueError(f"{_in(where)}missing {', '.join(missing)}, which {kind.__name__} needs.")
    try:
        return kind(**made)
    except ValueError as error:
        raise ValueError(f"{_in(where)}{error}") from None


def _in(where: str) -> str:
    return f"{where}: " if where else ""


def _alternatives(annotation: object) -> tuple:
    is_union = isinstance(annotation, UnionType) or typing.get_origin(annotation) is typing.Union
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_required(kind: type, name: str) -> bool:
    item = next(item for item in fields(kind) if item.name == name)
    return item.default is MISSING and item.default_factory is MISSING


def _as_number(value: object) -> object:
    """YAML reads 1e-3 as text, for want of a point: take it as the number it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _nearest(unknown: list[str], known: list[str]) -> str:
    said = []
    for key in unknown:
        close = difflib.get_close_matches(key, known, n=1)
        said.append(f"{key!r} (did you mean {close[0]!r}?)" if close else f"{key!r} (known: {', '.join(known)})")
    return ("keys " if len(said) > 1 else "key ") + ", ".join(said)


class ConfigError(CourseError):
    """A file does not hold a configuration."""


def read_config(path: Path) -> RunConfig:
    """The run that a YAML file describes.

    Raises:
        ConfigError: no file, no YAML, or keys and values that cannot be; the message names them.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    try:
        return from_plain(RunConfig, values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def differences(one: object, other: object, where: str = "") -> list[str]:
    """What differs between two configurations of one kind, a line a field: `training.steps: 100 against 200`."""
    said = []
    for item in fields(one):
        left, right = getattr(one, item.name), getattr(other, item.name)
        name = f"{where}{item.name}"
        if is_dataclass(left) and is_dataclass(right):
            said += differences(left, right, f"{name}.")
        elif left != right:
            said.append(f"{name}: {left!r} against {right!r}")
    return said
