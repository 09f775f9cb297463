"""Files of a checkpoint directory that nobody vouches for: what is read stays inside the directory."""

import os
from pathlib import Path

from granite_jax.errors import CheckpointError


def find(directory: Path, name: str) -> Path | None:
    """The regular file `name` of `directory`, or None.

    Raises:
      CheckpointError: the name has a directory in it, or is a link that leads out of the directory. In the cache of
        huggingface_hub (`snapshots/COMMIT/name` links to `blobs/HASH`) links may lead to its own blobs.
    """
    if Path(name).name != name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{directory}: {name!a:.200} is not a file of this directory")
    path = directory / name
    try:
        target = path.resolve()
        if not path.is_file():
            return None
    except (OSError, RuntimeError):  # a name too long to exist, a loop of links
        return None
    if path.is_symlink() and not any(target.is_relative_to(root) for root in _roots(directory)):
        raise CheckpointError(f"{path}: is a link that leads out of the directory")
    return path


def require(directory: Path, name: str) -> Path:
    """As `find`, but raises CheckpointError if there is no such file."""
    path = find(directory, name)
    if path is None:
        raise CheckpointError(f"{directory / name}: no such file")
    return path


def check_links(directory: Path) -> int:
    """Bytes of all files below `directory`. Raises CheckpointError naming a link that leads out of it."""
    roots, size = _roots(directory), 0
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(parent, name)
            if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
                raise CheckpointError(f"{path}: is a link that leads out of the directory")
        size += sum(os.path.getsize(path) for name in files if os.path.isfile(path := os.path.join(parent, name)))
    return size


def cache_directory() -> Path:
    """This program's directory in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granite_jax"


def _roots(directory: Path) -> list[Path]:
    own = directory.absolute()
    snapshots = [parent for parent in (own, *own.parents) if parent.parent.name == "snapshots"]
    return [own.resolve(), *(snapshot.parents[1].resolve() / "blobs" for snapshot in snapshots)]
