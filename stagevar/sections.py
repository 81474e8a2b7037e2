"""Data from outside as frozen dataclasses: every value is checked against its annotation, at every depth.

Annotations may be str, int, float, bool, Any (plain data), `X | Y`, `X | None`, `Literal`, `tuple[X, ...]`,
`Mapping[str, X]` and dataclasses of such fields.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from stagevar.errors import ProfileError, did_you_mean, hint

Section = TypeVar("Section")
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}


def read_section(kind: type[Section], data: Any, path: str, whole: str = "") -> Section:
    """Plain data as a dataclass.

    Args:
        path: dotted place for messages, "" for the whole file.
        whole: what messages call the whole file.

    Raises:
        ProfileError: one line with the place, the value, and what belongs there or the nearest known key.
    """
    if isinstance(data, kind):
        return data
    place = path or whole
    if not isinstance(data, Mapping):
        raise ProfileError(f"{place} {shown(data)} must be a mapping, not {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ProfileError(f"unknown key {shown(key)} in {place}{hint(shown(key), fields)}")
    hints, values = typing.get_type_hints(kind), {}
    for name, field in fields.items():
        if name in data:
            values[name] = read_value(hints[name], data[name], f"{path}.{name}".lstrip("."))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ProfileError(f"{name} is missing from the {place}")
    return kind(**values)


def read_value(kind: Any, value: Any, path: str) -> Any:
    """A value checked against an annotation. Raises ProfileError naming the place, the value and what belongs there."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, object):
        _check_plain(value, path)
        return value
    if origin is typing.Literal:
        if not any(value is one or (type(value) is type(one) and value == one) for one in inner):
            known = [str(one) for one in inner]
            near = did_you_mean(value, known) if isinstance(value, str) else ""
            raise ProfileError(f"{path} {shown(value)} must be one of {', '.join(known)}{near}")
        return value
    if origin in (types.UnionType, typing.Union):
        return _read_union(inner, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ProfileError(f"{path} {shown(value)} must be a list")
        return tuple(read_value(inner[0], entry, f"{path}[{i}]") for i, entry in enumerate(value))
    if origin is Mapping or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise ProfileError(f"{path} {shown(value)} must be a mapping")
        return {_key(key, path): read_value(inner[1], entry, _below(path, key)) for key, entry in value.items()}
    if dataclasses.is_dataclass(kind):
        return read_section(typing.cast(type, kind), value, path)
    return _read_scalar(kind, value, path)


def _read_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return read_value(others[0], value, path)
    for kind in others:
        try:
            return read_value(kind, value, path)
        except ProfileError:
            continue
    names = " or ".join(_NAMES.get(kind, "a mapping") for kind in others)
    raise ProfileError(f"{path} {shown(value)} must be {names}")


def _read_scalar(kind: type, value: Any, path: str) -> Any:
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and kind is not bool):
        raise ProfileError(f"{path} {shown(value)} must be {_NAMES[kind]}")
    if kind is float:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ProfileError(f"{path} must be a finite number")
    if kind is int and abs(value) >= 2**63:
        raise ProfileError(f"{path} is too large: it does not fit in 64 bits")
    return value


def _check_plain(value: Any, path: str) -> None:
    """Raises ProfileError for anything but mappings with text keys, lists, text, numbers, true, false and empty."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_plain(entry, _below(path, _key(key, path)))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{path}[{index}]")
    elif isinstance(value, int) and not isinstance(value, bool):
        _read_scalar(int, value, path)
    elif not _scalar(value):
        raise ProfileError(f"{path} {shown(value)} must be text, a number, true, false, a list or a mapping")


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise ProfileError(f"{path} has the key {shown(key)}, which must be text")
    return key


def _below(path: str, key: str) -> str:
    """The place of a key below a path, for messages: one line, at most some 200 characters, whatever the key is."""
    place = f"{path}.{key if key.isprintable() and 0 < len(key) <= 60 else shown(key)}"
    return place if len(place) <= 200 else f"{place[:100]}...{place[-97:]}"


def shown(value: Any) -> str:
    """A value for a message: one line, at most 60 characters, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # a number too long for Python to print
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def shortened(error: Exception | str) -> str:
    """A message on one line, its middle left out where it repeats a value of any length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-140:]}"


def section_data(section: Any) -> dict[str, object]:
    """A dataclass as a mapping, without fields that hold nothing (None, or empty if that is the default)."""
    data = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if value is None or (optional and isinstance(value, tuple | Mapping) and not value):
            continue
        data[field.name] = _data(value)
    return data


def _data(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return section_data(value)
    if isinstance(value, Mapping):
        return {key: _data(entry) for key, entry in value.items()}
    return [_data(entry) for entry in value] if isinstance(value, list | tuple) else value


def plain(value: Any) -> Any:
    """Data made of dict, list, str, int, float, bool and None only (tuples and numpy scalars converted, NaN to None)."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return str(value)  # torch's version is a subclass that YAML would tag
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
