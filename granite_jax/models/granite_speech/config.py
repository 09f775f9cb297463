"""Model configuration: frozen dataclasses read from a Hugging Face `config.json`.

Absent keys take the defaults of the `transformers` configuration classes, because `save_pretrained`
leaves out values equal to them. Anything that this implementation does not compute is refused by name.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite_jax.array_types import Shape
from granite_jax.errors import CheckpointError
from granite_jax.files.json_fields import boolean, number, positive_integer, read_json, require, section, without_nulls
from granite_jax.models.layers.decoder import DecoderConfig
from granite_jax.models.layers.encoder import EncoderConfig
from granite_jax.models.layers.features import HOP
from granite_jax.models.layers.projector import ProjectorConfig
from granite_jax.models.layers.rotary import Rotary
from granite_jax.waveform import SAMPLING_RATE

_GRANITE_4_0_1B = Path(__file__).with_name("config.json")


@dataclasses.dataclass(frozen=True)
class TensorFacts:
    """Facts read from the shapes of tensors, used where `config.json` is ambiguous.

    Fields:
      has_head: whether there is an output head besides the embedding.
      attention_dim: outputs of the encoder's query projections, all heads together.
      bpe_output_dim: labels of the BPE head; 0 if there is none.
    """

    has_head: bool
    attention_dim: int
    bpe_output_dim: int = 0

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> "TensorFacts":
        """From the shapes of a parameter tree's leaves by dotted path; those that are missing are reported later."""
        last = {path: shape[-1] for path, shape in shapes.items() if shape}
        return cls(
            has_head=_HEAD in shapes,
            attention_dim=last.get(_QUERY, 0),
            bpe_output_dim=last.get(_BPE_HEAD, 0),
        )


_HEAD, _QUERY, _BPE_HEAD = "decoder.head.kernel", "encoder.layers.attention.q.kernel", "encoder.out_bpe.kernel"
"""The leaves that `TensorFacts` are read from."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole model. Hashable: a static argument of every jitted function."""

    encoder: EncoderConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    audio_token_id: int
    model_type: str = "granite_speech"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], facts: TensorFacts | None = None) -> "Config":
        """Reads the dictionary of a Hugging Face `config.json` whose `model_type` is `granite_speech`.

        Keys whose meaning changed between releases of transformers mean what they meant in the release that wrote the
        file, its `transformers_version`. Without that, the tensors decide, with a warning.

        Args:
          facts: of the checkpoint's tensors. Without these, a file of unknown meaning is refused.

        Raises:
          CheckpointError: naming the key that is missing, has a wrong type, contradicts another or asks for something
            not implemented.
        """
        require(raw, "", "model_type", ("granite_speech",))
        version = _version(raw)
        window_size = number(raw, "", "window_size", int, 15)
        downsample_rate = number(raw, "", "downsample_rate", int, 5)
        if window_size < 1 or downsample_rate < 1 or window_size % downsample_rate:
            raise CheckpointError(
                f"config: window_size {window_size} is not a multiple of downsample_rate {downsample_rate}"
            )
        config = cls(
            encoder=_encoder(section(raw, "encoder_config"), version, facts),
            projector=_projector(section(raw, "projector_config"), window_size, window_size // downsample_rate),
            decoder=_decoder(section(raw, "text_config"), _tied(raw, version, facts), version),
            audio_token_id=number(raw, "", "audio_token_index", int, number(raw, "", "audio_token_id", int, 49155)),
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
            (not decoder.logits_scaling > 0, "text_config.logits_scaling is not positive"),
            (
                encoder.bpe_output_dim > decoder.vocab_size + 1,
                f"the BPE head has {encoder.bpe_output_dim} labels, more than the vocabulary and a blank",
            ),
            (
                encoder.bpe_output_dim and encoder.num_layers < 2,
                "the BPE head needs an encoder of at least two layers",
            ),
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


def read_config(raw: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> Config:
    """`Config.from_dict`, with facts read from the shapes of the parameter tree's leaves, if these are known."""
    return Config.from_dict(raw, None if shapes is None else TensorFacts.from_shapes(shapes))


def _version(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Major and minor version of the transformers that wrote the file."""
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(raw.get("transformers_version")))
    return None if version is None else (int(version[1]), int(version[2]))


def _encoder(raw: Mapping[str, Any], version: tuple[int, int] | None, facts: TensorFacts | None) -> EncoderConfig:
    def get(key: str, default: int) -> int:
        return positive_integer(raw, "encoder_config.", key, default)

    num_heads, hidden_dim = get("num_heads", 8), get("hidden_dim", 1024)
    return EncoderConfig(
        input_dim=get("input_dim", 160),
        num_layers=get("num_layers", 10),
        hidden_dim=hidden_dim,
        feedforward_mult=get("feedforward_mult", 4),
        num_heads=num_heads,
        dim_head=_dim_head(raw, num_heads, hidden_dim, version, facts),
        output_dim=get("output_dim", 42),
        context_size=get("context_size", 200),
        max_pos_emb=get("max_pos_emb", 512),
        conv_kernel_size=get("conv_kernel_size", 15),
        conv_expansion_factor=get("conv_expansion_factor", 2),
        bpe_output_dim=facts.bpe_output_dim if facts else 0,
    )


def _dim_head(
    raw: Mapping[str, Any], num_heads: int, hidden_dim: int, version: tuple[int, int] | None, facts: TensorFacts | None
) -> int:
    """Width of the encoder's attention heads: if absent 128, but since transformers 5.9 `hidden_dim // num_heads`."""
    key, share = "encoder_config.dim_head", hidden_dim // num_heads
    if raw.get("dim_head") is not None:
        return positive_integer(raw, "encoder_config.", "dim_head", 128)
    if share < 1:
        raise CheckpointError(f"config: {key} is absent, and hidden_dim less than num_heads")
    if "dim_head" in raw or share == 128 or (version is not None and version >= (5, 9)):
        return share
    if version is not None:
        return 128
    if facts is None or facts.attention_dim not in (128 * num_heads, share * num_heads):
        raise CheckpointError(f"config: {key} is absent, which means 128 or {share} by the version of transformers")
    _warn(f"{key} is absent, and the tensors make it {facts.attention_dim // num_heads}")
    return facts.attention_dim // num_heads


def _tied(raw: Mapping[str, Any], version: tuple[int, int] | None, facts: TensorFacts | None) -> bool:
    """Whether the output head repeats the embedding.

    transformers asked `text_config` (default: no), since 5.10 it asks the file's top level (default: yes); since 5.0 it
    uses a head that is there whatever the file says. Where it would make a missing head of nothing although one of the
    two keys ties it, it is tied.
    """
    key = "tie_word_embeddings"
    by_text, by_top = boolean(section(raw, "text_config"), "text_config.", key), boolean(raw, "", key)
    said = {value for value in (by_text, by_top) if value is not None}
    if version is not None:
        declared = by_text or False if version < (5, 10) else by_top is not False
    else:
        declared = said.pop() if len(said) == 1 else None
    if facts is None and declared is None:
        wrong = "contradicts itself" if said else "is absent"
        raise CheckpointError(f"config: {key} {wrong}, which means one or the other by the version of transformers")
    if facts is None:
        return bool(declared)
    if facts.has_head and not (declared and version is not None and version < (5, 0)):
        return False
    if declared is None or (not declared and (by_text or by_top)):
        wrong = "is absent" if by_text is by_top is None else "contradicts itself"
        _warn(f"{key} {wrong}, and the tensors have no output head: it repeats the embedding")
        return True
    return declared


def _warn(note: str) -> None:
    warnings.warn(f"config.json: {note}", stacklevel=2)


def _projector(raw: Mapping[str, Any], window_size: int, num_queries: int) -> ProjectorConfig:
    prefix = "projector_config."
    require(raw, prefix, "model_type", ("blip_2_qformer",))
    require(raw, prefix, "hidden_act", ("gelu",), default="gelu")
    # Blip2QFormerConfig's default is 2, which leaves every other layer without cross-attention; no release has that.
    require(raw, prefix, "cross_attention_frequency", (1,), default=2)
    require(raw, prefix, "use_qformer_text_input", (False,), default=False)

    def get(key: str, default: int) -> int:
        return positive_integer(raw, prefix, key, default)

    return ProjectorConfig(
        hidden_size=get("hidden_size", 768),
        encoder_hidden_size=get("encoder_hidden_size", 1408),
        num_hidden_layers=get("num_hidden_layers", 12),
        num_attention_heads=get("num_attention_heads", 12),
        intermediate_size=get("intermediate_size", 3072),
        hidden_act="gelu",
        layer_norm_eps=number(raw, prefix, "layer_norm_eps", float, 1e-12),
        window_size=window_size,
        num_queries=num_queries,
    )


def _decoder(raw: Mapping[str, Any], tied: bool, version: tuple[int, int] | None) -> DecoderConfig:
    prefix = "text_config."
    raw = without_nulls(raw, "num_key_value_heads", "head_dim")
    require(raw, prefix, "model_type", ("granite",))
    require(raw, prefix, "hidden_act", ("silu",), default="silu")
    require(raw, prefix, "attention_bias", (False,), default=False)
    require(raw, prefix, "mlp_bias", (False,), default=False)

    def get(key: str, default: int) -> int:
        return positive_integer(raw, prefix, key, default)

    hidden_size, num_heads = get("hidden_size", 4096), get("num_attention_heads", 32)
    max_positions = get("max_position_embeddings", 2048)
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
        max_position_embeddings=max_positions,
        rotary=Rotary.from_dict(raw, max_positions, version),
        rms_norm_eps=number(raw, prefix, "rms_norm_eps", float, 1e-6),
        hidden_act="silu",
        embedding_multiplier=number(raw, prefix, "embedding_multiplier", float, 1.0),
        attention_multiplier=number(raw, prefix, "attention_multiplier", float, 1.0),
        residual_multiplier=number(raw, prefix, "residual_multiplier", float, 1.0),
        logits_scaling=number(raw, prefix, "logits_scaling", float, 1.0),
        tie_word_embeddings=tied,
        bos_token_id=_token(raw, "bos_token_id", 1),
        eos_token_id=number(first_eos, prefix, "eos_token_id", int, 2),
        pad_token_id=_token(raw, "pad_token_id", None),
    )


def _token(raw: Mapping[str, Any], key: str, default: int | None) -> int | None:
    return None if raw.get(key, default) is None else number(raw, "text_config.", key, int, default)
