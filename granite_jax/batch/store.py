"""The output directory of a job, local or on an object store: its files are complete even if a worker dies.

A file is created once and never changed (parts), or replaced as a whole (summaries). Local files are written under a
temporary name, flushed to disk and then linked (renamed where there are no links); an object store gets one conditional
put.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from granite_jax.audio.load import AccessError
from granite_jax.batch.access import STORES, check_store, retried, scheme
from granite_jax.errors import GraniteError
from granite_jax.files import atomic

# Object stores whose conditional put is atomic; "memory", in this process, is for tests.
_STORES = (*STORES, "memory")


class Store(Protocol):
    """An output directory."""

    def create(self, name: str, data: bytes | Path) -> bool:
        """Creates a file, all of it or nothing; False if it exists. `data` is its content, or a local file to copy."""
        ...

    def replace(self, name: str, data: bytes | Path) -> None:
        """As `create`, but replaces the file of this name if there is one."""
        ...

    def remove(self, *names: str) -> None:
        """Deletes files until that is not possible; ignores those that are missing."""
        ...

    def names(self) -> set[str]:
        """Names of all files except those being written."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Opens a file for reading. Raises FileNotFoundError."""
        ...


def open_store(out: str | os.PathLike[str], options: dict[str, Any] | None = None) -> Store:
    """The store of a directory, which is created if it is missing, or of a gs or s3 URL.

    Raises:
      GraniteError: it cannot be created, or its protocol is not supported.
    """
    out = os.fspath(out)
    protocol = scheme(out)
    if protocol is None:
        return LocalStore(Path(out))
    if protocol not in _STORES or "::" in out:
        raise GraniteError(f"{out}: results go to a directory, or to a gs or s3 URL")
    try:
        check_store(protocol, options or {})
        files = fsspec.filesystem(protocol, **(options or {}))
    except AccessError as error:
        raise GraniteError(f"{out}: {error}") from None
    except ImportError as error:
        raise GraniteError(f"{out}: needs pip install 'granite-jax[remote]' ({error})") from None
    return ObjectStore(files, out[len(protocol) + 3 :])


class LocalStore:
    """A local or mounted directory."""

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            atomic.remove_abandoned(directory)
        except OSError as error:
            raise GraniteError(f"{directory}: cannot be written to ({error.strerror or error})") from None

    def create(self, name: str, data: bytes | Path) -> bool:
        """As in `Store`."""
        return atomic.create(self.directory / name, data, sync=True)

    def replace(self, name: str, data: bytes | Path) -> None:
        """As in `Store`."""
        atomic.replace(self.directory / name, data, sync=True)

    def remove(self, *names: str) -> None:
        """As in `Store`."""
        with contextlib.suppress(OSError):
            for name in names:
                (self.directory / name).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """As in `Store`."""
        return {entry.name for entry in os.scandir(self.directory) if not entry.name.startswith(".")}

    def exists(self, name: str) -> bool:
        """As in `Store`."""
        return (self.directory / name).exists()

    def open(self, name: str) -> BinaryIO:
        """As in `Store`."""
        return open(self.directory / name, "rb")


class ObjectStore:
    """A prefix of an object store. Transient errors are retried."""

    def __init__(self, files: fsspec.AbstractFileSystem, prefix: str):
        self._files = files
        self._prefix = prefix.rstrip("/")

    def create(self, name: str, data: bytes | Path) -> bool:
        """As in `Store`."""
        try:
            self._put(name, data, mode="create")
        except FileExistsError:  # by another worker, or by a put whose answer was lost: the content is the same
            return False
        return True

    def replace(self, name: str, data: bytes | Path) -> None:
        """As in `Store`."""
        self._put(name, data, mode="overwrite")

    def remove(self, *names: str) -> None:
        """As in `Store`."""
        with contextlib.suppress(Exception):  # file systems can raise anything, as where deletion is forbidden
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))

    def names(self) -> set[str]:
        """As in `Store`."""

        def list_names() -> set[str]:
            self._files.invalidate_cache(self._prefix)
            try:
                return {path.rpartition("/")[2] for path in self._files.ls(self._prefix, detail=False)}
            except FileNotFoundError:
                return set()

        return retried(list_names)

    def exists(self, name: str) -> bool:
        """As in `Store`."""
        return retried(lambda: self._files.exists(self._path(name)))

    def open(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """As in `Store`."""
        return retried(lambda: self._files.open(self._path(name), "rb"))

    def _put(self, name: str, data: bytes | Path, mode: str) -> None:
        if isinstance(data, Path):
            retried(lambda: self._files.put_file(str(data), self._path(name), mode=mode))
        else:
            retried(lambda: self._files.pipe_file(self._path(name), data, mode=mode))

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"
