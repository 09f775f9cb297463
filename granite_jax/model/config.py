"""Model configuration: frozen dataclasses read from a Hugging Face `config.json`.

Absent keys take the defaults of the `transformers` configuration classes, because `save_pretrained`
leaves out values equal to them. Anything that this implementation does not compute is refused by name.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite_jax.errors import CheckpointError
from granite_jax.model.features import HOP, SAMPLING_RATE

_GRANITE_4_0_1B = Path(__file__).with_name("granite-4.0-1b-speech.json")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Conformer CTC encoder. Frames are 20 ms (two 10 ms log-mel frames stacked)."""

    input_dim: int
    num_layers: int
    hidden_dim: int
    feedforward_mult: int
    num_heads: int
    dim_head: int
    output_dim: int  # CTC labels, blank included
    context_size: int  # frames of one attention block
    max_pos_emb: int
    conv_kernel_size: int
    conv_expansion_factor: int

    @property
    def inner_dim(self) -> int:
        """Channels inside the convolution module."""
        return self.hidden_dim * self.conv_expansion_factor

    @property
    def self_condition_layer(self) -> int:
        """Index of the block whose output is conditioned on its own CTC posteriors; -1 for none."""
        return self.num_layers // 2 - 1


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Windowed Q-Former: `window_size` encoder frames become `num_queries` audio embeddings."""

    hidden_size: int
    encoder_hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    window_size: int
    num_queries: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Granite language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    hidden_act: str
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole model. Hashable: a static argument of every jitted function."""

    encoder: EncoderConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    audio_token_id: int
    model_type: str = "granite_speech"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Config":
        """Reads the dictionary of a Hugging Face `config.json` whose `model_type` is `granite_speech`.

        Raises:
          CheckpointError: naming the key that is missing, has a wrong type or asks for something not implemented.
        """
        _require(raw, "", "model_type", ("granite_speech",))
        window_size = _get(raw, "", "window_size", int, 15)
        downsample_rate = _get(raw, "", "downsample_rate", int, 5)
        if window_size < 1 or downsample_rate < 1 or window_size % downsample_rate:
            raise CheckpointError(
                f"config: window_size {window_size} is not a multiple of downsample_rate {downsample_rate}"
            )
        config = cls(
            encoder=_encoder(_section(raw, "encoder_config")),
            projector=_projector(_section(raw, "projector_config"), window_size, window_size // downsample_rate),
            decoder=_decoder(_section(raw, "text_config"), raw),
            audio_token_id=_get(raw, "", "audio_token_index", int, _get(raw, "", "audio_token_id", int, 49155)),
        )
        config._check()
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> "Config":
        """Reads a `config.json`. Raises CheckpointError naming the file."""
        return cls.from_dict(read_json(path))

    def _check(self) -> None:
        encoder, projector, decoder = self.encoder, self.projector, self.decoder
        problems = [
            (not 0 < encoder.context_size <= encoder.max_pos_emb, "encoder_config.context_size exceeds max_pos_emb"),
            (
                encoder.hidden_dim != projector.encoder_hidden_size,
                "projector_config.encoder_hidden_size differs from encoder_config.hidden_dim",
            ),
            (
                projector.hidden_size % projector.num_attention_heads != 0,
                "projector_config.hidden_size is not a multiple of num_attention_heads",
            ),
            (
                decoder.num_attention_heads % decoder.num_key_value_heads != 0,
                "text_config.num_attention_heads is not a multiple of num_key_value_heads",
            ),
            (decoder.head_dim % 2 != 0, "text_config.head_dim is odd"),
            (not 0 <= self.audio_token_id < decoder.vocab_size, "audio_token_index is outside the vocabulary"),
            (not 0 <= decoder.eos_token_id < decoder.vocab_size, "text_config.eos_token_id is outside the vocabulary"),
            (
                not 0 <= (decoder.pad_token_id or 0) < decoder.vocab_size,
                "text_config.pad_token_id is outside the vocabulary",
            ),
            (not decoder.rope_theta > 0, "text_config.rope_theta is not positive"),
            (not decoder.logits_scaling > 0, "text_config.logits_scaling is not positive"),
            (encoder.input_dim != 160, "encoder_config.input_dim is not 160 (two stacked frames of 80 mels)"),
        ]
        for failed, problem in problems:
            if failed:
                raise CheckpointError(f"config: {problem}")

    @classmethod
    def granite_4_0_1b(cls) -> "Config":
        """The configuration of ibm-granite/granite-4.0-1b-speech."""
        return cls.from_file(_GRANITE_4_0_1B)

    @property
    def max_seconds(self) -> float:
        """The longest audio whose embeddings fit the language model's positions."""
        windows = self.decoder.max_position_embeddings // self.projector.num_queries
        return windows * self.projector.window_size * 2 * HOP / SAMPLING_RATE

    def num_audio_tokens(self, num_frames):
        """Audio embeddings of `num_frames` encoder frames: works on ints and on integer arrays."""
        return -(-num_frames // self.projector.window_size) * self.projector.num_queries


def _encoder(raw: Mapping[str, Any]) -> EncoderConfig:
    def get(key: str, default: int) -> int:
        return _positive(raw, "encoder_config.", key, default)

    return EncoderConfig(
        input_dim=get("input_dim", 160),
        num_layers=get("num_layers", 10),
        hidden_dim=get("hidden_dim", 1024),
        feedforward_mult=get("feedforward_mult", 4),
        num_heads=get("num_heads", 8),
        dim_head=get("dim_head", 128),
        output_dim=get("output_dim", 42),
        context_size=get("context_size", 200),
        max_pos_emb=get("max_pos_emb", 512),
        conv_kernel_size=get("conv_kernel_size", 15),
        conv_expansion_factor=get("conv_expansion_factor", 2),
    )


def _projector(raw: Mapping[str, Any], window_size: int, num_queries: int) -> ProjectorConfig:
    prefix = "projector_config."
    _require(raw, prefix, "model_type", ("blip_2_qformer",))
    _require(raw, prefix, "hidden_act", ("gelu",), default="gelu")
    # Blip2QFormerConfig's default is 2, which leaves every other layer without cross-attention; no release has that.
    _require(raw, prefix, "cross_attention_frequency", (1,), default=2)
    _require(raw, prefix, "use_qformer_text_input", (False,), default=False)

    def get(key: str, default: int) -> int:
        return _positive(raw, prefix, key, default)

    return ProjectorConfig(
        hidden_size=get("hidden_size", 768),
        encoder_hidden_size=get("encoder_hidden_size", 1408),
        num_hidden_layers=get("num_hidden_layers", 12),
        num_attention_heads=get("num_attention_heads", 12),
        intermediate_size=get("intermediate_size", 3072),
        hidden_act="gelu",
        layer_norm_eps=_get(raw, prefix, "layer_norm_eps", float, 1e-12),
        window_size=window_size,
        num_queries=num_queries,
    )


def _decoder(raw: Mapping[str, Any], top: Mapping[str, Any]) -> DecoderConfig:
    prefix = "text_config."
    _require(raw, prefix, "model_type", ("granite",))
    _require(raw, prefix, "hidden_act", ("silu",), default="silu")
    _require(raw, prefix, "attention_bias", (False,), default=False)
    _require(raw, prefix, "mlp_bias", (False,), default=False)
    # transformers 5 writes rope_parameters, earlier releases rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(
            f"config: text_config rope scaling {rope!a:.80} is not supported, only the default rotary embedding"
        )

    def get(key: str, default: int) -> int:
        return _positive(raw, prefix, key, default)

    hidden_size, num_heads = get("hidden_size", 4096), get("num_attention_heads", 32)
    tied = raw.get("tie_word_embeddings", top.get("tie_word_embeddings", False))
    eos = raw.get("eos_token_id", 2)
    first_eos = {"eos_token_id": eos[0]} if isinstance(eos, list) and eos else raw
    return DecoderConfig(
        vocab_size=get("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=get("intermediate_size", 11008),
        num_hidden_layers=get("num_hidden_layers", 32),
        num_attention_heads=num_heads,
        num_key_value_heads=get("num_key_value_heads", num_heads),
        head_dim=get("head_dim", hidden_size // num_heads),
        max_position_embeddings=get("max_position_embeddings", 2048),
        rope_theta=_get(rope if "rope_theta" in rope else raw, prefix, "rope_theta", float, 10000.0),
        rms_norm_eps=_get(raw, prefix, "rms_norm_eps", float, 1e-6),
        hidden_act="silu",
        embedding_multiplier=_get(raw, prefix, "embedding_multiplier", float, 1.0),
        attention_multiplier=_get(raw, prefix, "attention_multiplier", float, 1.0),
        residual_multiplier=_get(raw, prefix, "residual_multiplier", float, 1.0),
        logits_scaling=_get(raw, prefix, "logits_scaling", float, 1.0),
        tie_word_embeddings=bool(tied),
        bos_token_id=_token(raw, "bos_token_id", 1),
        eos_token_id=_get(first_eos, prefix, "eos_token_id", int, 2),
        pad_token_id=_token(raw, "pad_token_id", None),
    )


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises CheckpointError naming the file."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8 or JSON, or a number of 5,000 digits
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds {type(raw).__name__}, not a JSON object")
    return raw


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = raw.get(key)
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config: {key} is missing or not an object")
    return section


def _get(raw: Mapping[str, Any], prefix: str, key: str, kind: type, default: Any) -> Any:
    value = raw.get(key, default)
    accepted = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise CheckpointError(f"config: {prefix}{key} is {value!a:.80}, not {kind.__name__}")
    if kind is float and not abs(value) <= sys.float_info.max:  # NaN, infinite, or an integer that no float can hold
        raise CheckpointError(f"config: {prefix}{key} is {value!a:.80}, not a finite number")
    return kind(value)


def _positive(raw: Mapping[str, Any], prefix: str, key: str, default: int) -> int:
    value = _get(raw, prefix, key, int, default)
    # No real model comes near the bound; larger values would overflow shapes before an error could name the key.
    if not 0 < value < 2**31:
        raise CheckpointError(f"config: {prefix}{key} is {value!a:.80}, not a positive 32-bit integer")
    return value


def _token(raw: Mapping[str, Any], key: str, default: int | None) -> int | None:
    return None if raw.get(key, default) is None else _get(raw, "text_config.", key, int, default)


def _require(raw: Mapping[str, Any], prefix: str, key: str, supported: tuple, default: Any = None) -> None:
    value = raw.get(key, default)
    if value not in supported:
        raise CheckpointError(
            f"config: {prefix}{key} {value!a:.80} is not supported, only {' or '.join(map(repr, supported))}"
        )
