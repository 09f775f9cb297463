"""The interface of a family of models: all that the rest of the program asks of a `model_type`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from granite_jax.array_types import Shape
from granite_jax.models.layers.decoder import DecoderConfig
from granite_jax.models.layers.projector import ProjectorConfig
from granite_jax.models.tensor_table import TensorTable
from granite_jax.models.work import Work, Workload
from granite_jax.text.tasks import Capabilities

if TYPE_CHECKING:  # so that the functions of models need JAX and Flax alone
    from granite_jax.text.tokenizer import Tokenizer

PartitionRules = Mapping[str, Mapping[str, int]]
"""Regular expression for the dotted path of a module -> its leaves' axes that are split between devices; the path
does not count layers (`decoder.layers.up`). Leaves that are not named are replicated."""


class ModelConfig(Protocol):
    """The fields of every configuration. It is hashable: a static argument of jitted functions."""

    @property
    def model_type(self) -> str:
        """The family's key in the registry."""
        ...

    @property
    def max_seconds(self) -> float:
        """The longest audio of one pass."""
        ...


class SpeechLMConfig(ModelConfig, Protocol):
    """The fields of a configuration whose model the recognizer "speech-lm" runs."""

    @property
    def projector(self) -> ProjectorConfig: ...

    @property
    def decoder(self) -> DecoderConfig: ...

    @property
    def audio_token_id(self) -> int: ...

    def num_audio_tokens(self, num_frames: Any) -> Any:
        """Audio embeddings of `num_frames` encoder frames: works on ints and on integer arrays."""
        ...


@dataclasses.dataclass(frozen=True)
class CTCModel:
    """What the recognizer "ctc" asks of a model: functions of a configuration, parameters and arrays.

    Fields:
      encode: (config, params, samples, lengths, *, dtype, with_audio=False) -> `PackedEncoding`. The parameters of
        `parts` suffice.
      parts: of the parameter tree, that it needs.
      num_labels: configuration -> labels of the CTC head, blank included.
    """

    encode: Callable[..., Any]
    parts: tuple[str, ...]
    num_labels: Callable[[Any], int]


@dataclasses.dataclass(frozen=True)
class SpeechLMModel:
    """What the recognizer "speech-lm" asks of a model, whose configuration is a `SpeechLMConfig`.

    Fields:
      ctc: of its encoder, with audio embeddings for the language model (`with_audio`).
      bpe_labels, prefill_packed, decode_step: as in `models.granite_speech.functions`.
      num_bpe_labels: configuration -> labels of the second CTC head, whose labels are tokens; 0 without one.
    """

    ctc: CTCModel
    bpe_labels: Callable[..., Any]
    prefill_packed: Callable[..., Any]
    decode_step: Callable[..., Any]
    num_bpe_labels: Callable[[Any], int]


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
    """One `model_type`.

    Fields:
      read_config: the dictionary of a `config.json`, and the shapes of the parameter tree's leaves by dotted path, as
        far as the checkpoint's tensors show them (None: they are unknown) -> the configuration, a `ModelConfig`;
        raises CheckpointError naming the key.
      abstract_params: configuration -> the parameter tree as `jax.ShapeDtypeStruct`s.
      tensors: names of the tensors in Hugging Face checkpoints.
      recognizers: what can run it, by name; the first is the default.
      capabilities: tasks, languages and prompts, unless a checkpoint's `config.json` names its own.
      releases: the published models by name.
      release_of: finds the published model that a checkpoint is, from its configuration, its `config.json` and its
        directory.
      check_tokenizer: raises CheckpointError for a tokenizer that does not belong to a configuration.
      limits: configuration -> numbers for `granite-jax inspect`, by name; `positions` are those of a language model,
        which limit the length of audio.
      processor_config: configuration -> the `preprocessor_config.json` that transformers needs.
      partition_rules: configuration, devices that share a copy of the weights -> how these are split; raises
        GraniteError if they cannot be. By default they are not split.
      count_work: configuration, workload, bytes of a weight -> by recognizer and program, what a batch needs at least.
    """

    read_config: Callable[[Mapping[str, Any], Mapping[str, Shape] | None], Any]
    abstract_params: Callable[[Any], dict[str, Any]]
    tensors: TensorTable
    recognizers: Mapping[str, CTCModel | SpeechLMModel]
    capabilities: Capabilities
    releases: Mapping[str, Release] = dataclasses.field(default_factory=dict)
    release_of: Callable[[Any, Mapping[str, Any], Path], Release | None] = lambda config, raw, directory: None
    check_tokenizer: Callable[[Any, "Tokenizer"], None] = lambda config, tokenizer: None
    limits: Callable[[Any], dict[str, int]] = lambda config: {}
    processor_config: Callable[[Any], Mapping[str, Any]] | None = None
    partition_rules: Callable[[Any, int], PartitionRules] = lambda config, parts: {}
    count_work: Callable[[Any, Workload, int], dict[str, dict[str, Work]]] | None = None
