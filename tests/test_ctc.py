"""Greedy CTC: labels, text, entropy; alignment."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from granite_jax.model import ctc


def test_collapse_drops_repetitions_and_blanks_but_keeps_letters_doubled_across_a_blank():
    # Given frames that say "hello" with a blank between the two l
    frames = [0, 104, 104, 101, 108, 0, 108, 108, 111, 0]
    # When collapsed / Then both l stay
    assert ctc.to_text(frames) == "hello"


def test_labels_from_256_on_are_katakana():
    # Given the first and the last label of the second table
    # Then they are small a and the end of the Katakana block, not chr(label)
    assert ctc.label_character(256) == "\u30a1"
    assert ctc.label_character(347) == "\u30fc"
    assert ctc.label_character(348) == ctc.label_character(7) == ""


def test_text_survives_the_way_to_labels_and_back():
    # Given Latin-1 and Katakana text
    text = "d'être コーヒー"
    # When mapped to labels, with blanks between so that repetitions stay
    frames = [label for character in ctc.to_labels(text) for label in (character, ctc.BLANK)]
    # Then it comes back
    assert ctc.to_text(frames) == text


@pytest.mark.parametrize("character", ["中", "\n", "Ω"])
def test_a_character_without_a_label_is_named(character):
    with pytest.raises(ValueError, match="no CTC label"):
        ctc.to_labels(character)


def test_frames_past_the_end_are_blank_and_certain():
    # Given logits that prefer label 5 everywhere, uniform otherwise, of two rows of different length
    logits = jnp.zeros((2, 4, 8)).at[:, :, 5].set(2.0)
    lengths = jnp.array([4, 2])
    # When reduced
    labels, entropy = ctc.best_labels(logits, lengths), ctc.frame_entropy(logits, lengths)
    # Then only valid frames speak, and their entropy is that of the softmax in nats
    p = np.exp([2.0, *[0.0] * 7]) / np.exp([2.0, *[0.0] * 7]).sum()
    assert labels.tolist() == [[5, 5, 5, 5], [5, 5, 0, 0]]
    np.testing.assert_allclose(entropy[0], -(p * np.log(p)).sum(), rtol=1e-5)
    np.testing.assert_array_equal(entropy[1, 2:], 0.0)


def _brute_force(logits: np.ndarray, labels: list[int]) -> tuple[float, list[list[int]]]:
    """The best score of a path that collapses to the labels, and all paths of that score."""
    scores = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    found: dict[float, list[list[int]]] = {}
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        if ctc.collapse(list(path)) == labels:
            found.setdefault(round(sum(scores[t, label] for t, label in enumerate(path)), 9), []).append(list(path))
    best = max(found)
    return best, found[best]


@pytest.mark.parametrize("labels", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 2], []])
def test_alignment_is_the_best_path_of_all(labels, num_cases):
    # Given random logits over five frames, when aligned, then the spans are those of the best path
    rng = np.random.default_rng(len(labels))
    for _ in range(num_cases):
        logits = 3 * rng.standard_normal((5, 3))
        spans = ctc.align(logits, labels)
        path = np.zeros(5, int)
        for label, (start, end) in zip(labels, spans, strict=True):
            assert end > start
            path[start:end] = label
        assert path.tolist() in _brute_force(logits, labels)[1]


def test_too_few_frames_for_a_text():
    with pytest.raises(ValueError, match="2 frames are too few for 2 labels"):
        ctc.align(np.zeros((2, 3)), [1, 1])


def test_words_have_times():
    # Given frames that say "ab c", two blank ones in front
    frames = [0, 0, ord("a"), ord("a"), 0, ord("b"), ord(" "), 0, ord("c")]
    logits = 9.0 * np.eye(348)[frames]
    # When aligned, then times are those of 20 ms frames
    assert ctc.words(logits, " ab  c ") == [ctc.Word("ab", 0.04, 0.12), ctc.Word("c", 0.16, 0.18)]
    # And a text may be long
    assert [word.text for word in ctc.words(np.zeros((400, 348)), "ab " * 100)] == ["ab"] * 100
    with pytest.raises(ValueError, match="no CTC label for '你'"):
        ctc.words(logits, "你")
