"""The parameters that a search may vary: which values each may take, and how a sampler sees them. No torch, no optuna."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stagevar.errors import UsageError, did_you_mean, hint
from stagevar.schedule import ACCELERATORS, BOTH, PRECISIONS, PROJECTIONS, accelerator_names

NEVER = "never"
Value = int | float | str


@dataclass(frozen=True)
class Rule:
    """Which values a parameter may take: numbers of one kind between two bounds, or words."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()


#: Every parameter that a space may vary.
RULES = {
    "structure_end": Rule(int, 1),
    "cfg_delay": Rule(int, 0, words=(NEVER,)),
    "branch": Rule(str, words=BOTH),
    "rank_ratio": Rule(float, 0.001, 1),
    "rank_decay": Rule(float, 0.01, 1),
    "rank_delay": Rule(int, 0),
    "projection": Rule(str, words=PROJECTIONS),
    "rope": Rule(str, words=("first", "index")),
    "site": Rule(str, words=("chunk", "trunk")),
    "skip_last": Rule(int, 0),
    "skip_inner": Rule(int, 0),
    "fuse_layer": Rule(int, 0),
    "accelerator": Rule(str, words=ACCELERATORS),
    "precision": Rule(str, words=PRECISIONS),
}
#: Values of the parameters that a space does not list.
DEFAULTS: dict[str, Value] = {
    "cfg_delay": NEVER,
    "branch": "uncond",
    "rank_ratio": 1.0,
    "rank_decay": 1.0,
    "rank_delay": 0,
    "projection": "gaussian",
    "rope": "first",
    "site": "chunk",
    "skip_last": 0,
    "skip_inner": 0,
    "fuse_layer": 0,
    "accelerator": "stagevar",
    "precision": "model",
}


@dataclass(frozen=True)
class Parameter:
    """One searched parameter.

    Its `kind` is "int" or "float" between `low` and `high`, on a logarithmic axis if `log`; "ordered" for numbers in
    ascending order, perhaps with "never" last, searched by position; or "choice" for words without an order.
    """

    name: str
    kind: str
    low: float = 0
    high: float = 0
    log: bool = False
    values: tuple[Value, ...] = ()

    @property
    def choices(self) -> tuple[Value, ...] | None:
        """Every value that it may take, in order; None if it is continuous."""
        if self.values:
            return self.values
        return tuple(range(int(self.low), int(self.high) + 1)) if self.kind == "int" else None

    def encode(self, value: Value) -> Value:
        """A value as the sampler sees it; the nearest possible one if it lies outside."""
        if self.kind == "choice":
            return value if value in self.values else self.values[0]
        if self.kind == "ordered":
            if value == NEVER:
                return len(self.values) - 1
            return min(range(len(self.values)), key=lambda i: abs(as_number(self.values[i]) - as_number(value)))
        clipped = min(max(as_number(value), self.low), self.high)
        return round(clipped) if self.kind == "int" else clipped

    def to_data(self) -> Any:
        """The parameter as a search-space file writes it."""
        if self.values:
            return list(self.values)
        return {"low": self.low, "high": self.high, **({"log": True} if self.log else {})}

    def decode(self, raw: Value) -> Value:
        """The value that the sampler's choice stands for."""
        return self.values[int(raw)] if self.kind == "ordered" else raw


def checked_mapping(data: Any, what: str, known: Sequence[str]) -> dict[str, object]:
    """`data`, unchanged. Raises UsageError naming `what` if it is not a mapping or has a key that is not in `known`."""
    if not isinstance(data, dict):
        raise UsageError(f"search space: {what} must be a mapping with {', '.join(known)}, not {type(data).__name__}")
    for key in data:
        if key not in known:
            raise UsageError(f"search space: unknown key {key!r} in {what}{hint(key, known)}")
    return data


def as_number(value: Any) -> float:
    """A value on the number axis, where "never" comes last."""
    return math.inf if value == NEVER else float(value)


def _check(name: str, value: Any) -> Value:
    rule = RULES[name]
    if name == "accelerator":
        rule = dataclasses.replace(rule, words=accelerator_names())
    if isinstance(value, str) and value in rule.words:
        return value
    valid = not isinstance(value, bool) and isinstance(value, int if rule.kind is int else int | float)
    if rule.kind is str or not valid or not rule.low <= value <= rule.high:
        words = ", ".join(rule.words)
        span = (
            ""
            if rule.kind is str
            else f"from {rule.low:g} to {rule.high:g}"
            if rule.high < math.inf
            else f">= {rule.low:g}"
        )
        nearest = did_you_mean(value, rule.words) if rule.kind is str else ""
        kind = "" if rule.kind is str else "a whole number " if rule.kind is int else "a number "
        raise UsageError(
            f"search space: {name} {value!r} must be {kind}{span}{' or ' if words and span else ''}{words}{nearest}"
        )
    checked: Value = rule.kind(value)
    return checked


def read_parameter(name: str, data: Any) -> Parameter:
    """A parameter from a search-space file's range or list. Raises UsageError naming the parameter, the value and the fix."""
    rule = RULES[name]
    if isinstance(data, list):
        if not data:
            raise UsageError(f"search space: {name} has an empty list; give at least one value")
        values = tuple(_check(name, value) for value in data)
        if len(set(values)) < len(values):
            raise UsageError(f"search space: {name} lists a value twice")
        if rule.kind is str:
            return Parameter(name, "choice", values=values)
        return Parameter(name, "ordered", values=tuple(sorted(values, key=as_number)))
    if isinstance(data, dict) and rule.kind is not str:
        data = checked_mapping(data, name, ("low", "high", "log"))
        for bound in ("low", "high"):
            if bound not in data:
                raise UsageError(f"search space: {name} has no {bound}; write {{low: ..., high: ...}} or a list")
        low, high, log = _check(name, data["low"]), _check(name, data["high"]), data.get("log", False)
        if isinstance(low, str) or isinstance(high, str) or low > high:
            raise UsageError(f"search space: {name} runs from {low!r} to {high!r}; low must not exceed high")
        if not isinstance(log, bool) or (log and low <= 0):
            raise UsageError(f"search space: {name} log {log!r} must be true or false, and true needs low above 0")
        return Parameter(name, "int" if rule.kind is int else "float", low, high, log)
    shape = "a list of words" if rule.kind is str else "{low: ..., high: ...} or a list"
    raise UsageError(f"search space: {name} {data!r:.60} must be {shape}")
