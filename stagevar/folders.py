"""The system's folders as found in practice: no home, empty variables, read-only places, names that systems hide."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def cache_dir() -> Path | None:
    """Where prompt embeddings and file hashes are kept: $STAGEVAR_CACHE, else `stagevar` in the user's cache folder.

    An empty variable counts as unset, and so does a relative $XDG_CACHE_HOME (XDG Base Directory Specification). None if
    the process has no home, as with a user id without a passwd entry; nothing is kept then.
    """
    if own := os.environ.get("STAGEVAR_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):
        return Path(shared) / "stagevar"
    home = os.environ.get("HOME") or _home_of_user()
    return Path(home) / ".cache" / "stagevar" if home and os.path.isabs(home) else None


def _home_of_user() -> str | None:
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_dir
    except (ImportError, KeyError):
        return None


#: Folders that archives, network drives and recycle bins leave among a user's files.
_OF_SYSTEMS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}


def visible(paths: Iterable[Path]) -> Iterator[Path]:
    """Paths without those that systems put among a user's (`.DS_Store`, `._a.png`, `.ipynb_checkpoints`, `__MACOSX`)."""
    return (path for path in paths if not path.name.startswith(".") and path.name.lower() not in _OF_SYSTEMS)


def visible_files(folder: Path) -> Iterator[Path]:
    """Files in a folder and its subfolders, except what `visible` hides at any depth; links to folders are not entered.

    Raises:
        OSError: for a folder that cannot be listed.
    """
    for path in visible(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from visible_files(path)
        elif path.is_file():
            yield path
