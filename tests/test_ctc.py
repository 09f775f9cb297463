"""Greedy CTC: labels, text, entropy."""

import jax.numpy as jnp
import numpy as np
import pytest

from granite_jax.models.layers import ctc


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
