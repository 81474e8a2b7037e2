"""Fetching public weight files from the Hugging Face hub, and naming files by their content.

Source: huggingface_hub documentation (downloads resume, show progress and are cached per commit).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stagevar.errors import WeightsError


@dataclass(frozen=True)
class HubFile:
    """One file, or with a trailing slash one folder, of a hub repository. `revision` is a commit where one is known."""

    repo: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}@{self.revision[:12]}"

    @property
    def name(self) -> str:
        """File or folder name, as people find it in a local copy."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]


def cache_dir() -> Path:
    """Where prompt embeddings and file hashes are kept: $STAGEVAR_CACHE, else the user's cache folder."""
    base = os.environ.get("STAGEVAR_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "stagevar"


def fetch(file: HubFile) -> tuple[Path, str]:
    """Local path of a hub file or folder, downloaded when it is not cached, and the commit it belongs to.

    Raises WeightsError in one line when huggingface_hub is missing, the hub is out of reach, or has no such file.
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
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
    book = cache_dir() / "sha256.json"
    try:
        known = json.loads(book.read_text())
    except (OSError, ValueError):
        known = {}
    if key in known:
        return known[key]
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    try:
        book.parent.mkdir(parents=True, exist_ok=True)
        partial = book.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({**known, key: digest}, indent=0))
        partial.replace(book)
    except OSError:
        pass  # a read-only cache costs only time
    return digest


def sha256_files(paths: Iterable[Path | str]) -> dict[str, str]:
    """File name to SHA-256, sorted by name; what profiles record."""
    return {path.name: sha256_file(path) for path in sorted(map(Path, paths), key=lambda p: p.name)}
