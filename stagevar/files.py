"""Writing files: checked before any work, complete or absent, and a one-line error if the disk fails.

A long computation never ends by finding that its output cannot be written: `check_output` is called first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from stagevar.errors import InfrastructureError, StagevarError, UsageError

#: What a disk says that was fine when work began: full, over quota, broken, gone, remounted read-only.
_GAVE_WAY = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT}


def gave_way(error: OSError) -> bool:
    """Whether the disk is to blame, rather than what was asked of it."""
    return error.errno in _GAVE_WAY


def write_error(path: str | os.PathLike[str] | None, error: OSError) -> StagevarError:
    """The error for a file that cannot be written: infrastructure if the disk failed, otherwise the user's to fix."""
    where = os.fspath(path if path is not None else error.filename or "output")
    reason = error.strerror or str(error) or type(error).__name__
    where = f"{where:.200}"
    if gave_way(error):
        return InfrastructureError(
            f"{where} cannot be written: {reason}; free some space, then the same command resumes"
        )
    return UsageError(f"{where} cannot be written: {reason}; choose another path")


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a system error about a file into one line; see `write_error`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise write_error(path, error) from None


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Lets `write` fill a file so that a crash or a full disk leaves the old file or the new one, never a part.

    A link is followed and kept; devices and pipes are written to directly.

    Raises:
        OSError: with the path as its filename.
    """
    path = Path(path)
    try:
        if path.is_symlink():
            path = path.resolve()
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            with open(path, "wb") as file:
                write(file)
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name:.80}.")
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """`write_atomically` of UTF-8 text; lone surrogates, which file names may contain, become question marks."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode("utf-8", "replace"))

    write_atomically(path, write)


def check_output(path: str | os.PathLike[str], what: str = "output", make_folder: bool = False) -> Path:
    """The path of a file that can be written, checked by writing next to it.

    Args:
        what: the option, for messages.
        make_folder: whether the folder may be created, which happens now.

    Raises:
        UsageError: if the file cannot be written.
        InfrastructureError: if the disk failed.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UsageError(f"{what} {text!r} is not a valid file name")
    path = Path(path)
    if path.name in ("", "..") or text.endswith(("/", os.sep)):
        raise UsageError(f"{what} {text:.200} is a folder; name a file in it")
    try:
        if path.is_dir():
            raise UsageError(f"{what} {text:.200} is a folder; name a file in it")
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.parent.is_dir():
            raise UsageError(f"{what} {text:.200}: folder {path.parent} does not exist or cannot be written")
        if path.exists():
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not path.is_file():
                return path  # a device or a pipe
        os.lstat(path) if path.is_symlink() else _try_name(path)
    except OSError as error:
        raise _checked(what, text, error) from None
    return path


def check_output_folder(path: str | os.PathLike[str], what: str = "output") -> Path:
    """The path of a folder that can be created or written to; creates nothing.

    Raises:
        UsageError: if it cannot.
        InfrastructureError: if the disk failed.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UsageError(f"{what} {text!r} is not a valid folder name")
    path = Path(path)
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        os.stat(path.parent / path.name) if path.exists() else _long_names(path)
        folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise _checked(what, text, error) from None
    return path


def _checked(what: str, text: str, error: OSError) -> StagevarError:
    """Like `write_error`, but names the option."""
    reason = error.strerror or type(error).__name__
    if gave_way(error):
        return InfrastructureError(f"{what} {text:.200} cannot be written: {reason}; free some space and try again")
    return UsageError(f"{what} {text:.200} cannot be written: {reason}; choose another")


def _try_name(path: Path) -> None:
    """Writes a block next to a file, under an equally long name, so that a long name or a full disk is noticed now."""
    _long_names(path)
    with tempfile.TemporaryFile(dir=path.parent) as file:
        file.write(b"x" * 4096)
        file.flush()


def _long_names(path: Path) -> None:
    """Raises OSError for a name that the system does not accept."""
    with contextlib.suppress(FileNotFoundError):
        os.lstat(path)
