"""How every command behaves: one line per error, its exit code, silence when the reader leaves, 130 after Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from stagevar import extras, logs
from stagevar.errors import InfrastructureError, StagevarError, UsageError
from stagevar.files import gave_way, write_error

#: What the system says when a limit of processes, threads, memory or open files is reached, and what raises it.
_LIMITS = {
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.ENOMEM: "free some memory or raise its limit (ulimit -v)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (sysctl fs.file-max)",
}
#: Exit code after Ctrl-C.
STOPPED = 130
#: The longest line on stderr; a longer one would repeat a value of any length.
LONGEST_LINE = 600
#: Exit code when the reader of the output went away.
_NO_READER = 1


def start(prog: str, module: str) -> int:
    """Imports the module of a command and runs its `main`; Ctrl-C during the import is one line, too."""
    loaded = []

    def load() -> int:
        loaded.append(importlib.import_module(module))
        return 0

    return report_errors(prog, load) or loaded[0].main()


#: The console of the command that runs, while one does.
_consoles: list[logs.Console] = []


def set_verbosity(verbose: int, quiet: bool) -> None:
    """Which messages the command shows: warnings by default, -v also what happens, -vv everything, -q errors only."""
    level = logging.ERROR if quiet else {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    for console in _consoles:
        logs.set_level(console, level)


@contextlib.contextmanager
def _console(prog: str) -> Iterator[None]:
    console = logs.Console(prog, say)
    _consoles.append(console)
    try:
        with logs.listening(console, alone=True):
            yield
    finally:
        _consoles.remove(console)


def report_errors(prog: str, run: Callable[[], int]) -> int:
    """Runs a command; what a user caused, the system refused or Ctrl-C stopped becomes one line and its exit code."""

    def one_line(message: Any, *rest: Any) -> None:
        say(f"{prog}: warning: {message}")

    with _interruptible() as interrupted:
        try:
            with _console(prog), warnings.catch_warnings(), showing_everything():
                warnings.filterwarnings("default", category=UserWarning)
                warnings.showwarning = one_line  # type: ignore[assignment]
                try:
                    return run()
                finally:
                    if sys.stdout is not None and not interrupted.is_set():
                        sys.stdout.flush()  # --help and --version end with SystemExit, whose text is heard here too
        except BrokenPipeError:
            _leave_stdout()
            return _NO_READER
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) or interrupted.is_set():
                # Libraries that are interrupted while they load raise all kinds of errors.
                say(f"{prog}: stopped; the same command starts over, or resumes a tuning run")
                return STOPPED
            known = _known(error)
            if known is None:
                raise
            say(f"{prog}: {known}")
            if isinstance(error, OSError):
                _leave_stdout()  # it may be what is full
            return known.exit_code


def _known(error: BaseException) -> StagevarError | None:
    """An error that is not a bug: this project's own, or the system's about files and memory."""
    if isinstance(error, StagevarError):
        return error
    if isinstance(error, OSError) and error.errno in _LIMITS:
        what = _about_file(error) if error.filename else error.strerror or str(error)
        return InfrastructureError(f"{what}; {_LIMITS[error.errno]}, then the same command resumes")
    if isinstance(error, OSError) and error.errno is not None:
        if gave_way(error) or error.filename is not None:
            return write_error(None, error) if gave_way(error) else UsageError(_about_file(error))
        return UsageError(error.strerror or str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and extras.extra_of(error.name) is not None:
        return extras.missing(error.name.partition(".")[0], "this command")
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return InfrastructureError(f"{error}; {_LIMITS[errno.EAGAIN]}, then the same command resumes")
    if isinstance(error, MemoryError):
        return InfrastructureError("out of memory; free some, then the same command resumes")
    return None


def _about_file(error: OSError) -> str:
    return f"{os.fspath(error.filename)!s:.200}: {error.strerror or error}" if error.filename else str(error)


def say(line: str) -> None:
    """Writes what stderr can show of a line, without the middle if it is too long; does nothing if nobody listens."""
    if sys.stderr is None:
        return
    with contextlib.suppress(OSError, ValueError):
        encoding = sys.stderr.encoding or "utf-8"
        text = " ".join(line.split()).encode(encoding, "backslashreplace").decode(encoding)
        if len(text) > LONGEST_LINE:  # the fix stands at the end of a message
            text = f"{text[: LONGEST_LINE // 2]} ... {text[5 - LONGEST_LINE // 2 :]}"
        print(text, file=sys.stderr, flush=True)


def _leave_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush stays silent."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets as it raises KeyboardInterrupt."""
    pressed = threading.Event()

    def press(number: int, frame: types.FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # started in the background by a shell without job control
        yield pressed
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        # After one Ctrl-C another may come while threads and libraries end: it ends the process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL if pressed.is_set() else before)


@contextlib.contextmanager
def showing_everything() -> Iterator[None]:
    """Output that shows every text, with escapes where its encoding would raise an error."""
    before = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            before.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors=errors)
