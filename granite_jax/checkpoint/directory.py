"""Checkpoint directories: open, load and save.

A checkpoint of this program is a directory of

    config.json          as Hugging Face has it
    params/              Orbax, the parameter tree
    tensors.json         shape, dtype and SHA-256 of every tensor
    tokenizer.json       and further files that came with the model
    chat_template.jinja

Hugging Face directories (`config.json`, `model.safetensors` or shards) are read directly as well, and hub ids through
`huggingface_hub`: what is downloaded is converted once and kept in the user's cache.
"""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from granite_jax.checkpoint import files, orbax
from granite_jax.checkpoint.save import CHAT_TEMPLATE, CONFIG, TOKENIZER, save, stored_shapes
from granite_jax.checkpoint.tree import Shape, expected_shapes, flatten, raise_named, unflatten
from granite_jax.errors import CheckpointError
from granite_jax.model.config import Config, read_json
from granite_jax.text.tasks import Capabilities, ChatTemplate
from granite_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from granite_jax.convert.adapter import AdapterConfig

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
    "adapter_config.json",
    "README.md",
    "LICENSE",
)

__all__ = ["COMPANIONS", "Checkpoint", "default_dtype", "load", "open_checkpoint", "parse_dtype", "save"]

_DEMO = Path(__file__).parent / "checkpoints" / "demo"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_HF_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened directory: its configuration is read and checked, its weights are not yet."""

    directory: Path
    kind: Literal["orbax", "hf"]
    config: Config
    raw_config: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)  # config.json

    def load_params(
        self, dtype: Any = None, sharding: Any = None, verify: bool = True, *, adapter: bool = True
    ) -> dict[str, Any]:
        """Loads the weights onto devices, leaf by leaf: the host never holds more than a few leaves.

        Args:
          dtype: "float32" or "bfloat16"; default `default_dtype()`.
          sharding: a `jax.sharding.Sharding` for all leaves, or a tree of them; default the default device.
          verify: check every leaf's hash (Hugging Face directories have none). False restores an Orbax checkpoint
            without an adapter straight into `sharding`, past the host's memory where the device allows.
          adapter: merge a LoRA adapter into the weights, in float32, as input with audio needs it. False leaves the
            language model as it is for text alone.

        Raises:
          CheckpointError: naming what is damaged, missing, unexpected or misshapen, or leaves for which a tree of
            shardings has none.
        """
        chosen = parse_dtype(dtype)
        shardings = self._shardings(sharding)
        lora = self.adapter if adapter else None
        if self.kind == "orbax" and not verify and lora is None:
            return orbax.read_into(self.directory, stored_shapes(self.directory, self.config), chosen, shardings)
        from granite_jax.convert import adapter as adapters  # here, because converting needs this module

        scales = {} if lora is None else adapters.scales(lora, self.config)
        factors, params = {}, {}
        for path, leaf in self.leaves(verify, adapter=adapter):
            if path not in shardings:
                factors[path] = leaf
                continue
            if path in scales:
                a, b = (factors[name] for name in adapters.factor_paths(path))
                leaf = adapters.merge(leaf, a, b, scales[path], chosen)
            leaf = leaf.astype(chosen, copy=False)
            array = jax.make_array_from_callback(leaf.shape, shardings[path], lambda index, leaf=leaf: leaf[index])
            params[path] = array.block_until_ready()  # or the leaves still on their way would add up
        return unflatten(params)

    def leaves(
        self, verify: bool = True, *, adapter: bool = True, paths: Iterable[str] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Reads leaf by leaf: dotted path and numpy array of the dtype it is stored in; those of an adapter come first.

        Args:
          verify, adapter: as of `load_params`.
          paths: read these leaves alone, in this order (Orbax only).
        """
        if self.kind == "hf":
            assert paths is None, "Hugging Face files are read in their own order"
            from granite_jax.convert.reader import read_leaves

            yield from read_leaves(self.directory, self.config, with_adapter=adapter and self.adapter is not None)
            return
        expected = stored_shapes(self.directory, self.config)
        if paths is None:
            paths = [path for path in expected if adapter or path in expected_shapes(self.config)]
        yield from orbax.read(self.directory, expected, verify, paths)

    def read(self, verify: bool = True) -> dict[str, Any]:
        """All weights as nested numpy arrays, an adapter's under `lora`. Raises as `load_params`."""
        return unflatten(dict(self.leaves(verify)))

    def stored(self) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype of every leaf by dotted path; no weights are read. Raises as `load_params`."""
        if self.kind == "hf":
            from granite_jax.convert.reader import open_plans

            with open_plans(self.directory, self.config) as plans:
                return {plan.path: (plan.shape, plan.dtype.name) for plan in plans}
        expected = stored_shapes(self.directory, self.config)
        dtypes = orbax.stored_dtypes(self.directory, expected)
        return {path: (expected[path], dtype.name) for path, dtype in dtypes.items()}

    @functools.cached_property
    def adapter(self) -> "AdapterConfig | None":
        """The LoRA adapter's configuration, or None if the checkpoint has none.

        Raises:
          CheckpointError: it is not supported, or config.json announces one that is missing.
        """
        from granite_jax.convert import adapter as adapters

        lora = adapters.read_config(self.directory)
        if lora is None and self.raw_config.get("has_lora_adapter"):
            raise CheckpointError(
                f"{self.directory}: {CONFIG} announces a LoRA adapter, but {adapters.CONFIG} is missing "
                "(adapter=False loads for text alone)"
            )
        return lora

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `tokenizer.json`.

        Raises:
          CheckpointError: the file is missing or unreadable, or its ids are not those of `config`.
        """
        # transformers 5 cuts text by GPT-2's rule for this class, whatever the file says.
        gpt2 = str(self._tokenizer_config.get("tokenizer_class")).removesuffix("Fast") == "GPT2Tokenizer"
        path = files.require(self.directory, TOKENIZER)
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
        path = files.find(self.directory, "tokenizer_config.json")
        return read_json(path) if path is not None else {}

    def _chat_template_source(self) -> str | None:
        path = files.find(self.directory, CHAT_TEMPLATE)
        if path is not None:
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}: not a readable text file ({error})") from error
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            path = files.find(self.directory, name)
            template = read_json(path).get("chat_template") if path is not None else None
            if isinstance(template, list):  # of named templates
                named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, Mapping)}
                template = named.get("default")
            if isinstance(template, str):
                return template
        return None

    def _shardings(self, sharding: Any) -> dict[str, jax.sharding.Sharding]:
        paths = expected_shapes(self.config)
        if isinstance(sharding, Mapping):
            found = flatten(sharding)
            raise_named("no sharding for", [path for path in paths if path not in found])
            raise_named("a sharding for what is no leaf:", [path for path in found if path not in paths])
            return found
        return dict.fromkeys(paths, jnp.zeros(()).sharding if sharding is None else sharding)


def open_checkpoint(source: str | PathLike[str], revision: str | None = None, *, converted: bool = True) -> Checkpoint:
    """Opens "demo" (the model in this package), a directory of this program, a Hugging Face directory or a hub id.

    Args:
      revision: branch, tag or commit of a hub id.
      converted: convert what comes from a hub to Orbax, once; False opens it as downloaded.

    Raises:
      CheckpointError: naming the directory and what is wrong with it.
    """
    directory = _resolve(source, revision, converted)
    path = files.find(directory, CONFIG)
    if path is None:
        raise CheckpointError(f"{directory}: no checkpoint, {CONFIG} is missing")
    is_orbax = (directory / orbax.PARAMS).is_dir()
    is_hf = any((directory / name).is_file() for name in _HF_WEIGHTS)
    if is_orbax == is_hf:
        found = "both params/ and" if is_orbax else "neither params/ nor"
        raise CheckpointError(f"{directory}: holds {found} {_HF_WEIGHTS[0]}")
    raw = read_json(path)
    try:
        return Checkpoint(directory, "orbax" if is_orbax else "hf", Config.from_dict(raw), raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load(
    source: str | PathLike[str], dtype: Any = None, *, revision: str | None = None, adapter: bool = True
) -> tuple[Config, dict[str, Any]]:
    """Loads `(config, params)`: `open_checkpoint(source, revision)` and its `load_params(dtype, adapter=adapter)`."""
    checkpoint = open_checkpoint(source, revision)
    return checkpoint.config, checkpoint.load_params(dtype, adapter=adapter)


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


def _resolve(source: str | PathLike[str], revision: str | None, converted: bool) -> Path:
    path = _DEMO if source == "demo" else Path(os.path.expanduser(source))
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
    from granite_jax.checkpoint import hub

    return (hub.converted if converted else hub.snapshot)(str(source), revision, COMPANIONS)
