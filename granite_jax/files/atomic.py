"""Writes files and directories completely or not at all: under a hidden name beside their own, then renamed."""

import contextlib
import errno
import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from granite_jax.errors import CheckpointError

Content = str | bytes | Path
"""Of a file: text, written in UTF-8 with escapes for what is not valid Unicode; bytes; or a local file to copy."""
_LOCK_SECONDS = 10.0  # after which a lock counts as abandoned, which is held for the time of two system calls
_STALE = 3600.0  # seconds after which a temporary file counts as abandoned
_LINKS_UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextlib.contextmanager
def writing(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write bytes to, which takes the name `path`, also from one that is there, if the block succeeds.

    Args:
      sync: whether it is on disk when the block is left.
    """
    with _partial(path, sync) as partial:
        with _opened(partial, sync) as file:
            yield file
        os.replace(partial, path)


def replace(path: Path, content: Content, *, sync: bool = False) -> None:
    """Writes a file, and replaces the one that is there. Raises OSError; `sync` is as in `writing`."""
    with writing(path, sync=sync) as file:
        _write(content, file)


def create(path: Path, content: Content, *, sync: bool = False) -> bool:
    """Writes a file, unless there is one; then it returns False. Raises OSError; `sync` is as in `writing`.

    The file is linked, or, where there are no links, renamed under a lock.
    """
    with _partial(path, sync) as partial:
        with _opened(partial, sync) as file:
            _write(content, file)
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _LINKS_UNSUPPORTED:
                raise
            return _rename_if_new(partial, path)
    return True


def remove_abandoned(directory: Path) -> None:
    """Deletes what killed processes that wrote files left in a directory, an hour after. Raises OSError."""
    for path in directory.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


@contextlib.contextmanager
def new_directory(directory: str | PathLike[str], check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A directory to write into, which takes the name `directory` only if the block, and then `check`, succeed.

    Until then it is a hidden directory beside `directory`; those that killed processes left there are removed.

    Raises:
      CheckpointError: if `directory` is a file or a directory that is not empty.
    """
    final = Path(directory).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{final}: exists and is not an empty directory")
    final.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{final.name}.partial-"
    for abandoned in final.parent.glob(f"{glob.escape(prefix)}*"):
        with locked(abandoned) as is_locked:
            if is_locked:
                shutil.rmtree(abandoned, ignore_errors=True)
    unlocked = final.parent / f".{final.name}.{secrets.token_hex(4)}"
    unlocked.mkdir()
    with locked(unlocked):
        partial = unlocked.rename(final.parent / f"{prefix}{unlocked.suffix[1:]}")  # locked before it can be swept
        try:
            yield partial
            if check is not None:
                check(partial)
            if final.exists():
                final.rmdir()
            partial.rename(final)
        except BaseException:
            for _ in range(5):  # Orbax's threads may still be writing
                shutil.rmtree(partial, ignore_errors=True)
                time.sleep(0.05)
            raise


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = False) -> Iterator[bool]:
    """Yields whether this process got a directory's lock, which the system frees when its holder dies.

    On Windows, and on file systems without locks, it never gets one.

    Args:
      wait: whether it waits for other holders.
    """
    is_locked = False
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # OSError: also where it is held, or the directory is gone
            import fcntl

            descriptor = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_locked = True
        yield is_locked


@contextlib.contextmanager
def _partial(path: Path, sync: bool) -> Iterator[Path]:
    """A name for a temporary file, which is removed afterwards; with `sync`, the directory is on disk then."""
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        _sync(path.parent)


@contextlib.contextmanager
def _opened(partial: Path, sync: bool) -> Iterator[BinaryIO]:
    with open(partial, "xb") as file:
        yield file
        if sync:
            file.flush()
            os.fsync(file.fileno())


def _write(content: Content, file: BinaryIO) -> None:
    if isinstance(content, Path):
        with open(content, "rb") as source:
            shutil.copyfileobj(source, file)
    else:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def _rename_if_new(partial: Path, path: Path) -> bool:
    """Renames a temporary file; False if there is a file of that name. A lock file makes this one step."""
    lock, began = path.with_name(f".{path.name}.partial"), time.monotonic()
    while True:
        try:
            lock.touch(exist_ok=False)
            break
        except FileExistsError:
            if time.monotonic() - began > _LOCK_SECONDS:  # of a process that was killed
                lock.unlink(missing_ok=True)
            time.sleep(0.01)
    try:
        if path.exists():
            return False
        os.rename(partial, path)
        return True
    finally:
        lock.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Puts the names of a directory's files on disk."""
    with contextlib.suppress(OSError):  # not every file system supports it
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
