"""Dataclasses of results as JSON data and back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

#: Fields that results of before did not have: left out where there is nothing to say.
_LATER = ("heldout_engine", "card")


def record_of(value: Any) -> dict[str, object]:
    """A dataclass of results as JSON data."""

    def without_later(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return {name: value for name, value in pairs if value or name not in _LATER}

    record: dict[str, object] = to_plain(dataclasses.asdict(value, dict_factory=without_later))
    return record


def to_plain(value: Any) -> Any:
    """JSON data: tuples become lists, keys strings, non-finite numbers the strings "inf", "-inf" and "nan"."""
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def build(kind: Any, value: Any) -> Any:
    """Plain JSON data as `kind`: a dataclass of results, tuple[X, ...], dict[str, X], X | None or a plain type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else build(next(a for a in args if a is not type(None)), value)
    if origin is tuple:
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(build(a, v) for a, v in zip(inner, value, strict=True))
    if origin is dict:
        return {k: build(args[1], v) for k, v in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {min(unknown)!r}")
        return kind(**{k: build(hints[k], v) for k, v in value.items()})
    if kind is float:
        return float(value)
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.60} is not {kind.__name__}")
    return value
