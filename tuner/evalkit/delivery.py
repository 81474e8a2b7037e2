"""What the verbs of `stagevar-eval` share: common options, the files that they may write, tables and JSON."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, TypeAlias

from stagevar.cli.arguments import Parser, add_verbosity, file_value
from stagevar.errors import UsageError
from stagevar.files import check_output, write_text_atomically, writing
from stagevar.folders import visible_files
from stagevar.prompts.prompt_files import natural_key

#: What argparse returns for adding verbs; the type has no public name.
Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_verb(verbs: Verbs, name: str, summary: str, epilog: str = "") -> Parser:
    """A verb with the options common to all."""
    verb = verbs.add_parser(
        name,
        help=summary,
        description=summary + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "--out", type=file_value, metavar="FILE.json", help="also write the results, with versions and hashes, here"
    )
    verb.add_argument("--json", action="store_true", help="print that JSON instead of the table")
    add_verbosity(verb)
    verb.set_defaults(outputs=("out",))
    return verb


def check_outputs(options: argparse.Namespace) -> None:
    """Raises UsageError, before computing anything, for an output that cannot be written or that another option names."""
    if options.verb == "pairs" and options.key is None:
        options.key = options.page.with_suffix(".key.json")
    taken = {os.path.realpath(path): f"--{_spelled(name)}" for name, path in _read_by(options) if path.is_file()}
    for name in options.outputs:
        path = getattr(options, name)
        if path is None:
            continue
        check_output(path, f"--{name}")
        if path.exists() and not path.is_file():
            continue  # a device or a pipe takes several
        place = os.path.realpath(path)
        if place in taken:
            raise UsageError(f"--{name} {path!s:.200} is also the file of {taken[place]}; choose another")
        taken[place] = f"--{name}"


def _spelled(name: str) -> str:
    return {"source": "from"}.get(name, name)


def _read_by(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """(option, path) of the files and folders that a command reads whole."""
    for name in options.inputs:
        value = getattr(options, name)
        for path in value if isinstance(value, list) else [value]:
            if path is not None:
                yield name, path


def deliver(
    options: argparse.Namespace,
    results: Any,
    lines: Sequence[str],
    written: Sequence[Path] = (),
    packages: Sequence[str] = (),
) -> int:
    """Prints the table (or JSON) and writes `--out`; the JSON has versions and hashes of what was read and written."""
    document = {
        "schema": "stagevar-eval/1",
        "command": options.verb,
        "inputs": {str(path): _digest(path) for path in (*(path for _, path in _read_by(options)), *written)},
        "versions": {
            "stagevar-tune": version_of("stagevar-tune"),
            "python": platform.python_version(),
            **{package: version_of(package) for package in ("numpy", *packages)},
        },
        "results": _plain(results),
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    if options.out is not None:
        with writing(options.out):
            write_text_atomically(options.out, text + "\n")
    print(text if options.json else "\n".join(lines))
    return 0


def _plain(value: Any) -> Any:
    """The value with null for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def files_digest(paths: Sequence[Path]) -> str:
    """One hash over the bytes of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(_sha256(path)))
    return digest.hexdigest()


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or of the visible files of a folder in natural order; None for a pipe, which is read only once."""
    if path.is_dir():
        return files_digest(sorted(visible_files(path), key=lambda file: natural_key(str(file))))
    return _sha256(path) if path.is_file() else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def version_of(package: str) -> str:
    try:
        return package_metadata.version(package)
    except package_metadata.PackageNotFoundError:
        return "not installed"
