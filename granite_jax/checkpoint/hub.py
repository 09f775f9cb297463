"""Checkpoints from a model hub, through `huggingface_hub`: its cache, its tokens and settings.

Only the files that are needed are downloaded, and after an interruption only those that are missing. Hugging Face
checkpoints are converted once, into this program's directory of the user's cache, by commit.
"""

import contextlib
import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from granite_jax.checkpoint.orbax import PARAMS, TENSORS
from granite_jax.checkpoint.save import CONFIG
from granite_jax.errors import CheckpointError

COMMIT = re.compile(r"[0-9a-f]{40}")
# In order of preference; the first kind that a repository has is taken, the others are left where they are.
_WEIGHTS = (
    (TENSORS, f"{PARAMS}/*"),
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
_ADAPTER = "adapter_model.safetensors"


def snapshot(repo_id: str, revision: str | None, companions: Iterable[str]) -> Path:
    """Downloads what is needed of a repository and is not in the cache: the directory of `huggingface_hub` with it.

    Args:
      revision: branch, tag or commit; default the main branch.
      companions: names of files that are wanted besides configuration and weights, where there are any.

    Raises:
      CheckpointError: naming repository and revision, if it does not exist, cannot be reached, or is damaged.
    """
    import huggingface_hub

    where = f"{repo_id}: no such directory, and as a hub id (revision {revision or 'main'})"
    try:
        files = _listing(repo_id, revision)
    except Exception as error:
        # Without a network the cache may know the revision.
        with contextlib.suppress(Exception):
            local = {"local_files_only": True, "allow_patterns": [CONFIG]}  # complete or not: it cannot be completed
            return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, **local))
        raise CheckpointError(f"{where} it cannot be downloaded ({_reason(error)})") from error
    wanted = needed(files, companions)
    if CONFIG not in wanted:
        raise CheckpointError(f"{where} it is no checkpoint, {CONFIG} is missing")
    try:
        # By its name, not its commit: the client then notes which commit the name is of, for when there is no network.
        return Path(
            huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted, endpoint=_endpoint())
        )
    except Exception as error:
        raise CheckpointError(f"{where} it cannot be downloaded ({_reason(error)})") from error


def needed(files: Iterable[str], companions: Iterable[str]) -> list[str]:
    """Of a repository's files, those to be downloaded."""
    # A name is used as a pattern: one with wildcards, or a way out of the directory, is none of ours.
    plain = [name for name in files if re.fullmatch(r"[\w./-]+", name) and ".." not in name]
    wanted = {name for name in plain if name in {CONFIG, _ADAPTER, *companions}}
    for patterns in _WEIGHTS:
        weights = [name for name in plain if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if any(name == pattern for name in weights for pattern in patterns):
            return sorted(wanted.union(weights))
    return sorted(wanted)


def verify(directory: Path) -> None:
    """Checks large files against the SHA-256 that the hub announced, by which its client names them in the cache.

    Raises CheckpointError naming the file that differs.
    """
    for file in sorted(file for file in directory.iterdir() if file.is_symlink() and os.path.isfile(file)):
        blob = file.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            with open(blob, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != blob.name:
                    raise CheckpointError(f"{file}: damaged (its SHA-256 is not the hub's): delete {blob}")


def _listing(repo_id: str, revision: str | None) -> list[str]:
    """File names of a revision."""
    import huggingface_hub

    info: Any = huggingface_hub.HfApi(endpoint=_endpoint()).model_info(repo_id, revision=revision)
    if not COMMIT.fullmatch(str(info.sha)):  # it becomes a directory's name
        raise CheckpointError(f"the hub names no commit, but {info.sha!a:.60}")
    return [file.rfilename for file in info.siblings or ()]


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None  # huggingface_hub itself reads it only when it is imported


def _reason(error: BaseException) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the hub's answer; the error itself tells of the connection, whatever went wrong
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]
