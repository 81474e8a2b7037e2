"""Errors that a user can cause or needs to read. Each message is one line: the value at fault and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: What every command's exit code means; --help prints it, README lists it.
EXIT_CODES = {
    0: "done; for tuning: verified, or the full schedule already meets the budget",
    1: "doctor: a study cannot run here",
    2: "unusable input: the line names the value and the fix",
    3: "no schedule meets the budget within the allowed drop; verify: a limit is broken",
    4: "all trials failed",
    5: "inconclusive: the measurements do not decide; --effort instant: nothing was verified",
    6: "infrastructure (workers lost, device broken, disk full, database away): the same command resumes",
    130: "stopped by Ctrl-C: the same command resumes",
}


class StagevarError(Exception):
    """Base of every error that this project raises on purpose; commands print it without a traceback."""

    exit_code = 1


class UsageError(StagevarError):
    """Input that cannot be used: option, YAML key, budget, profile, weights file. Exit code 2."""

    exit_code = 2


class InfrastructureError(StagevarError):
    """What a run depends on failed: workers, the proposing process, the device, the disk, the database. Exit code 6.

    No schedule is to blame, so none is marked as failed; everything measured so far is kept, and once the cause is fixed
    the same command resumes. `except Exception` that turns errors into failed trials must let this class through.
    """

    exit_code = 6


class DeviceBroken(InfrastructureError):
    """No kernel can run on a device in this process any more."""


class OutOfDeviceMemory(InfrastructureError):
    """A computation needs more memory than its device has free. With more memory, or in smaller parts, it could run."""


class WeightsError(UsageError):
    """A weights file that is missing, corrupt, or does not match the model key for key."""


class ProfileError(UsageError):
    """A deployment profile that is unreadable, foreign, hostile or made for another model."""


class ScheduleError(UsageError):
    """A schedule whose parameters do not fit the model's scales, or contradict each other."""


def nearest(word: object, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name nearest to a word; None if none has a similarity of at least `cutoff` (0 to 1)."""
    near = difflib.get_close_matches(str(word)[:60].strip("'"), [*known], n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """ ", did you mean NAME?" with the known name nearest to a word, or nothing if none is near."""
    near = nearest(word, known, cutoff)
    return f", did you mean {near}?" if near is not None else ""


def hint(word: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`did_you_mean`, or all known names if none is near."""
    names = [*known]
    return did_you_mean(word, names, cutoff) or f"; known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """Type and first line of an error, at most 200 characters."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def reason_of(error: BaseException, at_most: int = 160) -> str:
    """The first line of an error's message, or its type's name if there is none, cut to `at_most` characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:at_most]
