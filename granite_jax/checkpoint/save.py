"""The writing side of checkpoint directories: all of a directory, or nothing that looks like one."""

import contextlib
import json
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
from granite_jax.model.config import Config, read_json

CONFIG, TOKENIZER, CHAT_TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"


def write_weights(
    directory: Path, config: Mapping[str, Any] | Path, leaves: orbax.Leaves, adapter: Adapter | None = None
) -> dict[str, dict[str, Any]]:
    """Writes `leaves` and then `config.json` into a directory that holds all other files already.

    Returns shape, dtype and hash of every leaf by dotted path. Raises CheckpointError naming leaves that do not belong.
    """
    parsed = Config.from_dict(read_json(config) if isinstance(config, Path) else config)
    records = orbax.write(directory, leaves, {**(adapter.shapes if adapter else {}), **expected_shapes(parsed)})
    write_config(directory, config)
    return records


@contextlib.contextmanager
def new_directory(directory: str | PathLike[str], check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A directory to write into, which takes the name `directory` only if the block, and then `check`, succeed.

    Raises:
      CheckpointError: if `directory` is a file or a directory that is not empty.
    """
    final = Path(directory).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{final}: exists and is not an empty directory")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.parent / f".{final.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        if check is not None:
            check(partial)
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except BaseException:
        for _ in range(5):  # Orbax's threads may be writing still
            shutil.rmtree(partial, ignore_errors=True)
            time.sleep(0.05)
        raise


def copy_files(files: Iterable[str | PathLike[str]], directory: Path) -> None:
    """Copies files into a directory under their own names."""
    for file in files:
        shutil.copyfile(file, directory / Path(file).name)


def write_config(directory: Path, config: Mapping[str, Any] | Path) -> None:
    """Writes `config.json` as Hugging Face formats it, or copies a file as it is. The last file: without it a directory
    is no checkpoint."""
    if isinstance(config, Path):
        shutil.copyfile(config, directory / CONFIG)
    else:
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
