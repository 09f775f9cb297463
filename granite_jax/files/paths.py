"""Finds files of an untrusted checkpoint directory: links must not lead out of it."""

import os
from pathlib import Path

from granite_jax.errors import CheckpointError
from granite_jax.files import git_lfs


def find(directory: Path, name: str) -> Path | None:
    """The regular file `name` of `directory`, or None.

    Raises:
      CheckpointError: the name contains a directory; it is a link that leads out of the directory; or the file cannot
        be read, or is a Git LFS pointer. In the cache of huggingface_hub (`snapshots/COMMIT/name` links to
        `blobs/HASH`) links may lead to its blobs.
    """
    if Path(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{directory}: {name!a:.200} is not a file of this directory")
    path = directory / name
    if not os.path.isfile(path):
        return None
    _check_link(path, _roots(directory))
    _check_content(path)
    return path


def require(directory: Path, name: str) -> Path:
    """As `find`, but raises CheckpointError if there is no such file."""
    path = find(directory, name)
    if path is None:
        raise CheckpointError(f"{directory / (name if name.isprintable() else ascii(name))}: no such file")
    return path


def check_links(directory: Path) -> int:
    """Bytes of all files below `directory`. Raises CheckpointError naming a link that leads out, or a special file."""
    roots, size = _roots(directory), 0
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            _check_link(Path(parent, name), roots)
        for path in (Path(parent, name) for name in files):
            if not os.path.isfile(path):  # reading a pipe would block forever
                raise CheckpointError(f"{path}: is no file")
            _check_content(path)
            size += os.path.getsize(path)
    return size


def cache_directory() -> Path:
    """This program's directory in the user's cache. Raises CheckpointError if the user has no home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granite_jax"
    except RuntimeError:
        raise CheckpointError("there is no home directory for the cache: XDG_CACHE_HOME sets another one") from None


def _check_link(path: Path, roots: list[Path]) -> None:
    # realpath, because Path.resolve() raises for a loop of links.
    if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path}: is a link that leads out of the directory")


def _check_content(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            head = file.read(git_lfs.HEAD)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if git_lfs.is_pointer(head):
        raise CheckpointError(f"{path}: {git_lfs.PROBLEM}")


def _roots(directory: Path) -> list[Path]:
    directory = directory.absolute()
    snapshots = [parent for parent in (directory, *directory.parents) if parent.parent.name == "snapshots"]
    return [directory.resolve(), *(snapshot.parents[1].resolve() / "blobs" for snapshot in snapshots)]
