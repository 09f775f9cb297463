"""CTC forced alignment of one utterance in NumPy, the oracle of `granite_jax.models.layers.ctc_alignment`."""

from collections.abc import Sequence

import numpy as np

from granite_jax.models.layers.ctc_alignment import WILDCARD, WILDCARD_PENALTY


def align(logits: np.ndarray, labels: Sequence[int]) -> np.ndarray | None:
    """The state of each frame on the most likely path, as `ctc_alignment` numbers them; None if there is no path."""
    lattice = np.zeros(2 * len(labels) + 1, int)  # blank, label, blank, ... blank
    lattice[1::2] = labels
    best = np.full(len(lattice), -np.inf)
    best[0] = 0.0  # before the first frame
    moves = np.zeros((len(logits), len(lattice)), int)
    for frame, row in enumerate(state_scores(logits, labels)):
        for state in range(len(lattice)):
            sources = [best[state], best[state - 1] if state else -np.inf]
            if state % 2 and state > 1 and (lattice[state] != lattice[state - 2] or lattice[state] == WILDCARD):
                sources.append(best[state - 2])
            moves[frame, state] = int(np.argmax(sources))
            row[state] += max(sources)
        best = row
    state = len(lattice) - 1
    if labels and best[state - 1] >= best[state]:
        state -= 1
    if best[state] == -np.inf:
        return None
    path = np.zeros(len(logits), int)
    for frame in reversed(range(len(logits))):
        path[frame] = state
        state -= moves[frame, state]
    return path


def state_scores(logits: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Score of every state at every frame, float64 `[t, 2 n + 1]`."""
    scores = np.asarray(logits, np.float64)
    scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    states = np.repeat(scores[:, :1], 2 * len(labels) + 1, axis=1)
    for index, label in enumerate(labels):
        states[:, 2 * index + 1] = scores.max(axis=1) - WILDCARD_PENALTY if label == WILDCARD else scores[:, label]
    return states
