"""Strict JSON into dataclasses: types are the schema, and every mismatch is listed. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

_FLOAT_MAX = sys.float_info.max  # JSON's 1e999 reads as infinity, and an int may not fit a float at all


def read_json(data: bytes) -> Any:
    """UTF-8 JSON without duplicate keys, NaN or infinity. Raises ValueError (or RecursionError on absurd nesting)."""
    return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def build(kind: Any, value: Any, problems: list[str]) -> Any:
    """Build the dataclass `kind` from parsed JSON; what does not fit goes to `problems`, and then None comes back."""
    return _parse(kind, value, "", problems)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"duplicate key {reprlib.repr(sorted(name for name, count in counts.items() if count > 1))}")
    return seen


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _parse(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Check `value` (from JSON) against a type hint and build it; every mismatch is added to `problems`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where, problems)
    if origin in (typing.Union, types.UnionType) and types.NoneType in args:
        [kind] = (option for option in args if option is not types.NoneType)
        return None if value is None else _parse(kind, value, where, problems)
    if origin is dict and isinstance(value, dict):
        return {key: _parse(args[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(args[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    accepts: dict[Any, Callable[[Any], bool]] = {
        int: lambda v: isinstance(v, int) and not isinstance(v, bool),
        float: lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= _FLOAT_MAX,
        str: lambda v: isinstance(v, str),
        bool: lambda v: isinstance(v, bool),
    }
    if origin is Literal:
        good = value in args and type(value) in {type(a) for a in args}
    elif origin in (typing.Union, types.UnionType):
        good = any(accepts[option](value) for option in args)
    else:
        good = kind in accepts and accepts[kind](value)
    if not good:
        expected = " or ".join(map(repr, args)) if origin is Literal else getattr(kind, "__name__", str(kind))
        problems.append(f"{where.lstrip('.')}: expected {expected}, found {reprlib.repr(value)}")
    return value


def _parse_dataclass(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where.lstrip('.') or 'manifest'}: expected an object, found {type(value).__name__}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    problems += [f"{f'{where}.{key}'.lstrip('.')}: unknown key" for key in value if key not in fields]
    built: dict[str, Any] = {}
    for name, item in fields.items():
        if name in value:
            built[name] = _parse(hints[name], value[name], f"{where}.{name}", problems)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.append(f"{f'{where}.{name}'.lstrip('.')}: missing")
    return kind(**built) if not problems else None
