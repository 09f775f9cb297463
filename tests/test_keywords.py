"""Keyword automata against brute force, the acoustic gate against all alignments, and what callers may ask for."""

import functools
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_fixture import make_tokenizer, write_random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_speculation import VOCABULARY, boosts_after, keyword_lists, pooled
from typer.testing import CliRunner

import granite_jax as gj
from granite_jax import ctc, gate
from granite_jax.cli import app
from granite_jax.decoding import Bias, FullError, Phrase, build, no_keywords, pool
from granite_jax.decoding.keywords import FIRST
from granite_jax.gate import WIDTH, Candidates, Support, candidates
from granite_jax.keywords import (
    IN_PLACE,
    Biasing,
    Heard,
    Place,
    biasing,
    checked,
    keywords_of,
    places,
    prepare,
    read_keywords,
    repair,
    select,
    sounds,
    trie_of,
)
from granite_jax.programs import Bucket
from granite_jax.tokenizer import Tokenizer

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


NOTHING = spelt("")


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
        "timbado": (-0.2, "timbada"),
        "timbad": (0.0, "timbad"),
        "simbado": (-0.9, "timbada"),
        "zelgad": (-2, "now"),
    }

    # When the gate decides
    keywords, heard = heard_in(text, scores)

    # Then only what sounds best in its place is heard; the beginning of a word is a worse account of it than the word
    assert [keywords.texts[one.keyword] for one in heard] == ["timbado"]
    # And it takes the misheard name's place in the draft
    assert repair(spelt(text), heard, keywords.texts) == "call timbado now"


@pytest.mark.parametrize(
    ("text", "keyword", "part", "expected"),
    [
        ("call dak fiki now", "dakfiki", "dak fiki", "call dakfiki now"),  # two words for one
        ("go to newyork now", "New York", "newyork", "go to new york now"),
        ("started", "art", "art", "started"),  # within a word
        ("call call", "Karl", "call", "karl call"),
        ("a  b", "b", "b", "a b"),
    ],
)
def test_words_of_the_draft_give_way_to_the_keyword_heard_in_their_place(
    text: str, keyword: str, part: str, expected: str
) -> None:
    keywords, heard = heard_in(text, {keyword: (-0.1, part)})
    assert repair(spelt(text), heard, keywords.texts) == expected


def test_keywords_that_cannot_be_scored_are_always_used() -> None:
    # Given a keyword that is heard, one that is not, and one without a letter that could be
    prepared = prepare(
        [("zelgad", None), ("timbado", None), ("2024", 3.0)],
        Biasing(boost=6.0),
        Tokenizer(make_tokenizer().to_str()),
        348,
    )

    # When one is heard, at half the threshold
    heard = [Heard(0, -0.75, 0, 10)]

    # Then the automaton is that of the first, less boosted, and the last
    ways = prepared.phrases(0) + prepared.phrases(0, Place((), first=True))
    expected = [way._replace(boost=way.boost * 0.75) for way in ways] + list(prepared.phrases(2))
    for found, wanted in zip(trie_of(prepared, heard, NOTHING, -1.5), build(expected), strict=True):
        assert set(np.atleast_1d(found).tolist()) == set(np.atleast_1d(wanted).tolist())
    assert trie_of(prepared, [], NOTHING, -1.5) is prepared.trie
    without = prepare([("zelgad", None)], Biasing(), Tokenizer(make_tokenizer().to_str()), 348)
    assert trie_of(without, [], NOTHING, -1.5) is None


def test_keywords_are_lifted_more_where_the_draft_has_them() -> None:
    # Given a keyword that is heard, and a draft that has it at its beginning and later
    tokenizer = Tokenizer(make_tokenizer().to_str())
    prepared = prepare([("kai", None)], Biasing(boost=8.0), tokenizer, 348)
    trie = trie_of(prepared, [Heard(0, 0.0, 0, 8)], spelt("kai asks where kai is"), -1.5)
    assert trie is not None

    # When a text is written
    automata = jax.tree.map(jnp.asarray, pool([trie], [0]))

    def lift(before: str) -> float:
        """Of the first token of the keyword after these words."""
        tokens = jnp.array([[*tokenizer.encode(before), *tokenizer.encode(" kai" if before else "kai")[:1]]])
        return float(automata.walk(automata.starts, tokens, jnp.int32(tokens.shape[1]))[1][0, -1])

    # Then its beginning is lifted most behind the same two words and where the text begins, less behind one of them
    assert lift("") == lift("kai asks where") == 8.0 * IN_PLACE[1]
    assert lift("here is where") == 8.0 * IN_PLACE[0]
    assert lift("here is") == 8.0 * FIRST
    assert FIRST < IN_PLACE[0] < IN_PLACE[1]


def test_a_keyword_that_the_draft_joins_to_another_word_has_its_place() -> None:
    # Given a draft that lacks a space, when the keyword is heard within the joined words
    tokenizer = Tokenizer(make_tokenizer().to_str())
    prepared = prepare([("kai", None)], Biasing(), tokenizer, 348)
    labels = spelt("wait forkai")
    found = trie_of(prepared, [Heard(0, -0.5, 24, 32)], labels, -1.5)

    # Then the automaton is that of the words set apart
    apart = trie_of(prepared, [Heard(0, -0.5, 27, 35)], spelt("wait for kai"), -1.5)
    for one, other in zip(found or (), apart or (), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_places_of_a_keyword_in_a_draft() -> None:
    # Given a draft with a keyword of two words, once behind one word, once behind many
    draft = "to new york and from there to new york to york"

    # Then its places are told by the word before it and by the two words before it
    assert places(draft, "new york") == [Place(("to",), True), Place(("to",), False), Place(("there", "to"), False)]
    assert places(draft, "to")[:3] == [Place((), True), Place(("there",), False), Place(("from", "there"), False)]
    assert places(draft, "boston") == places("", "to") == []


def test_a_draft_full_of_keywords_has_room() -> None:
    # Given a draft that repeats a long keyword at thousands of places
    tokenizer = Tokenizer(make_tokenizer().to_str())
    prepared = prepare([("abcdefghijklmnopqrstuvwxyz" * 3, None)], Biasing(), tokenizer, 348)
    others = ("".join(chr(97 + int(digit)) for digit in f"{i:030}") for i in range(2000))
    draft = spelt(" ".join(f"{other} {prepared.texts[0]}" for other in others))

    # Then as many of these are used as there are states for
    trie = trie_of(prepared, [Heard(0, -0.5, 0, 9)], draft, -1.5)
    assert trie is not None and len(trie.failures) > 30_000
    pool([trie], [0])


@pytest.mark.parametrize(("lower_case", "written"), [(True, {"kai"}), (False, {"Kai"}), (None, {"Kai", "kai"})])
def test_the_case_is_that_of_the_task(lower_case: bool | None, written: set[str]) -> None:
    # Then keywords are written in it, after a space, or without one where the text begins
    tokenizer = Tokenizer(make_tokenizer().to_str())
    ways = prepare([("Kai", None)], Biasing(lower_case=lower_case), tokenizer, 348).phrases(0)
    assert {tokenizer.decode(way.tokens) for way in ways if way.anywhere} == {f" {text}" for text in written}
    assert {tokenizer.decode(way.tokens) for way in ways if not way.anywhere} == written


def test_scripts_without_spaces_need_none() -> None:
    ways = prepare([("\u6771\u4eac", None)], Biasing(), Tokenizer(make_tokenizer().to_str()), 348).phrases(0)
    assert all(way.anywhere for way in ways)


# What callers may ask for.


def test_one_list_for_all_or_a_list_for_each() -> None:
    def found(keywords: Any, inputs: int) -> list:
        return [checked(entries, Biasing()) for entries in keywords_of(keywords, inputs, Biasing())]

    assert found(["Kai", ("Zoe", 2)], 2) == [(("Kai", None), ("Zoe", 2.0))] * 2
    assert found([["Kai", "Kai"], None, []], 3) == [(("Kai", None),), (), ()]
    assert found(None, 1) == found([], 1) == [()]
    assert found(("  New\u3000 York ",), 1) == [(("New York", None),)]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ("Kai", "keywords must be a list"),
        (7, "keywords must be a list"),
        (["Kai", ["Zoe"]], "a list of keywords for all inputs, or a list with a list for every input"),
        ([["Kai"]], "keywords has 1 lists for 2 inputs"),
        (["a", " "], "keyword is empty"),
        (["a\x00b"], "control character"),
        (["a\ud800"], "control character"),
        ([3], "keyword must be a string, not int"),
        (["x" * 101], "keyword 'xxx.* has 101 characters, at most 100"),
        ([f"x{i}" for i in range(2049)], "2049 keywords for one input, at most 2048"),
        ([("Kai", -1)], "the boost of keyword 'Kai' is -1, not a number of nats from 0 to 50"),
        ([("Kai", float("nan"))], "the boost of keyword 'Kai' is nan"),
        ([("Kai", "3")], "the boost of keyword 'Kai' is '3'"),
    ],
)
def test_hostile_keywords_are_named(keywords: object, message: str) -> None:
    with pytest.raises(gj.GraniteError, match=message):
        keywords_of(keywords, 2, Biasing())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((-1, None, "decoder"), "keyword_boost is -1"),
        ((math.inf, None, "decoder"), "keyword_boost is inf"),
        ((None, 0.5, "decoder"), "keyword_gate is 0.5, not a number below 0, or False"),
        ((None, True, "decoder"), "keyword_gate is True"),
        ((None, None, "nowhere"), "keywords_in is one of decoder, prompt, both"),
    ],
)
def test_wrong_options_are_named(options: tuple, message: str) -> None:
    with pytest.raises(gj.GraniteError, match=message):
        biasing(*options, True)


def test_special_tokens_in_keywords_are_plain_text() -> None:
    # Given keywords that spell special tokens
    tokenizer = Tokenizer(make_tokenizer().to_str())
    prepared = prepare([("<|end_of_text|>", None), ("<|audio|>", None)], Biasing(), tokenizer, 348)
    assert not tokenizer.special_ids & {token for i in range(2) for way in prepared.phrases(i) for token in way.tokens}


def test_a_file_of_keywords(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfKai\n\n New York\t2.5\r\n#1\n")
    assert read_keywords(path) == ["Kai", (" New York", 2.5), "#1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Kai\nZoe\tmuch", "names.txt, line 2: keyword 'Zoe': its boost is 'much', not a number"),
        (b"Zoe\t99", "names.txt, line 1: keyword 'Zoe': its boost is 99.0, not a number of nats from 0"),
        (b"\xff", "names.txt: cannot be read"),
    ],
)
def test_bad_files_of_keywords_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(gj.GraniteError, match=message):
        read_keywords(path)


# The whole pipeline, on a random checkpoint.

LIMIT = 12


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory = tmp_path_factory.mktemp("random")
    write_random_checkpoint(directory, seed=1)
    asr = gj.Transcriber.from_pretrained(
        directory, dtype="float32", batch_size=4, buckets=[Bucket(4, 48_000, 140, 170)], compilation_cache=False
    )
    rng = np.random.default_rng(0)
    audio = [0.1 * rng.standard_normal(int(16_000 * s)).astype(np.float32) for s in (1.0, 2.0, 1.5, 2.5, 0.7, 3.0)]
    run = functools.partial(asr.transcribe, audio, max_new_tokens=LIMIT)
    return SimpleNamespace(asr=asr, audio=audio, run=run, plain=run())


def tokens_of(transcripts: list[gj.Transcript]) -> list[tuple[int, ...]]:
    return [t.tokens for t in transcripts]


def test_speculative_is_greedy_with_keywords_and_nothing_more_is_compiled(pipeline: SimpleNamespace) -> None:
    # Given lists of keywords from none to hundreds, one each, and strong boosts
    rng = np.random.default_rng(1)
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(400)]
    lists = [words[:3], None, words, ["2024", "the", "speech"], words[:40], words]
    options = {"keywords": lists, "keyword_boost": 20.0, "keyword_gate": False}

    # When they are used, heard or not
    greedy, lossless = pipeline.run(speculative=False, **options), pipeline.run(**options)

    # Then both write the same, in which the keywords have left their mark, but not in the row without
    assert tokens_of(lossless) == tokens_of(greedy)
    changed = [a.tokens != b.tokens for a, b in zip(greedy, pipeline.plain, strict=True)]
    assert sum(changed) >= 4 and not changed[1]
    # And each writes what it writes alone, with a gate, too
    alone = [pipeline.asr.transcribe(a, max_new_tokens=LIMIT, **(options | {"keywords": k or []}))[0].tokens
             for a, k in zip(pipeline.audio, lists, strict=True)]  # fmt: skip
    assert alone == tokens_of(greedy)
    gated = pipeline.run(**options | {"keyword_gate": -8.0})
    assert any(t.stats.get("keywords") for t in gated)
    assert tokens_of(gated) == tokens_of(pipeline.run(speculative=False, **options | {"keyword_gate": -8.0}))
    assert pipeline.asr.compilations == 3


def test_no_keywords_change_nothing(pipeline: SimpleNamespace) -> None:
    # Given empty lists, keywords without boost, and keywords of which none is heard
    for options in ({"keywords": []}, {"keywords": [[]] * 6}, {"keywords": ["speech"], "keyword_boost": 0.0},
                    {"keywords": ["speech"], "keyword_gate": -1e-6}):  # fmt: skip
        # Then the tokens are those without biasing
        assert tokens_of(pipeline.run(**options)) == tokens_of(pipeline.plain)


def test_a_bad_list_costs_only_its_own_input(pipeline: SimpleNamespace) -> None:
    # Given a list for each input, one of which has a control character, when errors are returned
    found = pipeline.run(keywords=[["speech"], ["a\x00b"], *[None] * 4], on_error="return", keyword_boost=0.0)

    # Then that input alone has one
    assert [t.error is None for t in found] == [True, False, True, True, True, True]
    assert "control character" in found[1].error
    assert tokens_of(found[2:]) == tokens_of(pipeline.plain[2:])


def test_long_lists_of_their_own_are_run_in_turn(pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given room for the states of one row's list only
    lists = [[f"{chr(97 + i)}{n}" for n in range(100, 130)] for i in range(6)]
    options = {"keywords": lists, "keyword_gate": False, "keyword_boost": 9.0}
    expected = tokens_of(pipeline.run(**options))
    monkeypatch.setattr("granite_jax.pipeline.pool", functools.partial(limited_pool, edges=80))

    # When transcribed, then batches are split, and the tokens stay
    pipeline.asr._pipeline._pools.clear()
    assert tokens_of(pipeline.run(**options)) == expected


def limited_pool(tries, rows, edges: int):
    if sum(len(trie.tokens) for trie in tries) > edges:
        raise FullError("full")
    return pool(tries, rows)


def test_keywords_in_the_prompt_are_the_released_models(pipeline: SimpleNamespace) -> None:
    # Given keywords for the prompt, then the result is that of the prompt with its clause, decoded without biasing
    by_hand = pipeline.run(prompt="transcribe the speech to text. Keywords: Kai, Zoe", speculative=False)
    assert tokens_of(pipeline.run(keywords=["Kai", "Zoe"], keywords_in="prompt")) == tokens_of(by_hand)
    both = pipeline.run(keywords=["Kai", "Zoe"], keywords_in="both", keyword_gate=False, keyword_boost=50.0)
    assert tokens_of(both) != tokens_of(by_hand)
    with pytest.raises(gj.PromptError, match="101 keywords are too many for a prompt, at most 100"):
        pipeline.run(keywords=[f"x{i}" for i in range(101)], keywords_in="prompt")


def test_repaired_drafts_are_the_result_where_no_language_model_runs(
    pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a gate that lets a keyword pass, and a draft of which it takes all words' place
    monkeypatch.setattr("granite_jax.pipeline.repair", lambda labels, heard, texts: texts[heard[0].keyword])

    # When every CTC text is final
    found = pipeline.run(keywords=["Kai"], keyword_gate=-1e4, speculative="relaxed", ctc_threshold=100.0)

    # Then the repaired draft is the text, while the encoder's own is reported as it was
    assert {(t.stats["route"], t.text, t.stats["keywords"]) for t in found} == {("ctc", "kai", ("kai",))}
    assert [t.ctc_text for t in found] == [t.ctc_text for t in pipeline.plain]


def test_command_line_options_reach_the_transcriber(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given a file of keywords, and a transcriber that notes what it is asked for
    asked: dict = {}

    def transcribe(files, **options):
        asked.update(options)
        return [gj.Transcript("a.wav", "text", (1,), 1.0, "text", {})]

    monkeypatch.setattr(gj.Transcriber, "from_pretrained", lambda *_, **__: SimpleNamespace(transcribe=transcribe))
    (tmp_path / "names.txt").write_text("\ufeffKai\nZoe\t2.5\n", encoding="utf-8")

    # When run with keywords, then they arrive
    options = ["--keywords-file", str(tmp_path / "names.txt"), "--keyword", "Ada", "--keyword", "B C"]
    CliRunner().invoke(app, ["transcribe", "a.wav", *options, "--keyword-boost", "3", "--keywords-in", "both"])
    assert asked["keywords"] == ["Kai", ("Zoe", 2.5), "Ada", "B C"]
    assert (asked["keyword_boost"], asked["keywords_in"]) == (3.0, "both")
    # And a bad line is named with its file
    (tmp_path / "names.txt").write_text("Kai\tmuch\n")
    result = CliRunner().invoke(app, ["transcribe", "a.wav", *options[:2]])
    assert result.exit_code == 2
    assert "names.txt, line 1: keyword 'Kai': its boost is 'much', not a number" in result.output
