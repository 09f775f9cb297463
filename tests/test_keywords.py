"""Keyword automata against brute force, the acoustic gate against all alignments, and what callers may ask for."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_fixture import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_speculation import VOCABULARY, boosts_after, keyword_lists, pooled

from granite_jax import ctc, gate
from granite_jax.decoding import Bias, FullError, Phrase, build, no_keywords, pool
from granite_jax.gate import WIDTH, Candidates, Support, candidates
from granite_jax.keywords import Biasing, prepare, select, sounds

# The automaton.

ROWS, LENGTH = 4, 12


@jax.jit
def run_automata(automata, tokens, logits):
    """States before each token, the boosts that the tokens had, and the best token at each place."""
    states, boosts = automata.walk(automata.starts, tokens, jnp.int32(LENGTH))
    return states, boosts, Bias.of(automata, VOCABULARY).best(logits, states)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_the_automaton_finds_what_a_plain_search_finds(data: st.DataObject, seed: int) -> None:
    # Given lists of keywords of which two are the same, and texts in which they occur in part or as a whole
    lists = data.draw(st.lists(keyword_lists(), min_size=ROWS, max_size=ROWS))
    lists[-1] = lists[0]
    tokens = st.integers(0, 4) | st.integers(0, VOCABULARY - 1)
    texts = [data.draw(st.lists(tokens, min_size=LENGTH, max_size=LENGTH)) for _ in lists]
    logits = np.random.default_rng(seed).standard_normal((ROWS, LENGTH + 1, VOCABULARY)).astype(np.float32)

    # When an automaton walks over each
    states, boosts, best = run_automata(pooled(lists), jnp.array(texts, jnp.int32), logits)

    # Then it lifts what a search for the prefixes of all keywords at the end of the text finds, and nothing else
    for row, (text, phrases) in enumerate(zip(texts, lists, strict=True)):
        expected = np.array([boosts_after(text[:place], phrases) for place in range(LENGTH + 1)])
        np.testing.assert_allclose(boosts[row], expected[np.arange(LENGTH), text], rtol=1e-6)
        assert best[row].tolist() == np.argmax(logits[row] + expected.astype(np.float32), axis=1).tolist()
        assert phrases or not np.any(states[row])


def test_states_with_many_edges_are_searched_to_the_last() -> None:
    # Given 300 keywords with one first token, more than are looked at together, and logits that like the very last
    wide = 1_000
    phrases = [Phrase((7, 600 + i), 4.0 + i / 1000) for i in range(300)]
    automata = jax.tree.map(jnp.asarray, pool([build(phrases)], [0, -1], states=1024))
    logits = jnp.zeros((2, 1, wide))

    # When its state is entered in a row with the list and in one without
    states, _ = automata.advance(automata.starts, jnp.array([7, 7]))
    best = Bias.of(automata, wide).best(logits, states[:, None])

    # Then the first continues with the largest boost of all, the second is not touched
    assert best[:, 0].tolist() == [899, 0]


def test_equal_sizes_whatever_the_lists() -> None:
    # Given no keywords, and as many as there is room for
    rng = np.random.default_rng(0)
    full = build(Phrase(tuple(rng.integers(0, 100_000, 7).tolist()), 1.0) for _ in range(9_000))
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), a) for a in (no_keywords(3), pool([full], [0, -1, 0]))]

    # Then nothing distinguishes them for a compiler, and one list more is refused
    assert shapes[0] == shapes[1]
    with pytest.raises(FullError):
        pool([full, full], [0, 1, -1])


# The gate.


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


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_scores_are_those_of_the_best_of_all_alignments(data: st.DataObject, seed: int) -> None:
    # Given logits of two utterances of different length, and keywords with doubled letters
    logits = 3 * np.random.default_rng(seed).standard_normal((2, 5, 4)).astype(np.float32)
    lengths = [5, data.draw(st.integers(1, 5))]
    word = st.lists(st.integers(1, 3), min_size=1, max_size=3)
    lists = [data.draw(st.lists(word, min_size=1, max_size=3)) for _ in range(2)]

    # When scored
    found = jax.jit(gate.support)(jnp.asarray(logits), jnp.array(lengths), labelled(lists))

    # Then
    for row, words in enumerate(lists):
        relative = (logits[row] - logits[row].max(axis=-1, keepdims=True))[: lengths[row]]
        assert np.all(np.diff(found.scores[row][: len(words)]) <= 0)
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


def labelled(lists: list[list[list[int]]]) -> Candidates:
    matrices = []
    for words in lists:
        matrices.append(np.zeros((len(words), WIDTH), np.int16))
        for row, word in enumerate(words):
            matrices[-1][row, WIDTH - len(word) :] = word
    return jax.tree.map(jnp.asarray, candidates(matrices))


def test_long_lists_are_scored_to_the_last() -> None:
    # Given frames that spell "zelgad tim", and 700 keywords of all lengths of which the spoken are the last
    spelt = [label for character in ctc.to_labels("zelgad tim") for label in (character, 0)]
    logits = jnp.full((1, len(spelt), 256), -9.0).at[0, jnp.arange(len(spelt)), jnp.array(spelt)].set(0.0)
    rng = np.random.default_rng(0)
    others = [rng.integers(97, 123, rng.integers(3, 30)).tolist() for _ in range(698)]
    lists = [[*others, ctc.to_labels("tim"), ctc.to_labels("zelgad")]]

    # When scored, then these two are the best, at no cost, where they were spoken
    found = gate.support(logits, jnp.array([len(spelt)]), labelled(lists))
    assert sorted(found.columns[0, :2].tolist()) == [698, 699]
    assert found.scores[0, :2].tolist() == [0, 0]
    places = zip(found.starts[0].tolist(), found.ends[0].tolist(), strict=True)
    spans = dict(zip(found.columns[0].tolist(), places, strict=True))
    assert (spans[698], spans[699]) == ((14, 19), (0, 11))
    assert found.scores[0, 2] < -1


@pytest.mark.parametrize(
    ("keyword", "heard"),
    [
        ("Kowalczyk", "kowalczyk"),
        ("Müller-Lüdenscheidt", "müller lüdenscheidt"),
        ("O'Neil", "o'neil"),
        ("Łódź Nový", "ódz nový"),
        ("とよた コーヒー", "トヨタ コーヒー"),
        ("gpt-4o", "gpt o"),
        ("\uff21\uff22\uff23", "abc"),
        ("2024", ""),
        ("東京", ""),
        ("+++", ""),
        ("'", ""),
    ],
)
def test_what_of_a_keyword_is_scored(keyword: str, heard: str) -> None:
    # Then letters that have a label remain, of this case, accent and width or another
    assert "".join(map(ctc.label_character, sounds(keyword, 348))) == heard


def test_labels_beyond_the_head_are_not_scored() -> None:
    # Given a CTC head without katakana, as of the 3.3 models
    assert sounds("トヨタ", 256) == []


# From what is heard to keywords and drafts.


def spelt(text: str) -> np.ndarray:
    """Greedy labels of a text, two frames a character and a blank after it."""
    return np.array([x for label in ctc.to_labels(text) for x in (label, label, 0)])


def heard_in(text: str, scores: dict[str, tuple[float, str]]) -> tuple:
    """Keywords and their support: of each its score and the part of the text where it was heard."""
    prepared = prepare([(word, None) for word in scores], Biasing(), Tokenizer(make_tokenizer().to_str()), 348)
    columns = [prepared.heard.index(list(scores).index(word)) for word in scores]
    spans = [(3 * text.index(part), 3 * (text.index(part) + len(part)) - 1) for _, part in scores.values()]
    order = sorted(range(len(scores)), key=lambda i: -list(scores.values())[i][0])
    found = Support(
        np.array([[columns[i] for i in order]]),
        np.array([[list(scores.values())[i][0] for i in order]]),
        np.array([[spans[i][0] for i in order]]),
        np.array([[spans[i][1] for i in order]]),
    )  # pyright: ignore[reportArgumentType]
    return prepared, select(prepared, found, 0, spelt(text), -1.5)


def test_of_rivals_in_one_place_the_better_is_heard() -> None:
    # Given a name that was misheard, two others that sound like it, and one that was not spoken
    text = "call timbada now"
    scores = {
        "timbado": (-0.3, "timbada"),
        "timbad": (0.0, "timbad"),
        "simbado": (-0.9, "timbada"),
        "zelgad": (-2.0, "now"),
    }

    # When the gate decides
    keywords, heard = heard_in(text, scores)

    # Then what passes the threshold is heard, but for what sounds worse than another in its place
    assert [keywords.texts[one.keyword] for one in heard] == ["timbad"]
