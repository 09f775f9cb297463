"""Checkpoint directories: open, load and save.

A checkpoint of this program is a directory of

    config.json          as Hugging Face has it
    params/              Orbax, the parameter tree
    tensors.json         shape, dtype and SHA-256 of every tensor
    tokenizer.json       and further files that came with the model
    chat_template.jinja

Hugging Face directories (`config.json`, `model.safetensors` or shards) are read directly as well.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from granite_jax import _orbax
from granite_jax._tree import expected_shapes, flatten, unflatten
from granite_jax.config import Config, read_json
from granite_jax.errors import CheckpointError
from granite_jax.prompts import Capabilities, ChatTemplate
from granite_jax.tokenizer import Tokenizer

CONFIG, TOKENIZER, CHAT_TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"
# Copied along by a conversion when present. Nothing else is: a directory may hold anything.
COMPANIONS = (
    TOKENIZER,
    CHAT_TEMPLATE,
    "chat_template.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "README.md",
    "LICENSE",
)
_DEMO = Path(__file__).parent / "checkpoints" / "demo"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened directory: its configuration is read and checked, its weights are not yet."""

    directory: Path
    kind: Literal["orbax", "hf"]
    config: Config
    raw_config: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)  # config.json

    def load_params(self, dtype: Any = None, sharding: Any = None, verify: bool = True) -> dict[str, Any]:
        """Loads the weights onto devices.

        Args:
          dtype: "float32" or "bfloat16"; default `default_dtype()`.
          sharding: a `jax.sharding.Sharding` for all leaves, or a tree of them; default the default device.
          verify: check every tensor's hash (Hugging Face directories have none). False restores an Orbax checkpoint
            straight into `sharding`, without ever holding it in host memory.

        Raises:
          CheckpointError: naming what is damaged, missing, unexpected or misshapen.
        """
        chosen = parse_dtype(dtype)
        shardings = self._shardings(sharding)
        if self.kind == "orbax" and not verify:
            return _orbax.read_into(self.directory, self.config, chosen, shardings)
        host = flatten(self.read(verify))
        params = {}
        for path in list(host):  # leaf by leaf, so that host and device hold one leaf twice and not all
            leaf = host.pop(path).astype(chosen, copy=False)
            params[path] = jax.make_array_from_callback(leaf.shape, shardings[path], lambda i, leaf=leaf: leaf[i])
        return unflatten(params)

    def read(self, verify: bool = True) -> dict[str, Any]:
        """The weights as nested numpy arrays in the dtype they are stored in. Raises as `load_params`."""
        if self.kind == "orbax":
            return _orbax.read(self.directory, self.config, verify)
        from granite_jax.convert.reader import read_params  # here, because converting needs this module

        return read_params(self.directory, self.config)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `tokenizer.json`.

        Raises:
          CheckpointError: the file is missing or unreadable, or its ids are not those of `config`.
        """
        # transformers 5 cuts text by GPT-2's rule for this class, whatever the file says.
        gpt2 = str(self._tokenizer_config.get("tokenizer_class")).removesuffix("Fast") == "GPT2Tokenizer"
        path = self.directory / TOKENIZER
        tokenizer = Tokenizer.from_file(path, pre_tokenizer="gpt2" if gpt2 else "file")
        vocab_size, audio_id = self.config.decoder.vocab_size, self.config.audio_token_id
        if tokenizer.vocab_size > vocab_size:
            raise CheckpointError(f"{path}: has {tokenizer.vocab_size} tokens, the model {vocab_size}")
        try:
            found = tokenizer.special_id(ChatTemplate.audio_token)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if found != audio_id:
            raise CheckpointError(f"{path}: {ChatTemplate.audio_token} is token {found}, but {audio_id} in config.json")
        return tokenizer

    def chat_template(self) -> ChatTemplate:
        """The chat template, from whichever file carries it; Granite Speech 4.0's if none does."""
        special = {}
        for key in ("bos_token", "eos_token"):
            token = self._tokenizer_config.get(key)
            token = token.get("content") if isinstance(token, Mapping) else token
            special |= {key: token} if isinstance(token, str) else {}
        return ChatTemplate(self._chat_template_source(), **special)

    @property
    def capabilities(self) -> Capabilities:
        """What the model was trained for, from `granite_jax` in `config.json`."""
        return Capabilities.from_config(self.raw_config)

    @property
    def _tokenizer_config(self) -> dict[str, Any]:
        path = self.directory / "tokenizer_config.json"
        return read_json(path) if path.is_file() else {}

    def _chat_template_source(self) -> str | None:
        path = self.directory / CHAT_TEMPLATE
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}: not a readable text file ({error})") from error
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            path = self.directory / name
            template = read_json(path).get("chat_template") if path.is_file() else None
            if isinstance(template, list):  # of named templates
                named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, Mapping)}
                template = named.get("default")
            if isinstance(template, str):
                return template
        return None

    def _shardings(self, sharding: Any) -> dict[str, jax.sharding.Sharding]:
        paths = expected_shapes(self.config)
        if isinstance(sharding, Mapping):
            return flatten(sharding)
        return dict.fromkeys(paths, jnp.zeros(()).sharding if sharding is None else sharding)


def open_checkpoint(source: str | PathLike[str]) -> Checkpoint:
    """Opens "demo" (the model in this package), a directory of this program, or a Hugging Face directory.

    Raises:
      CheckpointError: naming the directory and what is wrong with it.
    """
    directory = _resolve(source)
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory}: no checkpoint, {CONFIG} is missing")
    is_orbax = (directory / _orbax.PARAMS).is_dir()
    is_hf = any((directory / name).is_file() for name in _HF_WEIGHTS)
    if is_orbax == is_hf:
        found = "both params/ and" if is_orbax else "neither params/ nor"
        raise CheckpointError(f"{directory}: holds {found} {_HF_WEIGHTS[0]}")
    raw = read_json(directory / CONFIG)
    try:
        return Checkpoint(directory, "orbax" if is_orbax else "hf", Config.from_dict(raw), raw)
    except CheckpointError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from None


def load(source: str | PathLike[str], dtype: Any = None) -> tuple[Config, dict[str, Any]]:
    """Loads `(config, params)`: `open_checkpoint(source)` and its `load_params(dtype)`."""
    checkpoint = open_checkpoint(source)
    return checkpoint.config, checkpoint.load_params(dtype)


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
      config: the dictionary of a Hugging Face `config.json`, or the file to be copied as it is.
      params: the parameter tree, of numpy or jax arrays.
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
        write_config(partial, config)
        _orbax.write(partial, Config.from_file(partial / CONFIG), params)


@contextlib.contextmanager
def new_directory(directory: str | PathLike[str]) -> Iterator[Path]:
    """A directory to write into, which takes the name `directory` only if the block succeeds.

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
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_files(files: Iterable[str | PathLike[str]], directory: Path) -> None:
    """Copies files into a directory under their own names."""
    for file in files:
        shutil.copyfile(file, directory / Path(file).name)


def write_config(directory: Path, config: Mapping[str, Any] | Path) -> None:
    """Writes `config.json` as Hugging Face formats it, or copies a file as it is."""
    if isinstance(config, Path):
        shutil.copyfile(config, directory / CONFIG)
    else:
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def default_dtype() -> np.dtype:
    """bfloat16 on TPUs and on GPUs that have it (compute capability 8.0), float32 elsewhere."""
    device = jax.devices()[0]
    capability = re.match(r"(\d+)\.", str(getattr(device, "compute_capability", "")))
    has_bfloat16 = device.platform == "tpu" or (capability is not None and int(capability[1]) >= 8)
    return np.dtype(jnp.bfloat16 if has_bfloat16 else jnp.float32)


def parse_dtype(dtype: Any) -> np.dtype:
    """The dtype of "float32", "bfloat16" or their types; `default_dtype()` for None. Raises CheckpointError."""
    if dtype is None:
        return default_dtype()
    for supported in (jnp.float32, jnp.bfloat16):
        if dtype in (np.dtype(supported).name, supported, np.dtype(supported)):
            return np.dtype(supported)
    raise CheckpointError(f'dtype {dtype!r} is not supported, only "float32" and "bfloat16"')


def _resolve(source: str | PathLike[str]) -> Path:
    if source == "demo":
        return _DEMO
    path = Path(os.path.expanduser(source))
    with contextlib.suppress(OSError):  # e.g. a name too long to exist
        if path.is_dir():
            return path
        if path.exists():
            raise CheckpointError(f"{path}: not a directory")
    is_path = not isinstance(source, str) or source.startswith(".") or not _HUB_ID.fullmatch(source)
    if is_path or ("/" in str(source) and path.parent.is_dir()):
        raise CheckpointError(f"{source}: no such directory")
    raise CheckpointError(
        f"{source}: no such directory, and downloading from a hub is not built in yet: download it and pass its directory"
    )
