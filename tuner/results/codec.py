"""Dataclasses of results as JSON data and back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from tuner.results.candidate import Candidate, Failed, Finalist, Measured, Pruned, Unmeasured

#: Fields that older results do not have: left out when empty.
_LATER = ("heldout_engine", "card", "error_share", "proved_by")
#: Fields of a candidate on disk, whatever its class, with the value to write if the class lacks the field.
_OF_CANDIDATE: dict[str, object] = {
    "key": None,
    "params": None,
    "schedule": None,
    "steps": None,
    "accelerator": None,
    "source": None,
    "trial": None,
    "state": None,
    "skipped_scales": None,
    "processed_tokens": None,
    "latency": None,
    "values": {},
    "differences": {},
    "verdicts": (),
    "feasible": False,
    "verification": None,
    "error": None,
    "stopped_early": None,
}


def record_of(value: Any) -> dict[str, object]:
    """A dataclass of results as JSON data."""
    record: dict[str, object] = to_plain(value)
    return record


def to_plain(value: Any) -> Any:
    """JSON data: dataclasses become mappings, tuples lists, keys strings, non-finite numbers "inf", "-inf" and "nan"."""
    if isinstance(value, Candidate):
        fields = {name: getattr(value, name, absent) for name, absent in _OF_CANDIDATE.items()}
        return {name: to_plain(entry) for name, entry in fields.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: to_plain(entry) for name, entry in entries.items() if entry or name not in _LATER}
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
    if kind in (Any, object):
        return value
    if origin in (types.UnionType, typing.Union):
        kinds = [a for a in args if a is not type(None)]
        # Several plain types, or classes of candidates, which their record tells apart.
        return value if value is None or (kinds[0] in (int, float, str) and len(kinds) > 1) else build(kinds[0], value)
    if origin is tuple:
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(build(a, v) for a, v in zip(inner, value, strict=True))
    if origin is dict:
        return {k: build(args[1], v) for k, v in value.items()}
    if typing.is_typeddict(kind):
        return _typed(dict, value)
    if isinstance(kind, type) and issubclass(kind, Candidate):
        return _candidate(value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"{kind.__name__} has no field {min(unknown)!r}")
        return kind(**{k: build(hints[k], v) for k, v in value.items()})
    if kind is float:
        return float(value)
    return _typed(kind, value)


def _typed(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.60} is not {kind.__name__}")
    return value


def _candidate(record: dict[str, object]) -> Candidate:
    """A candidate of the class that its record implies; on disk all classes have the same fields."""
    unknown = set(record) - set(_OF_CANDIDATE)
    if unknown:
        raise ValueError(f"Candidate has no field {min(unknown)!r}")
    kind: type[Candidate] = Measured
    if record["state"] != Measured.state:
        kind = Failed if record["state"] == Failed.state else Unmeasured
    elif record.get("verification") is not None:
        kind = Finalist
    elif record.get("stopped_early") is not None:
        kind = Pruned
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: build(hints[name], value) for name, value in record.items() if name in names})
