"""YAML files from outside: plain data only, and nothing that means something other than it seems to.

YAML 1.1 takes `no` for false, `016` for fourteen, `1:20` for eighty and `2026-01-02` for a date, and PyYAML keeps the last of
equal keys. Here each of these is refused with its line. Numbers are decimal; `1e3`, without a point, is text, as PyYAML has it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from stagevar.errors import ProfileError, UsageError
from stagevar.text_files import read_text

MAX_BYTES = 1_000_000

_DECIMAL_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases, of which a few nested ones can stand for gigabytes, and without surprises."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # says what it is
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _refused(key_node, "merge keys (<<) are not allowed")
            key = self.construct_object(key_node, deep=True)
            try:
                if key in lines:
                    raise _refused(key_node, f"key {key!r:.60} appears twice, first on line {lines[key]}")
            except TypeError:
                raise _refused(key_node, "a list or mapping cannot be a key") from None
            lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def number(self, node: Any) -> int:
        text = self.construct_scalar(node)
        if not _DECIMAL_INT.fullmatch(text):
            raise _refused(
                node,
                f"{text!r:.40} is read as a different number than it looks like; write it in decimal, or in quotes",
            )
        return int(text)

    def fraction(self, node: Any) -> float:
        text = self.construct_scalar(node)
        if not _DECIMAL_FLOAT.fullmatch(text):
            raise _refused(
                node,
                f"{text!r:.40} is read as a different number than it looks like; write it in decimal, or in quotes",
            )
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def truth(self, node: Any) -> bool:
        text = self.construct_scalar(node)
        if text not in _BOOLS:
            raise _refused(node, f"{text!r:.40} is read as true or false; write that, or put it in quotes")
        return _BOOLS[text]

    def date(self, node: Any) -> Any:
        raise _refused(node, f"{self.construct_scalar(node)!r:.40} is read as a date; put it in quotes")


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.fraction)
_Loader.add_constructor("tag:yaml.org,2002:bool", _Loader.truth)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.date)


def _refused(node: Any, reason: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


def parse_yaml(text: str, name: str) -> Any:
    """Plain data from a YAML text, which messages call `name`. Raises ProfileError in one line, with the line's number."""
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # A tag that its value contradicts (`!!int ""`, `!!bool maybe`) comes out of PyYAML as whatever the code met.
        reason = getattr(error, "problem", None) or next(iter(str(error).splitlines()), type(error).__name__)
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ProfileError(f"{name} is not plain YAML: {where}{reason}") from None


def read_yaml(path: str | os.PathLike[str], what: str) -> Any:
    """Plain data from a YAML file, which messages call `what`. Raises ProfileError in one line for anything wrong."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ProfileError(f"{what} {path} is larger than {MAX_BYTES} bytes; it was not written by this program")
        return parse_yaml(read_text(path, what), f"{what} {path}")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ProfileError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ProfileError:
        raise
    except UsageError as error:
        raise ProfileError(str(error)) from None
