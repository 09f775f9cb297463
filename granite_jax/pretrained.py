"""Opens, loads and saves checkpoints by name.

Hub ids are downloaded through `huggingface_hub`. Hugging Face checkpoints of a hub are converted once, into this
program's directory of the user's cache, by commit.
"""

import shutil
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from granite_jax.checkpoint import hub
from granite_jax.checkpoint.directory import COMPANIONS, Checkpoint
from granite_jax.checkpoint.orbax import PARAMS
from granite_jax.checkpoint.save import CHAT_TEMPLATE, CONFIG, TOKENIZER, copy_files, write_weights
from granite_jax.checkpoint.source import local_directory
from granite_jax.checkpoint.tree import flatten
from granite_jax.convert import adapter as adapters
from granite_jax.convert.api import convert
from granite_jax.convert.directory import open_directory
from granite_jax.errors import CheckpointError
from granite_jax.files import paths
from granite_jax.files.atomic import new_directory
from granite_jax.files.json_fields import read_json
from granite_jax.models.registry import read_config

_CONVERTED = "checkpoints-2"  # another name whenever conversions carry more than those before


def open_checkpoint(source: str | PathLike[str], revision: str | None = None) -> Checkpoint:
    """Opens "demo" (the model in this package), a directory of this program, a Hugging Face directory or a hub id.

    Args:
      revision: branch, tag or commit of a hub id.

    Raises:
      CheckpointError: naming the directory and what is wrong with it.
      BackendError: JAX, which Orbax and the weights need, cannot start.
    """
    directory = local_directory(source, revision)
    return open_directory(_converted_snapshot(str(source), revision) if directory is None else directory)


def load(
    source: str | PathLike[str], dtype: Any = None, *, revision: str | None = None, adapter: bool = True
) -> tuple[Any, dict[str, Any]]:
    """Loads `(config, params)`: `open_checkpoint(source, revision)` and its `load_params(dtype, adapter=adapter)`."""
    checkpoint = open_checkpoint(source, revision)
    return checkpoint.config, checkpoint.load_params(dtype, adapter=adapter)


def save(
    directory: str | PathLike[str],
    config: Mapping[str, Any] | Path,
    params: Mapping[str, Any],
    *,
    tokenizer_file: str | PathLike[str] | None = None,
    chat_template: str | None = None,
    extra_files: Iterable[str | PathLike[str]] = (),
) -> None:
    """Writes a checkpoint directory, all of it or nothing.

    Args:
      directory: must not exist, or be empty.
      config: the dictionary of a Hugging Face `config.json`, or a file to copy unchanged.
      params: the parameter tree, of numpy or jax arrays; an adapter's subtree `lora` requires its
        `adapter_config.json` among `extra_files`.
      tokenizer_file: becomes `tokenizer.json`.
      chat_template: Jinja source, becomes `chat_template.jinja`.
      extra_files: copied under their own names.

    Raises:
      CheckpointError: if the directory is not empty, or naming leaves that do not belong to `config`.
    """
    with new_directory(directory) as partial:
        copy_files(extra_files, partial)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, partial / TOKENIZER)
        if chat_template is not None:
            (partial / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        leaves = flatten(params)
        shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
        parsed = read_config(read_json(config) if isinstance(config, Path) else config, shapes)
        write_weights(partial, config, parsed, leaves.items(), adapters.read(partial, parsed))


def _converted_snapshot(repo_id: str, revision: str | None) -> Path:
    """The directory of a repository's checkpoint, converted to Orbax on first use.

    A commit that was converted before needs neither the network nor the downloaded files.
    Raises CheckpointError as `hub.snapshot` and the conversion do.
    """
    if revision is not None and hub.COMMIT.fullmatch(revision):
        converted = _converted(repo_id, revision)
        if converted is not None:
            return converted
    directory = hub.snapshot(repo_id, revision, COMPANIONS)
    if (directory / PARAMS).is_dir():
        return directory
    converted = _converted(repo_id, directory.name)
    if converted is not None:
        return converted
    destination = _cache_path(repo_id, directory.name)
    try:
        convert(directory, destination)
    except (CheckpointError, OSError) as error:
        if _converted(repo_id, directory.name) is None:  # otherwise another process was faster
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{destination}: cannot be written ({error.strerror})") from error
    return destination


def _cache_path(repo_id: str, commit: str) -> Path:
    return paths.cache_directory() / _CONVERTED / repo_id.replace("/", "--") / commit


def _converted(repo_id: str, commit: str) -> Path | None:
    directory = _cache_path(repo_id, commit)
    return directory if (directory / CONFIG).is_file() else None
