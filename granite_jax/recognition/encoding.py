"""What every recognizer computes with the encoder: the traced functions, and the shapes of what they take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from granite_jax.array_types import AudioEmbeddings, CTCLogits, Lengths
from granite_jax.keywords import spotter
from granite_jax.keywords.spotter import MAX_KEYWORDS, WIDTH, KeywordBatch, SpottingScores
from granite_jax.models.layers import ctc
from granite_jax.models.layers.ctc_alignment import Alignment, align
from granite_jax.models.layers.features import num_frames
from granite_jax.models.layers.packed.encoder import PackedEncoding

ENCODE, ENCODE_WITH_LOGITS, ALIGN = "encode", "encode with logits", "align"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """What the encoder makes of a batch.

    Fields:
      audio: audio embeddings `[b, a, e]`, for a language model.
      labels: best CTC label of every frame, int32, blank past the row's end.
      entropy: float32, the largest entropy of a valid frame's labels, in nats.
      spotting: the keywords with the best scores.
      bpe_labels: best label of the BPE head for every window of four frames, int32, blank past the row's end and in
        rows that did not ask for them; None without such a head.
      speech_frames: int32, the valid frames in which characters have more than a fifth of the probability.
      logits: CTC logits, float32, if they were asked for.
      confidence: float32, if it was asked for: mean probability of the best label in frames that have one; NaN if none
        has.
    """

    audio: AudioEmbeddings | None
    labels: Int[Array, "b t"]
    entropy: Float[Array, "b"]
    spotting: SpottingScores
    bpe_labels: Int[Array, "b w"] | None
    speech_frames: Int[Array, "b"]
    logits: CTCLogits | None
    confidence: Float[Array, "b"] | None = None


def encode_name(with_logits: bool) -> str:
    """The name of the form of the encode program with or without logits."""
    return ENCODE_WITH_LOGITS if with_logits else ENCODE


def read_encoding(
    encoding: PackedEncoding,
    keywords: KeywordBatch,
    bpe_labels: Int[Array, "b w"] | None = None,
    *,
    with_logits: bool = False,
    with_confidence: bool = False,
) -> Encoded:
    """Reads what the host and later programs need from what an encoder has made of packed rows.

    Args:
      bpe_labels: those of the BPE head, if there is one.
      with_logits, with_confidence: whether these fields are computed.
    """
    packing, best, audio = encoding.packing, encoding.labels, encoding.audio
    frames = packing.lengths
    valid = jnp.arange(packing.longest, dtype=jnp.int32)[None, :] < frames[:, None]
    labels = jnp.where(valid, packing.unpack(best.labels), ctc.BLANK)
    logits = packing.unpack(best.logits) if with_logits else None
    spotting = jax.lax.cond(
        keywords.counts.max() > 0,
        lambda: spotter.score_keywords(packing.unpack(best.logits), frames, keywords),
        lambda: spotter.no_scores(frames),
    )
    confidence = None
    if with_confidence:
        probabilities = packing.unpack(jnp.exp(best.logits.max(axis=-1) - jax.nn.logsumexp(best.logits, axis=-1)))
        confidence = jnp.mean(probabilities, axis=1, where=labels != ctc.BLANK)
    return Encoded(audio, labels, best.entropy, spotting, bpe_labels, best.speech_frames, logits, confidence)


def align_texts(logits: CTCLogits, lengths: Lengths, labels: Int[Array, "b n"], num_labels: Lengths) -> Alignment:
    """The frames of texts' labels. `lengths`: samples of each row."""
    return align(logits, num_frames(lengths), labels, num_labels)


def abstract_rows(size: int, dtype: Any, *shape: int) -> Any:
    """An array of the host with `size` rows: which of them go to which device is the program's business."""
    return jax.ShapeDtypeStruct((size, *shape), dtype)


def abstract_keywords(size: int) -> KeywordBatch:
    """The keywords of a batch, as shapes."""
    labels = abstract_rows(size, jnp.int16, MAX_KEYWORDS, WIDTH)
    return KeywordBatch(labels, abstract_rows(size, jnp.int32))  # pyright: ignore[reportArgumentType]
