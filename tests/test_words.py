"""Words of a text, their labels and their times."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_jax.recognition.words import TextWord, label_sequence, locate_words, split_words, word_times
from granite_jax.results import Word


def spelled(word: TextWord) -> str:
    """The labels as characters, `*` for wildcards."""
    return "".join("*" if x < 0 else chr(x) if x < 256 else chr(x - 256 + 0x30A1) for x in word.labels)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", {}),
        (" \n", {}),
        ("It's 25 euros.", {"It's": "it's", "25": "*", "euros.": "euros"}),
        ("'hello' dogs'", {"'hello'": "hello", "dogs'": "dogs"}),
        ("1,000.50 covid19 $5 9% a&b", {"1,000.50": "*", "covid19": "covid*", "$5": "*", "9%": "*", "a&b": "a*b"}),
        ("twenty-five 10-20 -x-", {"twenty-five": "twenty five", "10-20": "* *", "-x-": "x"}),
        # Punctuation alone belongs to the word before it, or after it.
        ("… hello - world !", {"… hello -": "hello", "world !": "world"}),
        ("Ça va ? « Oui », d\u2019être", {"Ça": "ça", "va ?": "va", "« Oui »,": "oui", "d\u2019être": "d'être"}),
        ("wait (", {"wait (": "wait"}),
        ("...", {"...": "*"}),
        ("Straße ÜBER e\u0301te\u0301", {"Straße": "straße", "ÜBER": "über", "e\u0301te\u0301": "été"}),
        # Characters whose lower case is several; letters without a label.
        ("İstanbul Łódź cœur", {"İstanbul": "istanbul", "Łódź": "*ódz", "cœur": "c*ur"}),
        ("今日は「コーヒー」です。ok", {"今": "*", "日": "*", "は": "ハ", "「コ": "コ", "ー": "ー", "ヒ": "ヒ",
         "ー」": "ー", "で": "デ", "す。": "ス", "ok": "ok"}),
        ("ｶﾞ \uff21\uff22", {"ｶﾞ": "ガ", "\uff21\uff22": "ab"}),
        ("مَرحبا بالعالم!", {"مَرحبا": "*", "بالعالم!": "*"}),
        ("ok 😀👍🏽 👩‍👩‍👧", {"ok": "ok", "😀👍🏽": "*", "👩‍👩‍👧": "*"}),
    ],
)  # fmt: skip
def test_words_of_a_text(text: str, words: dict[str, str]) -> None:
    found = split_words(text)
    assert [(word.text, spelled(word)) for word in found] == list(words.items())


@pytest.mark.fuzz
@given(st.text(max_size=12) | st.text("aB1 .,'-(«今はカ。\n"))
def test_every_character_belongs_to_a_word(text: str) -> None:
    words = split_words(text)
    covered = [position for word in words for position in range(word.start, word.end)]
    assert covered == sorted(set(covered))
    assert {i for i, c in enumerate(text) if not c.isspace()} <= set(covered)
    assert all(word.text == text[word.start : word.end] and word.labels for word in words)
    # And the sequence has each word's labels, and spaces between words where the text has them
    labels, spans = label_sequence(words)
    assert [tuple(labels[first:last]) for first, last in spans] == [word.labels for word in words]
    gaps = sum(a.end < b.start for a, b in itertools.pairwise(words))
    assert len(labels) == sum(len(word.labels) for word in words) + gaps


def frames(heard: str) -> np.ndarray:
    """CTC logits that are sure of these characters, `_` for the blank."""
    return 20.0 * np.eye(348, dtype=np.float32)[[0 if c == "_" else ord(c) for c in heard]]


def rounded(words: tuple[Word, ...]) -> list[tuple[str, float, float]]:
    return [(word.text, round(word.start, 4), round(word.end, 4)) for word in words]


def test_words_have_times() -> None:
    # Given frames that say "ab c" with pauses, when aligned
    words = locate_words(frames("__a_b______ ____c_____"), "Ab  C.")
    # Then words begin at their first label's frame, and end half a letter after the last
    assert rounded(words) == [("Ab", 0.04, 0.12), ("C.", 0.32, 0.36)]
    assert [word.confidence for word in words] == [pytest.approx(1.0, abs=1e-3)] * 2
    # And offsets and a start are added, within the audio's limits
    moved = locate_words(frames("__a_b______ ____c_____"), "Ab  C.", start=10.0, offsets=(-0.06, 0.1))
    assert rounded(moved) == [("Ab", 10.0, 10.22), ("C.", 10.26, 10.44)]


def test_a_number_takes_the_time_of_its_words() -> None:
    # Given "twenty five" in digits
    words = locate_words(frames("it_ i_s _t_w_e_n_t_y_ _f_i_v_e_ _eu"), "it is 25 eu")
    # Then it is where these are spoken, and its confidence is not known
    assert [word.text for word in words] == ["it", "is", "25", "eu"]
    assert 0.16 <= words[2].start <= 0.2
    assert 0.58 <= words[2].end <= 0.64
    assert words[2].confidence is None


def test_characters_without_labels_share_their_time() -> None:
    # Given three characters that the head does not know, spoken in six frames
    words = locate_words(frames("__abcdef__"), "東京都")
    assert rounded(words) == [("東", 0.04, 0.08), ("京", 0.08, 0.12), ("都", 0.12, 0.16)]


def test_a_text_that_cannot_be_aligned_is_spread() -> None:
    words = locate_words(frames("ab"), "many words here", duration=0.3, start=1.0)
    assert rounded(words) == [("many", 1.0, 1.1), ("words", 1.1, 1.2), ("here", 1.2, 1.3)]
    assert [word.confidence for word in words] == [0.0] * 3
    assert locate_words(frames("ab"), "") == ()


@pytest.mark.fuzz
@given(
    st.text("ab 1今é.", max_size=30),
    st.lists(st.sampled_from([0, 0, 0, 1, 1, 2, 2, 2]), max_size=60),
    st.sampled_from([0.0, 0.013, 0.5, 1.3]),
    st.tuples(*[st.floats(-0.5, 0.5)] * 2),
)
def test_times_ascend_and_do_not_overlap(
    text: str, moves: list[int], seconds: float, offsets: tuple[float, float]
) -> None:
    # Given any path through the labels, that of a damaged alignment too, and any offsets
    words = split_words(text)
    last = 2 * len(label_sequence(words)[0])
    states = np.minimum(np.cumsum(np.array(moves, np.int32)), last).astype(np.int32)
    if len(states) < last / 2:
        states[:] = -1
    # When words get times
    timed = word_times(words, states, np.full(len(states), -0.5, np.float32), duration=seconds, offsets=offsets)
    # Then they are in order, apart, not empty, and within the audio
    assert [word.text for word in timed] == [word.text for word in words]
    limits = [x for word in timed for x in (word.start, word.end)]
    assert limits == sorted(limits)
    assert all(word.end > word.start for word in timed)
    assert all(a.start < b.start for a, b in itertools.pairwise(timed))
    if timed:
        assert limits[0] >= 0.0
        assert limits[-1] <= max(seconds, 0.02) + 1e-9
        least = min(0.02, max(seconds, 0.02) / len(timed))
        assert all(word.end - word.start >= least * 0.999 for word in timed)
