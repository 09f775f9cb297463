"""What a family of models brings with it: everything that the rest of the program asks of a `model_type`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from granite_jax.array_types import Shape
from granite_jax.models.tensor_table import TensorTable
from granite_jax.text.tasks import Capabilities


@dataclasses.dataclass(frozen=True)
class Release:
    """A published model.

    Fields:
      name: as on the hub, where all belong to `ibm-granite`.
      config: its configuration, without reading a checkpoint.
      capabilities: tasks, languages and prompts of its card.
    """

    name: str
    config: Any
    capabilities: Capabilities


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`. Its configurations are hashable, and have it as the field `model_type`.

    Fields:
      read_config: the dictionary of a `config.json`, and the shapes of the parameter tree's leaves by dotted path, as
        far as the checkpoint's tensors show them (None: they are unknown) -> the configuration; raises
        CheckpointError naming the key.
      abstract_params: configuration -> the parameter tree as `jax.ShapeDtypeStruct`s.
      tensors: names of the tensors in Hugging Face checkpoints.
      capabilities: tasks, languages and prompts, unless a checkpoint's `config.json` names its own.
      releases: the published models by name.
      release_of: finds the published model that a checkpoint is, from its configuration, its `config.json` and its
        directory.
    """

    read_config: Callable[[Mapping[str, Any], Mapping[str, Shape] | None], Any]
    abstract_params: Callable[[Any], dict[str, Any]]
    tensors: TensorTable
    capabilities: Capabilities
    releases: Mapping[str, Release] = dataclasses.field(default_factory=dict)
    release_of: Callable[[Any, Mapping[str, Any], Path], Release | None] | None = None
