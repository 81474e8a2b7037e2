"""Progress on stderr: a bar with the best so far on a terminal, a few plain lines elsewhere, nothing with --quiet.

A log gets one line when a phase starts, at most one per tenth of it, and its seconds at the end; no line twice. The only
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

#: What a phase does, for the line that starts it.
_BEGINNINGS = {
    "load": "loading the model, its metrics and the prompts",
    "baseline": "timing the full schedule and judging it on the search prompts",
    "search": "proposing schedules, timing them and judging them on the search prompts",
    "verification": "timing the finalists and the full schedule in turn, then judging them on held-out prompts",
    "images": "drawing images of the full schedule and the picks for the report",
    "timing": "timing steps, then a few schedules end to end",
    "report": "writing profile, table and report",
}
#: The same of phases that otherwise judge images, where none is judged.
_UNJUDGED = {
    "baseline": "timing the full schedule",
    "search": "proposing schedules and timing them",
    "verification": "timing the finalists and the full schedule in turn",
}


class Progress:
    """One bar that phases take turns on.

    Attributes:
        seconds: per phase, in order.
        parts: seconds of the named parts of phases.
        judged: whether images are judged; only words depend on it.
    """

    def __init__(self, quiet: bool = False, stream: Any = None):
        self.quiet, self.stream = quiet, stream or sys.stderr
        self.seconds: dict[str, float] = {}
        self.parts: dict[str, float] = {}
        self.judged = True
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
        """Ends the previous phase, if any, and starts one of `total` units."""
        self.end_phase()
        self._phase, self._total, self._tenth, self._began = name, max(1, total), 0, time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, line="")
        beginnings = _BEGINNINGS if self.judged else _BEGINNINGS | _UNJUDGED
        self._note(f"{name}: {beginnings.get(name, 'begins')}")

    def update(self, done: float, line: str = "") -> None:
        """Shows the units done so far and a line of text; without a bar, once per tenth."""
        share = min(1.0, done / self._total)
        # Rounded up by a hair, since 0.3 * 100 units are 29.999...
        tenth = int(10 * share + 1e-9)
        if line and tenth > self._tenth:
            self._tenth = tenth
            self._note(f"{self._phase} {100 * share:.0f} %: {line}")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, line=line)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Also counts the seconds under "<phase>: <name>"."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"{self._phase}: {name}"
            self.parts[key] = self.parts.get(key, 0.0) + time.perf_counter() - start

    def _note(self, line: str) -> None:
        """A line of the log only; a bar shows the same in its own way."""
        if self._bar is None:
            self.say(line)
        else:
            log.info("%s", line, extra={"shown": True})

    def say(self, line: str) -> None:
        """A lasting line, here and in the run's log; the same line is not repeated in a row."""
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
        """Adds up the seconds of the running phase."""
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
        """Ends the bar and restores the terminal."""
        self.end_phase()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
