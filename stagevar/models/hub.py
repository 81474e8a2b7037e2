"""Fetching public weight files from the Hugging Face hub, and naming files by their content.

Source: huggingface_hub documentation (downloads resume, show progress and are cached per commit).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stagevar.errors import WeightsError, reason_of
from stagevar.files import write_text_atomically
from stagevar.folders import cache_dir


@dataclass(frozen=True)
class HubFile:
    """One file, or with a trailing slash one folder, of a hub repository. `revision` is a commit if one is known."""

    repo: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}@{self.revision[:12]}"

    @property
    def name(self) -> str:
        """File or folder name, as people find it in a local copy."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]


def fetch(file: HubFile) -> tuple[Path, str]:
    """Local path of a hub file or folder, downloaded if it is not cached, and its commit.

    Raises:
        WeightsError: in one line, if huggingface_hub is missing, the hub cannot be reached, or it has no such file.
    """
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError:
        raise WeightsError(
            f"fetching {file} needs huggingface_hub: pip install 'stagevar-tune[infinity]', or pass --weights PATH"
        ) from None
    try:
        if file.path.endswith("/"):
            root = snapshot_download(file.repo, revision=file.revision, allow_patterns=[file.path + "*"])
            path = Path(root) / file.path
            if not path.is_dir():
                raise FileNotFoundError(f"no folder {file.path}")
        else:
            path = Path(hf_hub_download(file.repo, file.path, revision=file.revision))
    # The client raises its own, requests', httpx' and the system's errors; all mean the same to the user.
    except Exception as error:
        reason = reason_of(error)
        raise WeightsError(
            f"cannot fetch {file} from the hub ({reason}); pass --weights PATH with a local copy, or --weights random"
        ) from None
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else file.revision
    return path, commit


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's content, hex. Remembered by path, size and modification time, since weights are large."""
    path = Path(path).resolve()
    stat = path.stat()
    key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    cache = cache_dir()
    book = None if cache is None else cache / "sha256.json"
    known = {} if book is None else _remembered(book)
    if key in known:
        return known[key]
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if book is not None:
        try:
            book.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(book, json.dumps({**known, key: digest}, indent=0))
        except OSError:
            pass  # a read-only or full cache costs only time
    return digest


def _remembered(book: Path) -> dict[str, str]:
    """Digests by file; none from a cache file that is missing or damaged."""
    try:
        known = json.loads(book.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str) and len(value) == 64}


def sha256_files(paths: Iterable[Path | str]) -> dict[str, str]:
    """File name to SHA-256, sorted by name; what profiles record."""
    return {path.name: sha256_file(path) for path in sorted(map(Path, paths), key=lambda p: p.name)}


def sha256_part(paths: Iterable[Path | str]) -> str:
    """SHA-256 that names the content of a model's part: of its file, or of the digests of its shards; names are ignored."""
    digests = sorted(sha256_file(path) for path in paths)
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
