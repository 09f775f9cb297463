"""Writes checkpoint directories: a complete one, or nothing that looks like one."""

import contextlib
import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from granite_jax.checkpoint import orbax
from granite_jax.checkpoint.lora import Adapter
from granite_jax.checkpoint.tree import expected_shapes
from granite_jax.errors import CheckpointError
from granite_jax.models.family import ModelConfig

CONFIG, TOKENIZER, CHAT_TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"


def write_weights(
    directory: Path,
    raw_config: Mapping[str, Any] | Path,
    config: ModelConfig,
    leaves: orbax.Leaves,
    adapter: Adapter | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes `leaves` and then `config.json` into a directory that holds all other files already.

    Args:
      raw_config: the content of `config.json`, or a file to copy.
      config: the configuration that the leaves are checked against.

    Returns shape, dtype and hash of every leaf by dotted path. Raises CheckpointError naming leaves that do not belong.
    """
    records = orbax.write(directory, leaves, {**(adapter.shapes if adapter else {}), **expected_shapes(config)})
    write_config(directory, raw_config)
    return records


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
        with _locked(abandoned) as locked:
            if locked:
                shutil.rmtree(abandoned, ignore_errors=True)
    unlocked = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}"
    unlocked.mkdir()
    with _locked(unlocked):
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
def _locked(directory: Path) -> Iterator[bool]:
    """Yields whether this process got a directory's lock, which the system frees when its holder dies.

    On Windows it never gets one.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    descriptor = None
    try:
        try:
            descriptor = os.open(directory, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:  # held by another process, gone meanwhile, or on a file system without locks
            locked = False
        yield locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


def copy_files(files: Iterable[str | PathLike[str]], directory: Path) -> None:
    """Copies files into a directory under their own names."""
    for file in files:
        shutil.copyfile(file, directory / Path(file).name)


def write_config(directory: Path, config: Mapping[str, Any] | Path) -> None:
    """Writes `config.json` as Hugging Face formats it, or copies a file unchanged.

    It must be written last: a directory without it is no checkpoint.
    """
    if isinstance(config, Path):
        shutil.copyfile(config, directory / CONFIG)
    else:
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
