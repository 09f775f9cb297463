"""What a member of the family brings with it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from granite_jax.model.config import Config
from granite_jax.text.tasks import Capabilities
from granite_jax.variants.tensors import TensorTable


@dataclasses.dataclass(frozen=True)
class Variant:
    """One `model_type`.

    Fields:
      read_config: the dictionary of a `config.json` -> the configuration; raises CheckpointError naming the key.
      abstract_params: configuration -> the parameter tree as `jax.ShapeDtypeStruct`s.
      tensors: names of the tensors in Hugging Face checkpoints.
      capabilities: tasks and languages, unless a checkpoint's `config.json` names its own.
    """

    read_config: Callable[[Mapping[str, Any]], Config]
    abstract_params: Callable[[Config], dict[str, Any]]
    tensors: TensorTable
    capabilities: Capabilities
