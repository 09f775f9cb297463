"""CTC forced alignment: the best path, batched."""

import itertools
from collections.abc import Sequence

import ctc_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from granite_jax.models.layers import ctc
from granite_jax.models.layers.ctc_alignment import WILDCARD, align

FRAMES, LABELS, CLASSES = 12, 6, 5
ALIGN = jax.jit(align)


def aligned(rows: Sequence[tuple[np.ndarray, Sequence[int]]], padding: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """States and log-probabilities of utterances aligned in one batch, with something in the padding."""
    logits = np.full((len(rows), FRAMES, CLASSES), 7.0, np.float32)
    labels = np.full((len(rows), LABELS), padding, np.int32)
    for row, (values, text) in enumerate(rows):
        logits[row, : len(values)] = values
        labels[row, : len(text)] = text
    frames, counts = (np.array([len(row[side]) for row in rows], np.int32) for side in (0, 1))
    states, log_probs = ALIGN(logits, frames, labels, counts)
    return np.asarray(states), np.asarray(log_probs)


def score(logits: np.ndarray, labels: Sequence[int], states: np.ndarray) -> float:
    return float(ctc_oracle.state_scores(logits, labels)[np.arange(len(states)), states].sum())


@st.composite
def utterances(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    frames = draw(st.integers(1, FRAMES))
    labels = draw(st.lists(st.sampled_from([WILDCARD, 1, 1, 2, 3, 4]), max_size=LABELS))
    logits = draw(st.sampled_from([0.0, 1.0, 6.0])) * rng.standard_normal((frames, CLASSES))
    return logits.astype(np.float32), labels


def check_path(states: np.ndarray, labels: Sequence[int]) -> None:
    """The path spells the labels."""
    steps = np.diff(states)
    assert states[0] in (0, 1)
    assert states[-1] >= 2 * len(labels) - 1
    assert set(steps.tolist()) <= {0, 1, 2}
    for state in states[1:][steps == 2]:
        index = state // 2
        assert state % 2
        assert labels[index] != labels[index - 1] or labels[index] == WILDCARD


@pytest.mark.fuzz
@given(st.lists(utterances(), min_size=3, max_size=3))
def test_alignment_is_the_oracles(rows: list[tuple[np.ndarray, list[int]]]) -> None:
    # Given utterances of different lengths, when aligned in a batch
    states, log_probs = aligned(rows)
    for (logits, labels), path, probs in zip(rows, states, log_probs, strict=True):
        expected = ctc_oracle.align(logits, labels)
        size = len(logits)
        # Then padding has no states, and a text that does not fit has none at all
        assert (path[size:] == -1).all()
        assert (probs[path == -1] == 0.0).all()
        if expected is None:
            assert (path == -1).all()
            continue
        # And the path spells the labels, with the oracle's score (paths can tie)
        check_path(path[:size], labels)
        assert score(logits, labels, path[:size]) == pytest.approx(score(logits, labels, expected), abs=1e-4)
        # And the log-probabilities are those of its labels
        label_at = [0 if s % 2 == 0 else labels[s // 2] for s in path[:size]]
        log_softmax = np.asarray(jax.nn.log_softmax(logits))
        values = [
            row.max() if label == WILDCARD else row[label] for row, label in zip(log_softmax, label_at, strict=True)
        ]
        np.testing.assert_allclose(probs[:size], values, atol=1e-5)


@pytest.mark.parametrize("labels", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 2], []])
def test_the_path_is_the_best_of_all(labels: list[int]) -> None:
    # Given random logits over five frames of three labels
    rng = np.random.default_rng(len(labels))
    logits = np.full((5, CLASSES), -100.0, np.float32)
    logits[:, :3] = 3 * rng.standard_normal((5, 3))
    scores = np.asarray(jax.nn.log_softmax(logits), np.float64)
    # When aligned
    ((states,), _) = aligned([(logits, labels)])
    # Then no path that collapses to the labels scores more
    paths = [p for p in itertools.product(range(3), repeat=5) if ctc.collapse(list(p)) == labels]
    best = max(paths, key=lambda path: sum(scores[np.arange(5), list(path)]))
    assert [labels[s // 2] if s % 2 else 0 for s in states[:5]] == list(best)


def test_rows_do_not_depend_on_their_batch() -> None:
    # Given rows, one of which does not fit, when aligned together and alone, with other padding, then all is equal
    rng = np.random.default_rng(0)
    rows = [
        (rng.standard_normal((n, CLASSES)).astype(np.float32), t) for n, t in [(12, [1, 2]), (3, [1] * 5), (7, [-1, 4])]
    ]
    together = aligned(rows)
    for index, row in enumerate(rows):
        alone = aligned([row], padding=3)
        for batch, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(batch[index], single[0])


def peaks(labels: Sequence[int]) -> np.ndarray:
    return 9.0 * np.eye(CLASSES, dtype=np.float32)[list(labels)]


@pytest.mark.parametrize(
    ("heard", "labels", "states"),
    [
        # It takes what nothing else explains, from the first such frame to the last, and no pauses.
        ([1, 0, 3, 0, 4, 0, 0, 2], [1, WILDCARD, 2], [1, 2, 3, 3, 3, 4, 4, 5]),
        # At least a frame, even if there is nothing.
        ([1, 0, 2], [1, WILDCARD, 2], [1, 3, 5]),
        # What a label explains is the label's.
        ([1, 1, 3, 2, 2], [1, WILDCARD, 2], [1, 1, 3, 5, 5]),
        # By itself, all that is spoken.
        ([0, 3, 0, 4, 0], [WILDCARD], [0, 1, 1, 1, 2]),
        # Two need no blank between.
        ([3, 4], [WILDCARD, WILDCARD], [1, 3]),
    ],
)
def test_a_wildcard(heard: list[int], labels: list[int], states: list[int]) -> None:
    ((path,), _) = aligned([(peaks(heard), labels)])
    assert path[: len(heard)].tolist() == states


@pytest.mark.parametrize(("frames", "labels"), [(2, [1, 1]), (1, [1, 2]), (2, [WILDCARD] * 3)])
def test_too_few_frames(frames: int, labels: list[int]) -> None:
    (states,), (log_probs,) = aligned([(np.zeros((frames, CLASSES)), labels)])
    assert states.tolist() == [-1] * FRAMES
    assert log_probs.tolist() == [0.0] * FRAMES


def test_a_row_without_labels_is_blank() -> None:
    ((states, none), _) = aligned([(np.zeros((3, CLASSES)), []), (np.zeros((0, CLASSES)), [])])
    assert states.tolist() == [0] * 3 + [-1] * (FRAMES - 3)
    assert none.tolist() == [-1] * FRAMES


def test_numbers_that_are_none_are_reported() -> None:
    # Given a row that is NaN beside one that is not
    (damaged, good), _ = aligned([(np.full((4, CLASSES), np.nan), [1, 2]), (peaks([1, 2]), [1, 2])])
    assert damaged.tolist() == [-1] * FRAMES
    assert good[:2].tolist() == [1, 3]


def test_rows_are_aligned_on_many_devices() -> None:
    # Given eight rows, when each device aligns two of them, then that is what one device finds; labels in bfloat16
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((8, FRAMES, CLASSES)), jnp.bfloat16)
    frames, counts = jnp.arange(5, 13, dtype=jnp.int32), jnp.arange(8, dtype=jnp.int32) % 5
    labels = jnp.asarray(rng.integers(-1, CLASSES - 1, (8, LABELS)), jnp.int32)
    labels = jnp.where(labels == 0, 4, labels)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(align, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows))
    for here, there in zip(ALIGN(logits, frames, labels, counts), sharded(logits, frames, labels, counts), strict=True):
        np.testing.assert_array_equal(here, there)
