"""Where log messages go: to the console of a command, to the file of a run, from a worker to its driver.

Modules log to loggers of their own name, below "stagevar" or "tuner"; a script that configures logging gets them like any
others. Libraries never print. Warnings raised with `warnings.warn` are in a run's file, too.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

#: The packages of this project, whose loggers are the parents of all its others.
PACKAGES = ("stagevar", "tuner")
#: A line of a run's file.
LINE = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
#: Messages that a worker keeps until it is asked; the oldest go first.
MOST_KEPT = 1000


class Console(logging.Handler):
    """Messages as lines of a command.

    A record with a true attribute `shown` was already shown by whoever logged it.

    Args:
        say: writes one line.
        prog: the command's name.
    """

    def __init__(self, prog: str, say: Callable[[str], None]):
        super().__init__(logging.WARNING)
        self.prog, self.say = prog, say

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "shown", False):
            return
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self.say(f"{self.prog}: {kind}{record.getMessage()}")


class Kept(logging.Handler):
    """Messages that are kept until somebody takes them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: deque[tuple[str, int, str]] = deque(maxlen=MOST_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> tuple[tuple[str, int, str], ...]:
        """(logger, level, message) of what was logged since the last call."""
        taken = tuple(self._records)
        self._records.clear()
        return taken


def pass_on(messages: tuple[tuple[str, int, str], ...], source: str) -> None:
    """Logs messages kept by another process; each line begins with `source`, that process's name."""
    for name, level, text in messages:
        logging.getLogger(name).log(level, "%s: %s", source, text)


class _Onward(logging.Handler):
    """What the root's handlers would have got anyway, and no more: messages at or above a level."""

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if root.handlers:  # else the last resort would print what no one asked for
            root.callHandlers(record)


@contextlib.contextmanager
def listening(handler: logging.Handler, alone: bool = False) -> Iterator[None]:
    """Also sends both packages' messages at or above the handler's level to it.

    The root's handlers keep receiving only what they did before; otherwise a library that calls `logging.basicConfig`
    would put every line of a run on stderr. With `alone` they receive nothing, because the handler is the console
    itself.
    """
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    onward = _Onward(loggers[0].getEffectiveLevel())
    for logger in loggers:
        if alone:
            logger.propagate = False
        elif logger.propagate and handler.level < onward.level:
            logger.propagate = False
            logger.addHandler(onward)
        logger.addHandler(handler)
        logger.setLevel(min(handler.level, logger.level or logging.WARNING))
    try:
        yield
    finally:
        for logger, (level, propagates) in zip(loggers, before, strict=True):
            logger.removeHandler(onward)
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagates


def set_level(handler: logging.Handler, level: int) -> None:
    """Changes what a handler that is listening gets."""
    handler.setLevel(level)
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(min(level, logger.level or logging.WARNING))


@contextlib.contextmanager
def log_file(path: Path, command: str, versions: Mapping[str, str], level: int = logging.INFO) -> Iterator[None]:
    """Appends the messages and warnings of a run to a file, after one line for its command and one for its versions."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter(LINE))
    raised = logging.getLogger("stagevar.warnings")
    shown = warnings.showwarning

    def showwarning(message: Any, category: Any, filename: str, *rest: Any) -> None:
        text = " ".join(str(message).split())
        handler.handle(raised.makeRecord(raised.name, logging.WARNING, filename, 0, text, (), None))
        shown(message, category, filename, *rest)

    with contextlib.closing(handler), listening(handler):
        log = logging.getLogger(__name__)
        log.info("%s", command)
        log.info("%s", ", ".join(f"{name} {version}" for name, version in versions.items()))
        log.info("%s %s, %s", platform.system(), platform.release(), platform.machine())
        warnings.showwarning = showwarning  # type: ignore[assignment]  # the rest is passed on as it comes
        try:
            yield
        except BaseException as error:
            reason = " ".join(str(error).split())  # the command says it on the console
            log.error("ended by %s: %s", type(error).__name__, reason, extra={"shown": True})
            raise
        finally:
            if warnings.showwarning is showwarning:
                warnings.showwarning = shown
