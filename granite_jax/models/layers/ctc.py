"""Greedy CTC: labels, characters, entropy.

The label set of Granite Speech: 0 is the blank, labels 32-255 are Latin-1 characters, 256-347 Katakana from U+30A1 on.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from granite_jax.array_types import CTCLogits, Lengths
from granite_jax.models.layers.features import HOP
from granite_jax.waveform import SAMPLING_RATE

BLANK, SPACE = 0, ord(" ")
FRAME_SECONDS = 2 * HOP / SAMPLING_RATE
NUM_LABELS = 348
_KATAKANA_LABEL, _KATAKANA_START = 256, 0x30A1


def best_labels(logits: CTCLogits, lengths: Lengths) -> Int[Array, "b t"]:
    """The best label of every frame, int32; BLANK past each row's `lengths` valid frames."""
    valid = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
    return jnp.where(valid, jnp.argmax(logits, axis=-1), BLANK).astype(jnp.int32)


def frame_entropy(logits: CTCLogits, lengths: Lengths) -> Float[Array, "b t"]:
    """Entropy of every frame's label distribution in nats, float32; 0 past each row's valid frames."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
    return jnp.where(jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None], entropy, 0.0)


def has_speech(logits: CTCLogits) -> Bool[Array, "b t"]:
    """Whether each frame gives more than a fifth of the probability to labels other than the blank."""
    return jax.nn.softmax(logits.astype(jnp.float32))[..., BLANK] < 0.8


def collapse(labels: Sequence[int] | np.ndarray) -> list[int]:
    """One utterance's frame labels without repetitions and blanks."""
    labels = np.asarray(labels)
    starts = np.ones(len(labels), bool)
    starts[1:] = labels[1:] != labels[:-1]
    return labels[starts & (labels != BLANK)].tolist()


def label_character(label: int) -> str:
    """The character of a label; empty for labels 1-31 and those past the table, which have none."""
    if 32 <= label < _KATAKANA_LABEL:
        return chr(label)
    if _KATAKANA_LABEL <= label < NUM_LABELS:
        return chr(_KATAKANA_START + label - _KATAKANA_LABEL)
    return ""


def to_text(labels: Sequence[int] | np.ndarray) -> str:
    """The text of one utterance's frame labels."""
    return "".join(map(label_character, collapse(labels)))


def label_of(character: str) -> int | None:
    """The label of a character; None if it has none."""
    code = ord(character)
    label = code - _KATAKANA_START + _KATAKANA_LABEL if code >= _KATAKANA_START else code
    return label if label_character(label) == character else None


def to_labels(text: str) -> list[int]:
    """Labels of a text. Raises ValueError naming a character that has none."""
    labels = []
    for character in text:
        label = label_of(character)
        if label is None:
            raise ValueError(f"no CTC label for {character!r}")
        labels.append(label)
    return labels
