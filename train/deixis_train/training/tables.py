"""Tables of TOML files: one on top of another, single values overridden, and read strictly into dataclasses."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class RecipeError(ValueError):
    """A recipe cannot be read. One line: file, key, what to do."""


def read_table(path: Path, shipped: Mapping[str, Path], depth: int = 0) -> dict[str, Any]:
    """The table of a file, on top of its base: a file beside it, or one of the `shipped` ones by name.

    Raises:
        RecipeError: one line.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    base = table.pop("base", None)
    if base is None:
        return table
    beside = path.with_name(f"{base}.toml")
    if depth > 4:
        raise RecipeError(f"{path}: base: recipes stand on one another more than five deep; do they name each other?")
    if not (beside.is_file() or base in shipped):
        raise RecipeError(f"{path}: base: no recipe {base!r} beside it or among the shipped ones")
    return merge(read_table(beside if beside.is_file() else shipped[base], shipped, depth + 1), table)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: tables are merged, and so are lists of named tables, by name."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge(old, value)
        elif isinstance(old, list) and _named(old) and _named(value):
            by_name = {item["name"]: item for item in old}
            for item in value:
                by_name[item["name"]] = merge(by_name.get(item["name"], {}), item)
            merged[key] = list(by_name.values())
        else:
            merged[key] = value
    return merged


def _named(value: Any) -> bool:
    """Whether this is an array of tables that have names: stages or sources."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "name" in item for item in value)


def override(table: Any, text: str) -> None:
    """Change one value, in place: "key=value" with dots between keys and names. Raises RecipeError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: write it as key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    place: Any = table
    *way, last = key.split(".")
    for step in way:
        if isinstance(place, list):
            place = next((item for item in place if _named(place) and item["name"] == step), None)
        else:
            place = place.setdefault(step, {})
        if not isinstance(place, dict | list):
            raise RecipeError(f"--set {text}: the recipe has no {step!r}")
    if isinstance(place, list):
        raise RecipeError(f"--set {text}: {last!r} must be a key; name the item of {way[-1]} and its key")
    place[last] = parsed


def build(cls: Any, table: Any, file: str, where: str) -> Any:
    """The dataclass `cls` from a table, checked by its type hints.

    Args:
        file, where: named in messages: the file, and the place of the table in it.

    Raises:
        RecipeError: an unknown key, one that is missing, or a value of another type.
    """
    if not isinstance(table, dict):
        raise RecipeError(f"{file}: {where or 'the file'} must be a table")
    label = f"{where} ({table['name']})" if isinstance(table.get("name"), str) else where
    hints, known = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(table) - set(known)):
        key = f"{label}.{unknown[0]}" if label else unknown[0]
        raise RecipeError(f"{file}: unknown key {key}; known are {', '.join(known)}")
    for name, spec in known.items():
        if name not in table and spec.default is MISSING and spec.default_factory is MISSING:
            raise RecipeError(f"{file}: {label + '.' if label else ''}{name} is missing")
    return cls(**{key: _value(hints[key], v, file, f"{label}.{key}".strip(".")) for key, v in table.items()})


def _value(hint: Any, value: Any, file: str, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _value(next(a for a in args if a is not type(None)), value, file, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, file, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{file}: {where} must be a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise RecipeError(f"{file}: {where} must have {len(args)} values")
        return tuple(_value(args[0], item, file, where) for item in value)
    if origin is Literal:
        if value not in args:
            raise RecipeError(f"{file}: {where} is {value!r}; known are {', '.join(map(str, args))}")
        return value
    if origin is not None:  # a mapping
        if not isinstance(value, dict):
            raise RecipeError(f"{file}: {where} must be a table")
        return {k: v if args[1] is Any else _value(args[1], v, file, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)):
        return value
    raise RecipeError(f"{file}: {where} must be {hint.__name__}, not {value!r}")
