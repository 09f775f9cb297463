"""Keyword automata against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_speculation import VOCABULARY, boosts_after, keyword_lists, pooled

from granite_jax.keywords.automaton import FullError, Phrase, batch_automata, build_automaton, no_keywords
from granite_jax.keywords.bias import KeywordBias

ROWS, LENGTH = 4, 12


@jax.jit
def run_automata(automata, tokens, logits):
    """States before each token, the boosts that the tokens had, and biased logits and best token at each place."""
    states, boosts = automata.walk(automata.starts, tokens, jnp.int32(LENGTH))
    return states, boosts, *bias_logits(automata, logits, states)


def bias_logits(automata, logits, states):
    bias = KeywordBias.from_automata(automata, logits.shape[-1])
    unbiased = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return bias.add(logits, states), bias.best(logits, states, unbiased)


@given(data=st.data(), seed=st.integers(0, 10_000))
def test_the_automaton_finds_what_a_plain_search_finds(data: st.DataObject, seed: int) -> None:
    # Given lists of keywords of which two are the same, and texts in which they occur in part or as a whole
    lists = data.draw(st.lists(keyword_lists(), min_size=ROWS, max_size=ROWS))
    lists[-1] = lists[0]
    tokens = st.integers(0, 4) | st.integers(0, VOCABULARY - 1)
    texts = [data.draw(st.lists(tokens, min_size=LENGTH, max_size=LENGTH)) for _ in lists]
    logits = np.random.default_rng(seed).standard_normal((ROWS, LENGTH + 1, VOCABULARY)).astype(np.float32)

    # When an automaton walks over each
    states, boosts, biased, best = run_automata(pooled(lists), jnp.array(texts, jnp.int32), logits)

    # Then it lifts what a search for the prefixes of all keywords at the end of the text finds, and nothing else
    for row, (text, phrases) in enumerate(zip(texts, lists, strict=True)):
        expected = np.array([boosts_after(text[:place], phrases) for place in range(LENGTH + 1)])
        np.testing.assert_allclose(boosts[row], expected[np.arange(LENGTH), text], rtol=1e-6)
        np.testing.assert_allclose(biased[row], logits[row] + expected, rtol=1e-5, atol=1e-5)
        assert best[row].tolist() == np.argmax(logits[row] + expected.astype(np.float32), axis=1).tolist()
        assert phrases or not np.any(states[row])


def test_states_with_many_edges_are_searched_to_the_last() -> None:
    # Given 300 keywords with one first token, more than are looked at together, and logits that like the very last
    wide = 1_000
    phrases = [Phrase((7, 600 + i), 4.0 + i / 1000) for i in range(300)]
    automata = jax.tree.map(jnp.asarray, batch_automata([build_automaton(phrases)], [0, -1], states=1024))
    logits = jnp.zeros((2, 1, wide))

    # When its state is entered in a row with the list and in one without
    states, _ = automata.advance(automata.starts, jnp.array([7, 7]))
    biased, best = bias_logits(automata, logits, states[:, None])

    # Then the first continues with the largest boost of all, the second is not touched
    assert best[:, 0].tolist() == [899, 0]
    assert jnp.count_nonzero(biased, axis=(1, 2)).tolist() == [301, 0]


def test_equal_sizes_whatever_the_lists() -> None:
    # Given no keywords, and as many as there is room for
    rng = np.random.default_rng(0)
    full = build_automaton(Phrase(tuple(rng.integers(0, 100_000, 7).tolist()), 1.0) for _ in range(9_000))
    automata = no_keywords(3), batch_automata([full], [0, -1, 0])
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), a) for a in automata]

    # Then nothing distinguishes them for a compiler, and one list more is refused
    assert shapes[0] == shapes[1]
    with pytest.raises(FullError):
        batch_automata([full, full], [0, 1, -1])
