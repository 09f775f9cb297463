"""Writes the files of checkpoint directories."""

import json
import shutil
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from granite_jax.checkpoint import orbax
from granite_jax.checkpoint.lora import Adapter
from granite_jax.checkpoint.tree import expected_shapes
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
