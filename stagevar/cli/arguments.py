"""The parser of every command, whose errors are one line, and the types of its options' values."""

from __future__ import annotations

import argparse
import math
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stagevar.errors import UsageError, did_you_mean, hint
from stagevar.sections import shortened, shown

#: The largest count that an option takes; more would fill the memory before anything runs.
MOST = 1_000_000
#: How alike an unknown option and a suggested one are at least, from 0 to 1.
CLOSE = 0.72


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with exit code 2, for `report_errors` to print. Options are not abbreviated."""

    _verbs: Any = None

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def add_subparsers(self, **options: Any) -> Any:
        """As argparse's; `parse` has each verb parse its own arguments."""
        self._verbs = super().add_subparsers(**options)
        return self._verbs

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with the message, instead of exiting."""
        raise UsageError(shortened(f"{message} (see {self.prog} --help)"))

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments; an unknown verb or option is named with a known one that is close to it. Raises UsageError."""
        if self._verbs is not None and argv and not argv[0].startswith("-"):
            verb, known = argv[0], self._verbs.choices
            if verb not in known:
                self.error(f"unknown verb {shown(verb)}{hint(verb, known)}")
            args = known[verb].parse(argv[1:])
            setattr(args, self._verbs.dest, verb)
            return args
        try:
            args, rest = self.parse_known_args(argv)
        except UsageError:
            rest = self._unknown(argv)  # a required option may be missing because its name is misspelled
            if not (rest and self._close_to(rest[0])):
                raise
        if rest:
            self.error(f"unknown option {rest[0]!r}{self._close_to(rest[0])}")
        return args

    def _unknown(self, argv: Sequence[str]) -> list[str]:
        """What no option takes, whatever is missing; nothing if a value is wrong, which is to be said first."""
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            return self.parse_known_args(argv)[1]
        except UsageError:
            return []
        finally:
            for action in required:
                action.required = True

    def _close_to(self, word: str) -> str:
        """ ", did you mean --OPTION?" if one begins with the word or is spelled much like it."""
        name = word.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        longer = [option for option in known if len(name) > 3 and option.startswith(name)]
        return did_you_mean(name, longer, 0.0) or did_you_mean(name, known, CLOSE)


def add_verbosity(*parsers: argparse._ActionsContainer) -> None:
    """How much is shown on stderr besides the result (`stagevar.console.set_verbosity`)."""
    for parser in parsers:
        parser.add_argument(
            "-v", "--verbose", action="count", default=0, help="show what happens; repeat it for details"
        )
        parser.add_argument("-q", "--quiet", action="store_true", help="show only the result, no progress")


def positive_int(text: str) -> int:
    """A whole number from 1 to MOST."""
    value = _whole(text)
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a whole number of at least 1")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"{shown(text)} is too large; at most {MOST}")
    return value


def whole_number(text: str) -> int:
    """A whole number of any sign and size, such as a seed."""
    value = _whole(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a whole number")
    return value


def _whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def finite_number(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} must be a number")
    return value


def between(low: float, high: float, ends: bool = True) -> Callable[[str], float]:
    """The type of numbers between two bounds, inclusive or not."""

    def value_of(text: str) -> float:
        value = finite_number(text)
        if not (low <= value <= high if ends else low < value < high):
            wanted = f"be a number from {low:g} to {high:g}" if ends else f"lie between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{shown(text)} must {wanted}")
        return value

    return value_of


def path_value(text: str) -> Path:
    """The path of a file or folder."""
    return Path(name_value(text))


def file_value(text: str) -> Path:
    """The path of a file; a slash at the end names a folder, which Path would forget."""
    if text.endswith(("/", os.sep)) or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"{shown(text)} is a folder; name a file in it")
    return path_value(text)


def existing_path(text: str) -> Path:
    """The path of an existing file or folder."""
    return _existing(path_value(text), "a file or folder")


def existing_file(text: str) -> Path:
    """The path of an existing file, device or pipe."""
    return _existing(file_value(text), "a file")


def existing_folder(text: str) -> Path:
    """The path of an existing folder."""
    return _existing(path_value(text), "a folder")


def _existing(path: Path, what: str) -> Path:
    named = shown(str(path))
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise argparse.ArgumentTypeError(f"{named} cannot be read: {reason}; give {what} that exists") from None
    if is_folder and what == "a file":
        raise argparse.ArgumentTypeError(f"{named} is a folder; name a file in it")
    if not is_folder and what == "a folder":
        raise argparse.ArgumentTypeError(f"{named} is not a folder; name the folder that contains it")
    return path


def name_value(text: str) -> str:
    """Text that is not empty and that the system accepts as a name."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)} holds a null character")
    return text
