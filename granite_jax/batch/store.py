"""The output directory of a job, local or on an object store: what is in it is whole, whenever a worker dies.

A name is created once and never changes (parts), or replaced as a whole (summaries). Local files are written under a
temporary name, flushed to disk and then linked; an object store gets one conditional put.
"""

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec

from granite_jax.batch.access import retried, scheme
from granite_jax.errors import GraniteError

_STALE = 3600.0  # seconds after which a temporary file has no writer any more
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# Their conditional put is atomic. "memory" is a store of this process, for tests.
_STORES = ("gs", "s3", "memory")


class Store(Protocol):
    """An output directory."""

    def create(self, name: str, data: bytes | Path) -> bool:
        """Writes what is not there yet, all of it or nothing; False if it is there. `data` may be a local file."""
        ...

    def replace(self, name: str, data: Path) -> None:
        """Writes a local file's content, whether or not there is one of this name."""
        ...

    def names(self) -> set[str]:
        """Names of all files, without those that are being written."""
        ...

    def exists(self, name: str) -> bool:
        """Whether it is there."""
        ...

    def open(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to read. Raises FileNotFoundError."""
        ...


def open_store(out: str | os.PathLike[str], options: dict[str, Any] | None = None) -> Store:
    """The store of a directory, which is made if it is missing, or of a gs or s3 URL.

    Raises:
      GraniteError: it cannot be made, or its protocol is not supported.
    """
    out = os.fspath(out)
    protocol = scheme(out)
    if protocol is None:
        return LocalStore(Path(out))
    if protocol not in _STORES or "::" in out:
        raise GraniteError(f"{out}: results go to a directory, or to a gs or s3 URL")
    try:
        files = fsspec.filesystem(protocol, **(options or {}))
    except ImportError as error:
        raise GraniteError(f"{out}: needs pip install 'granite-jax[remote]' ({error})") from None
    return ObjectStore(files, out[len(protocol) + 3 :])


class LocalStore:
    """A directory of this machine, or one that is mounted on it."""

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.glob(".*.partial"):  # of workers that were killed
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _STALE:
                        path.unlink()
        except OSError as error:
            raise GraniteError(f"{directory}: cannot be written to ({error.strerror or error})") from None

    def create(self, name: str, data: bytes | Path) -> bool:
        """As of Store."""
        with self._written(name, data) as partial:
            try:
                os.link(partial, self.directory / name)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                # Without links a second worker replaces the first one's part, which is the same.
                if (self.directory / name).exists():
                    return False
                os.rename(partial, self.directory / name)
        self._flush()
        return True

    def replace(self, name: str, data: Path) -> None:
        """As of Store."""
        with self._written(name, data) as partial:
            os.replace(partial, self.directory / name)
        self._flush()

    def names(self) -> set[str]:
        """As of Store."""
        return {entry.name for entry in os.scandir(self.directory) if not entry.name.startswith(".")}

    def exists(self, name: str) -> bool:
        """As of Store."""
        return (self.directory / name).exists()

    def open(self, name: str) -> BinaryIO:
        """As of Store."""
        return open(self.directory / name, "rb")

    @contextlib.contextmanager
    def _written(self, name: str, data: bytes | Path) -> Iterator[Path]:
        """A temporary file that is on disk, to be linked or renamed; it is gone afterwards."""
        partial = self.directory / f".{name}-{uuid.uuid4().hex[:8]}.partial"
        try:
            with open(partial, "xb") as file:
                if isinstance(data, Path):
                    with open(data, "rb") as source:
                        shutil.copyfileobj(source, file)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        with contextlib.suppress(OSError):  # not every file system can
            descriptor = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class ObjectStore:
    """A prefix of an object store. What fails for reasons that may pass is tried again."""

    def __init__(self, files: fsspec.AbstractFileSystem, prefix: str):
        self._files = files
        self._prefix = prefix.rstrip("/")

    def create(self, name: str, data: bytes | Path) -> bool:
        """As of Store."""
        try:
            if isinstance(data, Path):
                retried(lambda: self._files.put_file(str(data), self._path(name), mode="create"))
            else:
                retried(lambda: self._files.pipe_file(self._path(name), data, mode="create"))
        except FileExistsError:  # of another worker, or of a put whose success was not heard of: the same
            return False
        return True

    def replace(self, name: str, data: Path) -> None:
        """As of Store."""
        retried(lambda: self._files.put_file(str(data), self._path(name)))

    def names(self) -> set[str]:
        """As of Store."""

        def list_names() -> set[str]:
            self._files.invalidate_cache(self._prefix)
            try:
                return {path.rpartition("/")[2] for path in self._files.ls(self._prefix, detail=False)}
            except FileNotFoundError:
                return set()

        return retried(list_names)

    def exists(self, name: str) -> bool:
        """As of Store."""
        return retried(lambda: self._files.exists(self._path(name)))

    def open(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """As of Store."""
        return retried(lambda: self._files.open(self._path(name), "rb"))

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"
