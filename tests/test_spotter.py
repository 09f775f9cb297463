"""The keyword spotter against all alignments."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from granite_jax.keywords import spotter
from granite_jax.keywords.spotter import WIDTH, KeywordBatch, make_keyword_batch
from granite_jax.models.layers import ctc


def best_alignment(relative: np.ndarray, labels: list[int]) -> tuple[float, int, int]:
    """The best score of any path, blanks and repetitions included, that collapses to the labels; its span."""
    best = (-math.inf, 0, 0)
    frames = len(relative)
    for start, end in itertools.combinations(range(frames + 1), 2):
        for path in itertools.product(sorted({0, *labels}), repeat=end - start):
            if path[0] and path[-1] and ctc.collapse(path) == labels:
                score = relative[np.arange(start, end), path].sum() / len(labels)
                best = max(best, (score, start, end))
    return best


@given(data=st.data(), seed=st.integers(0, 10_000))
def test_scores_are_those_of_the_best_of_all_alignments(data: st.DataObject, seed: int) -> None:
    # Given logits of two utterances of different length, and keywords with doubled letters
    logits = 3 * np.random.default_rng(seed).standard_normal((2, 5, 4)).astype(np.float32)
    lengths = [5, data.draw(st.integers(1, 5))]
    word = st.lists(st.integers(1, 3), min_size=1, max_size=3)
    lists = [data.draw(st.lists(word, min_size=1, max_size=3)) for _ in range(2)]

    # When scored
    found = jax.jit(spotter.score_keywords)(jnp.asarray(logits), jnp.array(lengths), labeled(lists))

    # Then
    for row, words in enumerate(lists):
        relative = (logits[row] - logits[row].max(axis=-1, keepdims=True))[: lengths[row]]
        assert found.scores[row].tolist() == sorted(found.scores[row].tolist(), reverse=True)
        assert not np.isfinite(found.scores[row][len(words) :]).any()
        for column, score, start, end in list(zip(*(np.asarray(x[row]) for x in vars(found).values()), strict=True))[
            : len(words)
        ]:
            expected = best_alignment(relative, words[column])
            np.testing.assert_allclose(score, expected[0], rtol=1e-4, atol=1e-5)
            if np.isfinite(expected[0]):
                # The span is one that has this score.
                inside = best_alignment(relative[start:end], words[column])
                np.testing.assert_allclose(inside[0], score, rtol=1e-4, atol=1e-5)


def labeled(lists: list[list[list[int]]]) -> KeywordBatch:
    matrices = []
    for words in lists:
        matrices.append(np.zeros((len(words), WIDTH), np.int16))
        for row, word in enumerate(words):
            matrices[-1][row, WIDTH - len(word) :] = word
    return jax.tree.map(jnp.asarray, make_keyword_batch(matrices))


def test_long_lists_are_scored_to_the_last() -> None:
    # Given frames that spell "zelgad tim", and 700 keywords of all lengths of which the spoken are the last
    spelled = [label for character in ctc.to_labels("zelgad tim") for label in (character, 0)]
    logits = jnp.full((1, len(spelled), 256), -9.0).at[0, jnp.arange(len(spelled)), jnp.array(spelled)].set(0.0)
    rng = np.random.default_rng(0)
    others = [rng.integers(97, 123, rng.integers(3, 30)).tolist() for _ in range(698)]
    lists = [[*others, ctc.to_labels("tim"), ctc.to_labels("zelgad")]]

    # When scored, then these two are the best, at no cost, where they were spoken
    found = spotter.score_keywords(logits, jnp.array([len(spelled)]), labeled(lists))
    assert sorted(found.columns[0, :2].tolist()) == [698, 699]
    assert found.scores[0, :2].tolist() == [0, 0]
    places = zip(found.starts[0].tolist(), found.ends[0].tolist(), strict=True)
    spans = dict(zip(found.columns[0].tolist(), places, strict=True))
    assert (spans[698], spans[699]) == ((14, 19), (0, 11))
    assert found.scores[0, 2] < -1
