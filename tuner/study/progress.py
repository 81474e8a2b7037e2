"""Progress on stderr: a bar with the best so far on a terminal, a few plain lines elsewhere, nothing when quiet.

A log gets one line as a phase starts, at most one per tenth of it, and its seconds at its end; none of them twice. The only
module that imports rich.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

#: What a phase is about, for the line that starts it.
_BEGINNINGS = {
    "load": "the model, its metrics and the prompts",
    "baseline": "the full schedule, timed and judged on the search prompts",
    "search": "schedules are proposed, timed and judged on the search prompts",
    "verification": "the finalists and the full schedule, timed in turn, then judged on held-out prompts",
    "images": "the full schedule and the picks draw for the report",
    "report": "profile, table and report are written",
}


class Progress:
    """One bar that phases take turns on. Attributes: seconds: per phase, in order. parts: of them, where it is told."""

    def __init__(self, quiet: bool = False, stream: Any = None):
        self.quiet, self.stream = quiet, stream or sys.stderr
        self.seconds: dict[str, float] = {}
        self.parts: dict[str, float] = {}
        self._phase: str | None = None
        self._total, self._tenth, self._began = 1, 0, 0.0
        self._last = ""
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
        self._phase, self._total, self._tenth, self._began = name, max(1, total), 0, time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, line="")
        self._note(f"{name}: {_BEGINNINGS.get(name, 'begins')}")

    def update(self, done: float, line: str = "") -> None:
        """States the units done so far and what to say beside them; where there is no bar, once per tenth."""
        share = min(1.0, done / self._total)
        # A hair above, since 0.3 * 100 units are 29.999... of them.
        tenth = int(10 * share + 1e-9)
        if line and tenth > self._tenth:
            self._tenth = tenth
            self._note(f"{self._phase} {100 * share:.0f} %: {line}")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, line=line)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Books seconds under "<phase>: <name>" as well."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"{self._phase}: {name}"
            self.parts[key] = self.parts.get(key, 0.0) + time.perf_counter() - start

    def _note(self, line: str) -> None:
        """A line of the log; a bar shows it in its own way."""
        if self._bar is None:
            self.say(line)
        else:
            log.info("%s", line, extra={"shown": True})

    def say(self, line: str) -> None:
        """A line that stays, here and in the log of the run; the same one in a row is said once."""
        if line == self._last:
            return
        self._last = line
        log.info("%s", line, extra={"shown": True})
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
