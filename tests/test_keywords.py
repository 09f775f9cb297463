"""From what is heard to keywords and drafts, and what callers may ask for."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_fixture import make_tokenizer

import granite_jax as gj
from granite_jax.keywords.automaton import FIRST, batch_automata, build_automaton
from granite_jax.keywords.lists import ctc_labels, lists_by_input, prepare, read_keywords, validated
from granite_jax.keywords.matches import KeywordMatch, filter_matches, repair
from granite_jax.keywords.options import KeywordOptions
from granite_jax.keywords.phrases import IN_PLACE, Place, places
from granite_jax.keywords.spotter import SpottingScores
from granite_jax.keywords.utterance import utterance_automaton
from granite_jax.models.layers import ctc
from granite_jax.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("keyword", "heard", "whole"),
    [
        ("Kowalczyk", "kowalczyk", True),
        ("Müller-Lüdenscheidt", "müller lüdenscheidt", True),
        ("O'Neil", "o'neil", True),
        ("St. Ives, Inc.", "st ives inc", True),
        ("Łódź Nový", "ódz nový", False),
        ("とよた コーヒー", "トヨタ コーヒー", True),
        ("gpt-4o", "gpt o", False),
        ("AT&T", "att", False),
        ("C++", "c", False),
        ("TCP/IP", "tcpip", False),  # some say "slash"
        ("O\u2019Neil", "o'neil", True),
        ("Toyota 東京", "toyota", False),
        ("hall 9000", "hall", False),
        ("\uff21\uff22\uff23", "abc", True),
        ("2024", "", False),
        ("東京", "", False),
        ("+++", "", False),
        ("'", "", False),
    ],
)
def test_what_of_a_keyword_is_scored(keyword: str, heard: str, whole: bool) -> None:
    # Then letters that have a label remain, of this case, accent and width or another; what is left out is known
    labels, is_whole = ctc_labels(keyword, 348)
    assert ("".join(map(ctc.label_character, labels)), is_whole) == (heard, whole)


def test_labels_beyond_the_head_are_not_scored() -> None:
    # Given a CTC head without katakana, as of the 3.3 models
    assert ctc_labels("トヨタ", 256) == ([], False)


def spelled(text: str) -> np.ndarray:
    """Greedy labels of a text, two frames a character and a blank after it."""
    return np.array([x for label in ctc.to_labels(text) for x in (label, label, 0)])


NOTHING = spelled("")


def heard_in(text: str, scores: dict[str, tuple[float, str]]) -> tuple:
    """Keywords and their support: of each its score and the part of the text where it was heard."""
    prepared = prepare([(word, None) for word in scores], KeywordOptions(), Tokenizer(make_tokenizer().to_str()), 348)
    columns = [prepared.scored.index(list(scores).index(word)) for word in scores]
    spans = [(3 * text.index(part), 3 * (text.index(part) + len(part)) - 1) for _, part in scores.values()]
    order = sorted(range(len(scores)), key=lambda i: -list(scores.values())[i][0])
    found = SpottingScores(
        np.array([[columns[i] for i in order]]),
        np.array([[list(scores.values())[i][0] for i in order]]),
        np.array([[spans[i][0] for i in order]]),
        np.array([[spans[i][1] for i in order]]),
    )  # pyright: ignore[reportArgumentType]
    return prepared, filter_matches(prepared, found, 0, spelled(text), -1.5)


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
    assert repair(spelled(text), heard, keywords) == "call timbado now"


@pytest.mark.parametrize(
    ("text", "keyword", "part", "expected"),
    [
        ("call dak fiki now", "dakfiki", "dak fiki", "call dakfiki now"),  # two words for one
        ("go to newyork now", "New York", "newyork", "go to new york now"),
        ("started", "art", "art", "started"),  # within a word
        ("call call", "Karl", "call", "karl call"),
        ("a  b", "b", "b", "a b"),
        ("close the hall now", "hall 9000", "hall", "close the hall now"),  # of which only a part was heard
        ("call c now", "C++", "c", "call c now"),
        (f"the {'ab' * 16} c", f"{'ab' * 16}d", "ab" * 16, f"the {'ab' * 16} c"),  # too long to be scored whole
    ],
)
def test_words_of_the_draft_give_way_to_the_keyword_heard_in_their_place(
    text: str, keyword: str, part: str, expected: str
) -> None:
    keywords, heard = heard_in(text, {keyword: (-0.1, part)})
    assert repair(spelled(text), heard, keywords) == expected


def test_keywords_that_cannot_be_scored_are_always_used() -> None:
    # Given a keyword that is heard, one that is not, and one without a letter that could be
    prepared = prepare(
        [("zelgad", None), ("timbado", None), ("2024", 3.0)],
        KeywordOptions(boost=6.0),
        Tokenizer(make_tokenizer().to_str()),
        348,
    )

    # When one is heard, at half the threshold
    heard = [KeywordMatch(0, -0.75, 0, 10)]

    # Then the automaton is that of the first, less boosted, and the last
    ways = prepared.phrases(0) + prepared.phrases(0, Place((), first=True))
    expected = [way._replace(boost=way.boost * 0.75) for way in ways] + list(prepared.phrases(2))
    automaton = utterance_automaton(prepared, heard, NOTHING, -1.5)
    for found, wanted in zip(automaton, build_automaton(expected), strict=True):
        assert set(np.atleast_1d(found).tolist()) == set(np.atleast_1d(wanted).tolist())
    assert utterance_automaton(prepared, [], NOTHING, -1.5) is prepared.always_automaton
    without = prepare([("zelgad", None)], KeywordOptions(), Tokenizer(make_tokenizer().to_str()), 348)
    assert utterance_automaton(without, [], NOTHING, -1.5) is None


def test_keywords_are_lifted_more_where_the_draft_has_them() -> None:
    # Given a keyword that is heard, and a draft that has it at its beginning and later
    tokenizer = Tokenizer(make_tokenizer().to_str())
    prepared = prepare([("kai", None)], KeywordOptions(boost=8.0), tokenizer, 348)
    trie = utterance_automaton(prepared, [KeywordMatch(0, 0.0, 0, 8)], spelled("kai asks where kai is"), -1.5)
    assert trie is not None

    # When a text is written
    automata = jax.tree.map(jnp.asarray, batch_automata([trie], [0]))

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
    prepared = prepare([("kai", None)], KeywordOptions(), tokenizer, 348)
    labels = spelled("wait forkai")
    found = utterance_automaton(prepared, [KeywordMatch(0, -0.5, 24, 32)], labels, -1.5)

    # Then the automaton is that of the words set apart
    apart = utterance_automaton(prepared, [KeywordMatch(0, -0.5, 27, 35)], spelled("wait for kai"), -1.5)
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
    prepared = prepare([("abcdefghijklmnopqrstuvwxyz" * 3, None)], KeywordOptions(), tokenizer, 348)
    others = ("".join(chr(97 + int(digit)) for digit in f"{i:030}") for i in range(2000))
    draft = spelled(" ".join(f"{other} {prepared.texts[0]}" for other in others))

    # Then as many of these are used as there are states for
    trie = utterance_automaton(prepared, [KeywordMatch(0, -0.5, 0, 9)], draft, -1.5)
    assert trie is not None and len(trie.failures) > 30_000
    batch_automata([trie], [0])


@pytest.mark.parametrize(("lower_case", "written"), [(True, {"kai"}), (False, {"Kai"}), (None, {"Kai", "kai"})])
def test_the_case_is_that_of_the_task(lower_case: bool | None, written: set[str]) -> None:
    # Then keywords are written in it, after a space, or without one where the text begins
    tokenizer = Tokenizer(make_tokenizer().to_str())
    ways = prepare([("Kai", None)], KeywordOptions(lower_case=lower_case), tokenizer, 348).phrases(0)
    assert {tokenizer.decode(way.tokens) for way in ways if way.anywhere} == {f" {text}" for text in written}
    assert {tokenizer.decode(way.tokens) for way in ways if not way.anywhere} == written


def test_scripts_without_spaces_need_none() -> None:
    ways = prepare([("\u6771\u4eac", None)], KeywordOptions(), Tokenizer(make_tokenizer().to_str()), 348).phrases(0)
    assert all(way.anywhere for way in ways)


def test_one_list_for_all_or_a_list_for_each() -> None:
    # Given one list, or none, then it is for all inputs
    for shared in (["Kai", ("Zoe", 2)], [], ("Kai",), {"Zoe": 2.0}):
        assert lists_by_input(shared, 2) is None
    # Given a list for each, then each has its own, without repetitions
    lists = lists_by_input([["Kai", "Kai"], None, [], {"Zoe": 2}], 4)
    assert lists == [("Kai", "Kai"), None, (), (("Zoe", 2),)]
    assert validated(["Kai", "Kai", ("Zoe", 2)], KeywordOptions(), 100) == (("Kai", None), ("Zoe", 2.0))
    assert validated(("  New\u3000 York ",), KeywordOptions(), 100) == (("New York", None),)


@pytest.mark.parametrize("line", ["Kai :2.0", "Kai Zoe : 1", "Kai,2", "Kai;3.5", "Kai = 4 "])
def test_boosts_in_other_forms_are_not_taken_for_words(tmp_path: Path, line: str) -> None:
    # Given a file as sherpa-onnx or a table has it, when it is read, then the error names a line and what helps
    (tmp_path / "k.txt").write_text(f"hall 9000\n{line}\n{line}\n")
    with pytest.raises(gj.GraniteError, match=r"k\.txt, line 2: '.*' seems to end in a boost: put a tab before boosts"):
        read_keywords(tmp_path / "k.txt")
    # And a few keywords that end so are keywords
    (tmp_path / "k.txt").write_text(f"December 7, 1941\nKai\nZoe\t2\n1,000\n\n{line}\nAda\n")
    assert len(read_keywords(tmp_path / "k.txt")) == 6


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
        lists_by_input(keywords, 2)
        validated(keywords, KeywordOptions(), 100)


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
        KeywordOptions.from_fields(*options, True)


def test_special_tokens_in_keywords_are_plain_text() -> None:
    # Given keywords that spell special tokens
    tokenizer = Tokenizer(make_tokenizer().to_str())
    prepared = prepare([("<|end_of_text|>", None), ("<|audio|>", None)], KeywordOptions(), tokenizer, 348)
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
