"""Greedy CTC: labels, characters, entropy; alignment of a text to the frames.

The label set of Granite Speech: 0 is the blank, labels 32-255 are Latin-1 characters, 256-347 Katakana from U+30A1 on.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from granite_jax.array_types import CTCLogits, Lengths
from granite_jax.model.features import HOP, SAMPLING_RATE

BLANK = 0
FRAME_SECONDS = 2 * HOP / SAMPLING_RATE
_KATAKANA_LABEL, _KATAKANA_START, _NUM_LABELS = 256, 0x30A1, 348


def best_labels(logits: CTCLogits, lengths: Lengths) -> Int[Array, "b t"]:
    """The best label of every frame, int32; BLANK past each row's `lengths` valid frames."""
    valid = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
    return jnp.where(valid, jnp.argmax(logits, axis=-1), BLANK).astype(jnp.int32)


def frame_entropy(logits: CTCLogits, lengths: Lengths) -> Float[Array, "b t"]:
    """Entropy of every frame's label distribution in nats, float32; 0 past each row's valid frames."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    entropy = -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
    return jnp.where(jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None], entropy, 0.0)


def speech_frames(logits: CTCLogits, lengths: Lengths) -> Int[Array, "b"]:
    """How many valid frames give more than a fifth of the probability to labels other than the blank, int32."""
    speech = jax.nn.softmax(logits.astype(jnp.float32))[..., BLANK] < 0.8
    valid = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
    return jnp.sum(speech & valid, axis=1, dtype=jnp.int32)


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
    if _KATAKANA_LABEL <= label < _NUM_LABELS:
        return chr(_KATAKANA_START + label - _KATAKANA_LABEL)
    return ""


def to_text(labels: Sequence[int] | np.ndarray) -> str:
    """The text of one utterance's frame labels."""
    return "".join(map(label_character, collapse(labels)))


def to_labels(text: str) -> list[int]:
    """Labels of a text. Raises ValueError naming a character that has none."""
    labels = []
    for character in text:
        code = ord(character)
        label = code - _KATAKANA_START + _KATAKANA_LABEL if code >= _KATAKANA_START else code
        if label_character(label) != character:
            raise ValueError(f"no CTC label for {character!r}")
        labels.append(label)
    return labels


@dataclasses.dataclass(frozen=True)
class Word:
    """A word, and its times in seconds: from its first character's first frame to its last character's last."""

    text: str
    start: float
    end: float


def align(logits: Float[np.ndarray, "t c"], labels: Sequence[int]) -> Int[np.ndarray, "n 2"]:
    """The frames of every label on the most likely CTC path that spells them (Viterbi), as half-open intervals.

    Raises ValueError if there are too few frames.
    """
    states = np.full(2 * len(labels) + 1, BLANK)  # blank, label, blank, ... blank
    states[1::2] = labels
    scores = np.asarray(logits, np.float64)
    scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    can_skip = np.zeros(len(states), bool)  # a path can skip the blank between two labels that differ
    can_skip[3::2] = states[3::2] != states[1:-2:2]
    best = np.full(len(states), -np.inf)
    best[:2] = 0.0
    moves = np.zeros((len(scores), len(states)), np.int8)  # by how many states the best path to each state moved
    for frame, score in enumerate(scores):
        if frame:
            step, skip = (np.concatenate([np.full(n, -np.inf), best])[: len(best)] for n in (1, 2))
            candidates = np.stack([best, step, np.where(can_skip, skip, -np.inf)])
            moves[frame] = candidates.argmax(axis=0)
            best = candidates.max(axis=0)
        best = best + score[states]
    state = len(states) - 2 + int(np.argmax(best[-2:])) if labels else 0
    if best[state] == -np.inf:
        raise ValueError(f"{len(scores)} frames are too few for {len(labels)} labels")
    path = np.zeros(len(scores), int)
    for frame in reversed(range(len(scores))):
        path[frame] = state
        state -= int(moves[frame, state])
    label_states = np.arange(1, len(states), 2)
    return np.stack([np.searchsorted(path, label_states, side) for side in ("left", "right")], axis=1)


def words(logits: Float[np.ndarray, "t c"], text: str) -> list[Word]:
    """Times each word of one utterance's text, by `align`. Raises ValueError as `to_labels` and `align` do."""
    texts = text.split()
    frames = align(logits, to_labels(" ".join(texts)))
    timed, position = [], 0
    for word in texts:
        start, end = frames[position, 0], frames[position + len(word) - 1, 1]
        timed.append(Word(word, float(start * FRAME_SECONDS), float(end * FRAME_SECONDS)))
        position += len(word) + 1
    return timed
