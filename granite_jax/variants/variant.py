"""What a member of the family brings with it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from granite_jax.model.config import Config, TensorFacts
from granite_jax.text.tasks import Capabilities
from granite_jax.variants.releases import Release
from granite_jax.variants.tensors import TensorTable


@dataclasses.dataclass(frozen=True)
class Variant:
    """One `model_type`.

    Fields:
      read_config: the dictionary of a `config.json`, and facts of the tensors if these are known -> the configuration;
        raises CheckpointError naming the key.
      abstract_params: configuration -> the parameter tree as `jax.ShapeDtypeStruct`s.
      tensors: names of the tensors in Hugging Face checkpoints.
      capabilities: tasks, languages and prompts, unless a checkpoint's `config.json` names its own.
      release_of: finds the published model that a checkpoint is, from its configuration, its `config.json` and its
        directory.
    """

    read_config: Callable[[Mapping[str, Any], TensorFacts | None], Config]
    abstract_params: Callable[[Config], dict[str, Any]]
    tensors: TensorTable
    capabilities: Capabilities
    release_of: Callable[[Config, Mapping[str, Any], Path], Release | None] | None = None
