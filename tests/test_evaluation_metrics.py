"""Error rates and scores against those counted by hand."""

from typing import Any

import numpy as np
import pytest

from granite_jax.evaluation.metrics import (
    GAP,
    Counts,
    Scores,
    align_words,
    difference,
    keyword_counts,
    rate,
    relative_difference,
    score,
    score_translations,
)
from granite_jax.evaluation.normalize import normalizer


def test_error_rates_are_those_counted_by_hand() -> None:
    # Given one misspelt name, one wrong word and one insertion
    references, hypotheses = ["call dakfiki now", "turn on the lamp"], ["call dagfigi now", "turn off the big lamp"]
    # When they are scored with the name as keyword, then words, characters, keywords and others have their rates
    found = score(references, hypotheses, [["Dakfiki"], []])
    assert found.wer.rate == pytest.approx(100 * 3 / 7)
    assert found.cer.rate == pytest.approx(100 * (2 + 2 + 4) / (16 + 16))  # k>g twice; n>ff; "big "
    assert found.b_wer is not None and found.b_wer.rate == 100.0
    assert found.u_wer is not None and found.u_wer.rate == pytest.approx(100 * 2 / 6)
    assert found.wer.low <= found.wer.rate <= found.wer.high
    # And without keywords there are no such rates, nor where no keyword is said
    assert score(references, hypotheses).b_wer is None
    assert score(references, hypotheses, [[], []]).b_wer is None


def test_references_without_words_have_no_rates() -> None:
    # Given references none of which has a word, when scored, then there is no rate; beside others, they count
    assert score(["", "[music]"], ["a", ""], [["a"], []]) == Scores()
    assert score(["", "red blue"], ["a", "red blue"]).wer.rate == 50.0


@pytest.mark.parametrize("apostrophe", ["\u2019", "\u2018", "\u02bc", "\uff07"])
@pytest.mark.parametrize("name", ["english", "basic", "lowercase"])
def test_typographic_apostrophes_are_apostrophes(apostrophe: str, name: Any) -> None:
    # Given a text with either apostrophe, and a keyword with one, when compared, then nothing is wrong
    references, hypotheses = [f"don{apostrophe}t go to o'hare"], [f"don't go to o{apostrophe}hare"]
    scores = score(references, hypotheses, [["o'hare"]], normalizer(name))
    assert scores.wer.rate == scores.b_wer.rate == 0.0


@pytest.mark.parametrize(
    ("reference", "hypothesis", "keywords", "biased", "unbiased"),
    [
        ("a key b", "a key b", {"key"}, (0, 1), (0, 2)),
        ("a key b", "a kay b", {"key"}, (1, 1), (0, 2)),  # a wrong keyword
        ("a key b", "a b", {"key"}, (1, 1), (0, 2)),  # a missing one
        ("a b", "a key b", {"key"}, (1, 0), (0, 2)),  # an inserted one counts as a keyword
        ("a key b", "a key x b", {"key"}, (0, 1), (1, 2)),  # another inserted word does not
        ("a x b", "a key b", {"key"}, (0, 0), (1, 3)),  # a word taken for a keyword is a wrong word
        # Deleting and inserting costs less than two substitutions, as in the lists' own script.
        ("turn key on", "turn on off", {"key"}, (1, 1), (1, 2)),
        ("key", "", {"key"}, (1, 1), (0, 0)),
    ],
)
def test_keyword_errors_are_those_of_the_lists_own_script(
    reference: str, hypothesis: str, keywords: set[str], biased: tuple[int, int], unbiased: tuple[int, int]
) -> None:
    found = keyword_counts([reference], [hypothesis], [keywords])
    assert [(int(c.errors[0]), int(c.total[0])) for c in found] == [biased, unbiased]


def test_words_are_aligned_in_order() -> None:
    # Given a wrong, an inserted and a missing word, when aligned, then each has its counterpart or a gap
    pairs = align_words("turn off the lamp please", "turn on the big lamp")
    assert pairs == [("turn", "turn"), ("off", "on"), ("the", "the"), (GAP, "big"), ("lamp", "lamp"), ("please", GAP)]


def test_the_average_weighs_sets_alike_and_the_difference_pairs_utterances() -> None:
    # Given a set of a hundred utterances with 10 % errors and a small one with 50 %
    rng = np.random.default_rng(1)
    large = Counts(rng.permutation([0] * 50 + [2] * 50), np.full(100, 10))
    small = Counts(np.array([5, 5]), np.array([10, 10]))
    # When averaged, then each counts a half
    assert rate([large, small]).rate == pytest.approx(30.0)
    assert rate([large]).low < 10.0 < rate([large]).high
    # And a run that makes one error more in every utterance is 10 points worse, whatever utterances there are
    worse = Counts(large.errors + 1, large.total)
    found = difference([large], [worse])
    assert (found.rate, found.low, found.high) == pytest.approx((10.0, 10.0, 10.0))
    assert difference([large], [large]).rate == difference([large], [large]).high == 0.0


def test_the_relative_difference_is_a_share_of_the_first_rate() -> None:
    # Given a run with 10 % errors, and one that makes half of its errors in every utterance
    before = Counts(np.array([2, 0, 4, 2] * 25), np.full(100, 20))
    after = Counts(before.errors // 2, before.total)
    # When they are compared, then the second has half as many errors, whatever utterances there are
    found = relative_difference([before], [after])
    assert (found.rate, found.low, found.high) == pytest.approx((-50.0, -50.0, -50.0))
    # And where errors are spread otherwise, the interval is that of the ratio of both rates
    spread = relative_difference([before], [Counts(before.errors[::-1], before.total)])
    assert spread.rate == 0.0 and spread.low < 0.0 < spread.high


def test_normalizers_do_what_the_leaderboard_does() -> None:
    # Given texts with contractions, numbers, hesitations and marks, then the normalizers unify them
    assert normalizer("english")("Um, it's $20 -- color!").split() == ["it", "is", "$20", "color"]
    assert normalizer("english")("twenty dollars").split() == ["$20"]
    assert normalizer("basic", "fr")("C'était [rires] l'été.").split() == ["c", "était", "l", "été"]
    assert normalizer("basic", "ja")("東京。").split() == ["東", "京"]
    assert normalizer("lowercase")("It's A-B!") == "it's a-b!"


def test_translations_are_scored_by_sacrebleu() -> None:
    # Given translations that are perfect, good and wrong
    references = ["Das ist ein kleines Haus am See .", "Guten Morgen , wie geht es dir heute ?"] * 10
    good = [text.replace("kleines", "kleineres") for text in references]
    wrong = ["nichts von alledem stimmt hier"] * 20
    # When they are compared, then the first is perfect, and the others are worse, beyond chance
    found = score_translations(references, references, good, wrong, language="de")
    perfect, near, far = found["bleu"]
    assert (perfect.score.rate, perfect.p_value) == (pytest.approx(100.0), None)
    assert near.score.low < near.score.rate < near.score.high < 100.0
    assert far.score.rate < 1.0 and far.p_value is not None and far.p_value < 0.01
    assert "tok:13a" in perfect.signature and "nc:6" in found["chrf"][0].signature
    assert "tok:zh" in score_translations(["你好"], ["你好"], language="zh")["bleu"][0].signature
