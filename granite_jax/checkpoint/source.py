"""Names of checkpoints: "demo", a directory, or the id of a repository on a model hub."""

import contextlib
import os
import re
from os import PathLike
from pathlib import Path

from granite_jax.errors import CheckpointError

_PACKAGE = Path(__file__).parents[1]
DEMO = (_PACKAGE if (_PACKAGE / "checkpoints").is_dir() else _PACKAGE.parent) / "checkpoints" / "demo"
"""The embedded checkpoint. In a clone without symbolic links, it is beside the package."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def local_directory(source: str | PathLike[str], revision: str | None = None) -> Path | None:
    """The directory that `source` names; None if it is a hub id. What looks like a path is never one.

    Raises:
      CheckpointError: naming the source, if there is no such directory, or a revision is given for one.
    """
    path = DEMO if source == "demo" else Path(os.path.expanduser(source))
    with contextlib.suppress(OSError):  # e.g. a name too long to exist
        if path.is_dir():
            if revision is not None:
                raise CheckpointError(f"{source}: is a directory; revision {revision!r:.60} is for hub ids")
            return path
        if path.exists():
            raise CheckpointError(f"{path}: not a directory")
    is_path = not isinstance(source, str) or source in ("", "demo") or source[0] == "." or not _HUB_ID.fullmatch(source)
    if is_path or ("/" in str(source) and path.parent.is_dir()):
        raise CheckpointError(f"{source}: no such directory")
    return None
