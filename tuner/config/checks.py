"""Checks that need no loaded model: options, prompts line by line, outputs, databases, paths.

A long run never starts on input that is bound to fail. Every check raises UsageError, in one line. torch is imported only
where the answer depends on this machine's devices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from stagevar.choices import check_engine, check_threads, check_weights, processors
from stagevar.errors import InfrastructureError, UsageError, reason_of
from stagevar.files import check_output
from stagevar.models import registry
from stagevar.models.request import ModelRequest
from stagevar.prompts.requests import check_prompts
from stagevar.sections import shown
from tuner.config.prompts import load_prompts, prompt_lines
from tuner.config.space import PROMPT_SOURCES, SearchSpace
from tuner.metrics.base import Prompt, prompt_text

#: Metrics that read GenEval's metadata of every prompt.
_WITH_METADATA = ("geneval", "geneval_nano")
#: Seconds until a database that does not answer is considered absent, and the default ports that URLs leave out.
_ANSWER_S = 15
_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mariadb": 3306, "mssql": 1433, "oracle": 1521}
#: How every SQLite file begins.
_SQLITE = b"SQLite format 3\0"
_LONG_SEED = 24


def check_running(model: ModelRequest, *, threads: int | None, engine: str | None, here: bool = True) -> None:
    """Model, device, threads, engine, resolution, and that local weights hold the model's files.

    Unless the model runs `here`, nothing is compared with this machine's devices and processors: workers check that.
    """
    registry.find(model.name)
    check_weights(model.weights)
    registry.resolution_of(model.name, model.resolution)
    device = str(model.device)
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device):
        raise UsageError(f"unknown device {shown(device)}; use auto, cpu, cuda or cuda:N")
    if not here:
        if engine is not None:
            check_engine(engine, "cuda")
        threads = engine = None
    too_many = threads is not None and threads > len(processors()) > 0
    if (here and device.startswith("cuda")) or too_many or (engine or "").startswith("graph"):
        # Only now, since torch takes seconds to import.
        kind = registry.resolve(dataclasses.replace(model, weights=None)).device.type
        if engine is not None:
            check_engine(engine, kind)
        if threads is not None:
            check_threads(threads, kind)
    if model.weights not in (None, "random"):
        from stagevar.models.readiness import check_local

        check_local(model)


def check_prompts_of(space: SearchSpace, seed: int) -> None:
    """Checks every prompt, including the held-out set and the rest of a file: its text, and what the metrics need of it."""
    source = space.prompts
    if source.source in PROMPT_SOURCES:
        lines: list[tuple[int, Prompt]] = []
    else:
        lines = prompt_lines(source.source)
    wanted = [metric for metric in (*space.quality, *space.floors) if metric in _WITH_METADATA]
    for number, prompt in lines:
        try:
            check_prompts(prompt_text(prompt))
            for metric in wanted:
                _check_metadata(metric, prompt)
            _check_class(space.model, prompt)
        except UsageError as error:
            raise UsageError(f"prompts {source.source:.200} line {number}: {error}") from None
    load_prompts(source, seed)
    if not lines and wanted and source.source == "imagenet":
        raise UsageError(f"{wanted[0]} needs GenEval metadata, which the prompts of {source.source} lack")


def _check_metadata(metric: str, prompt: Prompt) -> None:
    from stagevar.prompts.geneval import check_metadata
    from tuner.metrics.detections import geneval_metadata

    check_metadata(geneval_metadata(metric, prompt))


def _check_class(model: str, prompt: Prompt) -> None:
    """A prompt of a class-conditional model names a class."""
    if registry.find(model).family != "var":
        return
    from stagevar.models.var.transformer import ClassLabels

    ClassLabels().encode([prompt_text(prompt)])


def check_metric_options(space: SearchSpace) -> None:
    """Checks the options of the space's metrics; imports the modules of those that have any and can be imported."""
    from tuner.metrics.registry import check_options, missing_packages

    for name, spec in space.quality.items():
        if spec.options and not missing_packages(name):
            check_options(name, spec.options)


def run_name(model: str, budget: str, seed: int) -> str:
    """The folder of a run without --out; even a huge seed gives a name that file systems accept."""
    text = str(seed)
    if len(text) > _LONG_SEED:
        text = f"{text[:8]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{model}-{budget.replace('%', 'pct')}-s{text}"


# ---------------------------------------------------------------------------------------------------- databases


def check_storage(url: str, run_dir: Path) -> None:
    """Checks the URL of a trial database: its kind, its driver, and that it answers or is writable.

    Raises InfrastructureError if this run has used the database before and it does not answer now.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UsageError(f"storage {shown(url)} must be a database URL, such as postgresql://HOST/DB") from None
    if not parts.scheme or "://" not in url:
        raise UsageError(f"storage {shown(url)} must be a database URL, such as postgresql://HOST/DB")
    if parts.password is not None or "password=" in parts.query:
        raise UsageError("--storage holds a password, which would end up in the run's files; use ~/.pgpass")
    kind = parts.scheme.partition("+")[0]
    _check_driver(url)
    if kind == "sqlite":
        file = sqlite_file(url)
        if file is not None:
            check_output(file, "storage")
            _check_sqlite(file)
        return
    if not parts.hostname or kind not in _PORTS:
        return  # a socket, or a kind of database whose default port we do not know
    try:
        socket.create_connection((parts.hostname, port or _PORTS[kind]), timeout=_ANSWER_S).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if (run_dir / "study.name").exists():
            raise InfrastructureError(
                f"the database of --storage does not answer ({reason:.160}); once it does, the same command resumes"
            ) from None
        raise UsageError(
            f"--storage {shown(url)} does not answer: {reason:.160}; example: sqlite:////data/studies.db"
        ) from None


def check_ray_address(address: str) -> None:
    """Checks that something answers at a cluster's address. Ray itself would keep trying for a quarter of an hour."""
    if address in ("auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        host, port = parts.hostname, parts.port or (10001 if "://" in address else 6379)
        if not host:
            raise ValueError("no host")
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except (OSError, UnicodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"no Ray cluster at {shown(address)} ({reason:.160}); start one: docs/cluster.md") from None


def _check_driver(url: str) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(url).get_dialect().import_dbapi()
    except ImportError as error:
        raise UsageError(
            f"--storage {shown(url)} needs a driver ({error}); for PostgreSQL: pip install 'psycopg[binary]' and "
            "postgresql+psycopg://HOST/DB"
        ) from None
    except (SQLAlchemyError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(
            f"--storage {shown(url)} cannot be opened: {reason_of(error)}; example: sqlite:////data/studies.db"
        ) from None


def _check_sqlite(file: str) -> None:
    """Raises UsageError if a file that exists is no SQLite database; an empty one becomes one."""
    try:
        with open(file, "rb") as stored:
            begins = stored.read(len(_SQLITE))
    except FileNotFoundError:
        return
    if begins not in (b"", _SQLITE):
        raise UsageError(
            f"storage {file} is not an SQLite database; name a new file, or the database of an earlier run"
        )


def sqlite_file(url: str) -> str | None:
    """The file of an SQLite URL, None where it is kept in memory."""
    path = url.partition("://")[2].partition("?")[0].removeprefix("/")
    return path if path and path != ":memory:" else None


# ---------------------------------------------------------------------------------------------------- paths of a run

_PATHS = ("--space", "--prompts", "--weights", "--storage", "--analysis", "--from", "--start-from", "--store")


def with_absolute_paths(words: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """A command line whose files are found from any working directory.

    Args:
        words: the command line.
        folders: where to look for a relative path, in this order; a path found nowhere stays as it is, except for a
            store, which will be created.
    """
    done: list[str] = []
    words = list(words)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if equals and option in _PATHS:
            done.append(f"{option}={_absolute(option, value, folders)}")
        elif index and words[index - 1] in _PATHS:
            done.append(_absolute(words[index - 1], word, folders))
        else:
            done.append(word)
    return done


def _absolute(option: str, value: str, folders: Sequence[Path]) -> str:
    if option == "--storage":
        file = sqlite_file(value) if value.startswith("sqlite") and "://" in value else None
        if file is None or os.path.isabs(file):
            return value
        folder = next((f for f in folders if (f / file).exists()), folders[0])
        return value.replace(f":///{file}", f":////{os.path.abspath(folder / file).lstrip('/')}", 1)
    is_word = (option == "--weights" and value == "random") or (
        option == "--prompts" and (value.isdecimal() or value.partition(":")[0] in PROMPT_SOURCES)
    )
    if is_word or not value or "\0" in value or os.path.isabs(value):
        return value
    for folder in folders:
        if os.path.exists(folder / value):
            return os.path.abspath(folder / value)
    return os.path.abspath(folders[0] / value) if option == "--store" else value


def with_absolute_source(space: SearchSpace, folders: Sequence[Path]) -> SearchSpace:
    """The space with the path of its prompts absolute."""
    source = space.prompts.source
    if source in PROMPT_SOURCES:
        return space
    found = _absolute("--prompts", source, folders)
    return dataclasses.replace(space, prompts=dataclasses.replace(space.prompts, source=found))
