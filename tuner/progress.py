"""Progress on stderr: a bar with the best so far on a terminal, plain lines elsewhere, nothing when quiet.

The only module that imports rich.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

#: Plain lines come at most this often, except at the end of a phase.
_PLAIN_SECONDS = 5.0


class Progress:
    """One bar that phases take turns on. Attributes: seconds: per phase, in order. parts: of them, where it is told."""

    def __init__(self, quiet: bool = False, stream: Any = None):
        self.quiet, self.stream = quiet, stream or sys.stderr
        self.seconds: dict[str, float] = {}
        self.parts: dict[str, float] = {}
        self._phase: str | None = None
        self._began = self._printed = 0.0
        self._bar: Any = None
        self._task: Any = None
        if not quiet and self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(file=self.stream),
                transient=True,
            )
            self._bar.start()

    def phase(self, name: str, total: int = 1) -> None:
        """Ends the phase before, if any, and begins one of `total` units."""
        self.end_phase()
        self._phase, self._began, self._printed = name, time.perf_counter(), 0.0
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, line="")

    def update(self, done: float, line: str = "") -> None:
        """States the units done so far and what to say beside them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, line=line)
        elif not self.quiet and line and time.perf_counter() - self._printed > _PLAIN_SECONDS:
            self._printed = time.perf_counter()
            print(f"{self._phase}: {line}", file=self.stream, flush=True)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Books seconds under "<phase>: <name>" as well."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"{self._phase}: {name}"
            self.parts[key] = self.parts.get(key, 0.0) + time.perf_counter() - start

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    def end_phase(self) -> None:
        """Books the seconds of the running phase."""
        if self._phase is None:
            return
        spent = time.perf_counter() - self._began
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + spent
        if self._bar is not None:
            self._bar.remove_task(self._task)
        parts = [f"{k.split(': ')[1]} {v:.1f}" for k, v in self.parts.items() if k.startswith(f"{self._phase}: ")]
        self.say(f"{self._phase}: {spent:.1f} s" + (f" ({', '.join(parts)})" if parts else ""))
        self._phase = None

    def close(self) -> None:
        """Ends the bar; the terminal is as it was."""
        self.end_phase()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
