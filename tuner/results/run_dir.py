"""Run directories that survive kill -9: one driver at a time, evidence written before it is told, torn lines cut off.

Optuna's journal and our `trials.jsonl` are both append-only files of lines. A trial's evidence is on disk (fsync) before
the sampler is told, so after a crash at any moment the journal can be brought up to date from the evidence.
Locks are POSIX file locks: the kernel drops them with the process, so a dead driver never blocks the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict, cast

from stagevar.errors import UsageError
from stagevar.folders import visible

if TYPE_CHECKING:
    import numpy as np

JOURNAL_FILE = "journal.log"
EVIDENCE_FILE = "trials.jsonl"
LOCK_FILE = "driver.lock"
PROPOSING_FILE = ".proposing.lock"
#: Time-stamped messages of the driver and its workers, appended by every process that drives the run.
LOG_FILE = "run.log"
CONFIG_FILE = "config.json"
STUDY_FILE = "study.json"
#: What lasting changes to the full schedule cost (tuner.proposals.sensitivity).
SENSITIVITY_FILE = "sensitivity.json"
#: Everything that a study writes into its directory, and so all that --fresh may remove.
#: config.json comes last, so that an interrupted removal still leaves a folder that is recognized as a run.
RUN_FILES = (
    *(EVIDENCE_FILE, f"{JOURNAL_FILE}*", STUDY_FILE, "profile.yaml", "profile.schema.json", "pareto.yaml"),
    *("trials.csv", "report.html", LOG_FILE, "images", "references", "study.name", "measurements.jsonl"),
    *(SENSITIVITY_FILE, CONFIG_FILE),
)


@contextlib.contextmanager
def driver_lock(run_dir: Path) -> Iterator[None]:
    """Holds the run directory. Raises UsageError naming the process that already holds it.

    Waits for the proposing process of a driver that was killed: it writes the journal until its last proposal is made.
    """
    with open(run_dir / LOCK_FILE, "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                reason = error.strerror or error
                raise UsageError(
                    f"output {run_dir} is on a file system without locks ({reason}); choose an --out on a local disk"
                ) from None
            handle.seek(0)
            holder = handle.read(200).strip() or "another process"
            raise UsageError(
                f"run {run_dir} is being driven by {holder}; wait for it or choose another --out"
            ) from None
        handle.seek(0)
        handle.truncate()
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        with proposing_lock(run_dir):
            pass
        yield


@contextlib.contextmanager
def proposing_lock(run_dir: Path) -> Iterator[None]:
    """Held by a driver's proposing process as long as it may write the journal; waits for another one to end."""
    with open(run_dir / PROPOSING_FILE, "a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cut_torn_line(path: Path) -> int:
    """Truncates a file to its last newline; returns the bytes cut. Call before appending, never beside another writer.

    Optuna skips a torn last line, but the next append would be joined to it and corrupt the file for good.
    """
    if not path.exists():
        return 0
    with open(path, "rb+") as handle:
        size = end = handle.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            handle.seek(start)
            newline = handle.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            handle.truncate(end)
        return size - end


def repair(run_dir: Path) -> list[str]:
    """Makes a dead driver's files safe to append to; call while holding the driver lock. Returns a line per repair.

    Once we hold the driver lock, nobody owns the journal's own lock file: only the driver writes.
    """
    done = []
    for name in (JOURNAL_FILE, EVIDENCE_FILE):
        cut = cut_torn_line(run_dir / name)
        if cut:
            done.append(f"{name}: cut off a torn last line of {cut} bytes")
    for stale in run_dir.glob(f"{JOURNAL_FILE}.lock*"):
        stale.unlink(missing_ok=True)
        done.append(f"{stale.name}: removed the lock of a dead driver")
    return done


class EvidenceRecord(TypedDict, total=False):
    """A line of trials.jsonl.

    Of the kinds, "baseline", "trial", "unmeasured" and "verification" have a candidate; "dropped" has the trial, key and
    predicted ratio of a schedule that was not judged; "sensitivity" has its table.
    """

    kind: Required[str]
    candidate: dict[str, object]
    trial: int
    key: str
    ratio: float
    table: dict[str, object]


class EvidenceLog:
    """`trials.jsonl`: one JSON object per line, on disk before `append` returns."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / EVIDENCE_FILE

    def append(self, record: EvidenceRecord) -> None:
        """Adds one line and waits for the disk."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with open(self.path, "ab") as handle:
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())

    def read(self) -> list[EvidenceRecord]:
        """All complete lines, without a torn last one. Raises UsageError naming a damaged line."""
        if not self.path.exists():
            return []
        records = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or "kind" not in record:
                raise UsageError(f"{self.path} line {number} is damaged; start over with another --out")
            records.append(cast(EvidenceRecord, record))
        return records


def prepare(run_dir: Path) -> None:
    """Creates the run directory. Raises UsageError if it cannot be written or holds something else."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"output {run_dir} cannot be written: {reason}; choose another --out") from None
    check_strangers(run_dir)


def check_strangers(run_dir: Path) -> None:
    """Raises UsageError for a folder that holds anything but a run; hidden files do not count."""
    if not run_dir.is_dir():
        return
    strangers = [p.name for p in visible(run_dir.iterdir()) if p.name not in (LOCK_FILE, LOG_FILE)]
    if strangers and not (run_dir / CONFIG_FILE).exists():
        raise UsageError(f"output {run_dir} is not empty and holds no run ({strangers[0]}); choose another --out")


def discard(run_dir: Path) -> None:
    """Removes what an earlier study wrote, nothing else."""
    for pattern in RUN_FILES:
        for path in run_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_pictures(run_dir: Path, key: str, images: Iterable[np.ndarray]) -> list[str]:
    """Writes images (height, width, 3) uint8 of a schedule as PNG files; returns their paths relative to the run."""
    from PIL import Image

    folder = run_dir / "images" / key
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
        paths.append(f"images/{key}/{index}.png")
    return paths
