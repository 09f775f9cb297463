"""Checkpoints from a model hub, through `huggingface_hub`, with its cache, tokens and settings.

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

from granite_jax.checkpoint.lora import ALONE
from granite_jax.checkpoint.orbax import PARAMS, TENSORS
from granite_jax.checkpoint.save import CONFIG
from granite_jax.errors import CheckpointError

COMMIT = re.compile(r"[0-9a-f]{40}")
# In order of preference: only the first kind that a repository has is downloaded.
_WEIGHTS = (
    (TENSORS, f"{PARAMS}/*"),
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
# Further weights, where present.
_ADDITIONS = ("adapter_model.safetensors", "out_llm.safetensors")


def snapshot(repo_id: str, revision: str | None, companions: Iterable[str]) -> Path:
    """Downloads the needed files that are not in the cache of `huggingface_hub`; returns its directory of them.

    Args:
      revision: branch, tag or commit; default the main branch.
      companions: names of files to download, where present, besides configuration and weights.

    Raises:
      CheckpointError: naming repository and revision, if it does not exist, cannot be reached, or is damaged.
    """
    import huggingface_hub

    prefix = f"{repo_id}: no such directory, and as a hub id (revision {revision or 'main'})"
    try:
        files = _listing(repo_id, revision)
    except Exception as error:
        # Without a network, the cache can have the revision.
        with contextlib.suppress(Exception):
            local = {"local_files_only": True, "allow_patterns": [CONFIG]}  # even if incomplete: it cannot be completed
            return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, **local))
        raise CheckpointError(f"{prefix} it cannot be downloaded ({_reason(error)})") from error
    names = needed(files, companions)
    if CONFIG not in names:
        is_adapter = "adapter_config.json" in names
        raise CheckpointError(f"{prefix} it {ALONE if is_adapter else f'is no checkpoint, {CONFIG} is missing'}")
    try:
        # By name, not by commit: the client then records the name's commit, for use without a network.
        return Path(
            huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=names, endpoint=_endpoint())
        )
    except Exception as error:
        raise CheckpointError(f"{prefix} it cannot be downloaded ({_reason(error)})") from error


def needed(files: Iterable[str], companions: Iterable[str]) -> list[str]:
    """Selects the files to download from those of a repository."""
    # Names are used as patterns: skip those with wildcards or a path that leads out of the directory.
    plain = [name for name in files if re.fullmatch(r"[\w./-]+", name) and ".." not in name]
    selected = {name for name in plain if name in {CONFIG, *_ADDITIONS, *companions}}
    for patterns in _WEIGHTS:
        weights = [name for name in plain if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if any(name == pattern for name in weights for pattern in patterns):
            return sorted(selected.union(weights))
    return sorted(selected)


def verify(directory: Path) -> None:
    """Checks large files against the hub's SHA-256, which is their name in its client's cache.

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
        error = error.__cause__  # the hub's answer; the error itself always blames the connection
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]
