"""Opened checkpoint directories: configuration, weights, tokenizer, chat template.

A checkpoint of this program is a directory with

    config.json          in Hugging Face's format
    params/              Orbax, the parameter tree
    tensors.json         shape, dtype and SHA-256 of every tensor
    tokenizer.json       and further files that came with the model
    chat_template.jinja

`granite_jax.convert` opens Hugging Face directories as the same kind of object.
"""

import abc
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from granite_jax.array_types import Shape
from granite_jax.checkpoint import lora, orbax
from granite_jax.checkpoint.save import CHAT_TEMPLATE, CONFIG, TOKENIZER
from granite_jax.checkpoint.tree import expected_shapes, flatten, raise_named, unflatten
from granite_jax.errors import CheckpointError, PromptError
from granite_jax.files import paths
from granite_jax.files.json_fields import read_json
from granite_jax.models.family import Family, ModelConfig, Release
from granite_jax.models.registry import family_of, release_of
from granite_jax.text.tasks import Capabilities, ChatTemplate
from granite_jax.text.tokenizer import Tokenizer

# A conversion copies these files, where present, and no others: a directory can contain anything.
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


@dataclasses.dataclass(frozen=True)
class Checkpoint(abc.ABC):
    """An opened directory: its configuration is read and checked, its weights are not yet.

    Fields:
      raw_config: the dictionary of `config.json`.
      read_adapter: reads the directory's LoRA adapter, if it has one.
    """

    kind: ClassVar[Literal["orbax", "hf"]]

    directory: Path
    config: Any
    raw_config: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)
    read_adapter: Callable[[Path, ModelConfig], lora.Adapter | None] = dataclasses.field(repr=False, compare=False)

    @abc.abstractmethod
    def leaves(
        self, verify: bool = True, *, adapter: bool = True, paths: Iterable[str] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Reads leaf by leaf: dotted path and numpy array of the stored dtype; an adapter's leaves come first.

        Args:
          verify, adapter: as in `load_params`.
          paths: read only these leaves, in this order (Orbax only).
        """

    @abc.abstractmethod
    def stored(self) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype of every leaf by dotted path; no weights are read. Raises as `load_params`."""

    @jax.transfer_guard("allow")  # as in `Engine`
    def load_params(
        self, dtype: Any = None, sharding: Any = None, verify: bool = True, *, adapter: bool = True
    ) -> dict[str, Any]:
        """Loads the weights onto devices, leaf by leaf: the host never holds more than a few leaves.

        Args:
          dtype: "float32" or "bfloat16"; default `default_dtype()`.
          sharding: a `jax.sharding.Sharding` for all leaves, or a tree of them; default the default device.
          verify: check every leaf's hash (Hugging Face directories have none). False restores an Orbax checkpoint
            without an adapter straight into `sharding`, past the host's memory where the device allows.
          adapter: merge a LoRA adapter into the weights, in float32, as input with audio requires. False leaves the
            language model unmerged, for input without audio.

        Raises:
          CheckpointError: naming what is damaged, missing, unexpected or misshapen, or leaves for which a tree of
            shardings has none.
        """
        target_dtype = parse_dtype(dtype)
        shardings = self._shardings(sharding)
        scales = self.adapter.scales if adapter and self.adapter is not None else {}
        factors, params = {}, {}
        for path, leaf in self.leaves(verify, adapter=adapter):
            if path not in shardings:
                factors[path] = leaf
                continue
            if path in scales:
                a, b = (factors[name] for name in lora.factor_paths(path))
                leaf = lora.merge(leaf, a, b, scales[path], target_dtype)
            leaf = leaf.astype(target_dtype, copy=False)
            array = jax.make_array_from_callback(leaf.shape, shardings[path], lambda index, leaf=leaf: leaf[index])
            params[path] = array.block_until_ready()  # or leaves in transit would add up
        return unflatten(params)

    def read(self, verify: bool = True) -> dict[str, Any]:
        """All weights as nested numpy arrays, an adapter's under `lora`. Raises as `load_params`."""
        return unflatten(dict(self.leaves(verify)))

    @functools.cached_property
    def adapter(self) -> lora.Adapter | None:
        """The LoRA adapter, or None if the checkpoint has none.

        Raises:
          CheckpointError: it is not supported, or config.json announces one that is missing.
        """
        adapter = self.read_adapter(self.directory, self.config)
        if adapter is None and self.raw_config.get("has_lora_adapter"):
            raise CheckpointError(
                f"{self.directory}: {CONFIG} announces a LoRA adapter, but adapter_config.json is missing "
                "(adapter=False loads for text alone)"
            )
        return adapter

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `tokenizer.json`.

        Raises:
          CheckpointError: the file is missing or unreadable, or its ids are not those of `config`.
        """
        # For this class, transformers 5 splits text by GPT-2's rule, whatever the file says.
        gpt2 = str(self._tokenizer_config.get("tokenizer_class")).removesuffix("Fast") == "GPT2Tokenizer"
        path = paths.require(self.directory, TOKENIZER)
        tokenizer = Tokenizer.from_file(path, pre_tokenizer="gpt2" if gpt2 else "file")
        try:
            self.family.check_tokenizer(self.config, tokenizer)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return tokenizer

    def chat_template(self) -> ChatTemplate:
        """The chat template, from the first file that contains one; Granite Speech 4.0's if none does."""
        special = {}
        for key in ("bos_token", "eos_token"):
            token = self._tokenizer_config.get(key)
            token = token.get("content") if isinstance(token, Mapping) else token
            special |= {key: token} if isinstance(token, str) else {}
        return ChatTemplate(self._chat_template_source(), **special)

    def check_text(self) -> None:
        """Checks the tokenizer, and the chat template of a language model, which only transcripts need.

        Raises:
          CheckpointError: one of them is missing, damaged or not of this model.
        """
        try:
            if "speech-lm" not in self.family.recognizers:
                self.tokenizer()
                return
            self.chat_template().tokens(self.tokenizer(), self.capabilities.prompts.transcribe)
        except PromptError as error:
            raise CheckpointError(f"{self.directory}: {error}") from error

    @property
    def family(self) -> Family:
        """The family of its `model_type`."""
        return family_of(self.config.model_type)

    @property
    def release(self) -> Release | None:
        """The published model that this is, or was tuned from; None if that is unknown."""
        return release_of(self.config, self.raw_config, self.directory.absolute())

    @property
    def capabilities(self) -> Capabilities:
        """What the model was trained for: `granite_jax` in `config.json`, or else its release, or else its family."""
        known = self.release or self.family
        return Capabilities.from_config(self.raw_config, known.capabilities)

    @property
    def _tokenizer_config(self) -> dict[str, Any]:
        path = paths.find(self.directory, "tokenizer_config.json")
        return read_json(path) if path is not None else {}

    def _chat_template_source(self) -> str | None:
        path = paths.find(self.directory, CHAT_TEMPLATE)
        if path is not None:
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}: not a readable text file ({error})") from error
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            path = paths.find(self.directory, name)
            template = read_json(path).get("chat_template") if path is not None else None
            if isinstance(template, list):  # several named templates
                named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, Mapping)}
                template = named.get("default")
            if isinstance(template, str):
                return template
        return None

    def _shardings(self, sharding: Any) -> dict[str, jax.sharding.Sharding]:
        paths = expected_shapes(self.config)
        if isinstance(sharding, Mapping):
            shardings = flatten(sharding)
            raise_named("no sharding for", [path for path in paths if path not in shardings])
            raise_named("a sharding for what is no leaf:", [path for path in shardings if path not in paths])
            return shardings
        return dict.fromkeys(paths, jnp.zeros(()).sharding if sharding is None else sharding)


class OrbaxCheckpoint(Checkpoint):
    """A directory of this program."""

    kind = "orbax"

    def load_params(
        self, dtype: Any = None, sharding: Any = None, verify: bool = True, *, adapter: bool = True
    ) -> dict[str, Any]:
        """As in `Checkpoint`."""
        if verify or (adapter and self.adapter is not None):
            return super().load_params(dtype, sharding, verify, adapter=adapter)
        return orbax.read_into(self.directory, self._stored_shapes, parse_dtype(dtype), self._shardings(sharding))

    def leaves(
        self, verify: bool = True, *, adapter: bool = True, paths: Iterable[str] | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """As in `Checkpoint`."""
        if paths is None:
            paths = self._stored_shapes if adapter else expected_shapes(self.config)
        yield from orbax.read(self.directory, self._stored_shapes, verify, paths)

    def stored(self) -> dict[str, tuple[Shape, str]]:
        """As in `Checkpoint`."""
        dtypes = orbax.stored_dtypes(self.directory, self._stored_shapes)
        return {path: (self._stored_shapes[path], dtype.name) for path, dtype in dtypes.items()}

    @functools.cached_property
    def _stored_shapes(self) -> dict[str, Shape]:
        adapter = self.read_adapter(self.directory, self.config)
        return {**(adapter.shapes if adapter else {}), **expected_shapes(self.config)}


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
