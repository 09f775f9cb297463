"""Error rates of transcripts and scores of translations, with 95 % bootstrap intervals over utterances.

Words are aligned by jiwer; for words of keyword lists by kaldialign with sclite's costs, as the LibriSpeech biasing
lists' own script does (arXiv 2104.02194; facebookresearch/fbai-speech, is21_deep_bias/score.py).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jiwer
import kaldialign
import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from granite_jax.errors import GraniteError, one_line
from granite_jax.evaluation.normalize import normalizer

RESAMPLES = 2_000
_CHUNK = 1 << 22  # utterances that are drawn at a time
_TOKENIZERS = {"ja": "ja-mecab", "zh": "zh"}
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\uff07"), "'")
GAP = ""  # the counterpart of a word that has none: no word is empty


@dataclasses.dataclass(frozen=True)
class Rate:
    """A percentage and its 95 % interval: errors per hundred reference words or characters, or BLEU or chrF."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.2f} % ({self.low:.2f} to {self.high:.2f})"


class Counts(NamedTuple):
    """Errors, and words or characters of the reference, by utterance: int64 `[n]`."""

    errors: np.ndarray
    total: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
    """Error rates.

    Fields:
      wer, cer: word and character error rate.
      b_wer, u_wer: error rates of the words in the utterance's keyword list, and of all others. An inserted word counts
        toward the group that it belongs to.

    A rate is None if the references have no such words.
    """

    wer: Rate | None = None
    cer: Rate | None = None
    b_wer: Rate | None = None
    u_wer: Rate | None = None


def score(
    references: Sequence[str],
    hypotheses: Sequence[str],
    keywords: Sequence[Iterable[str]] | None = None,
    normalize: Callable[[str], str] | None = None,
) -> Scores:
    """Compares hypotheses with references, neither of which is normalized yet.

    Args:
      references: texts; those without words when normalized have only insertions.
      keywords: for each utterance, the words or multi-word names that B-WER counts.
      normalize: default Whisper's English normalizer.
    """
    by_metric = count(references, hypotheses, keywords, normalize)
    return Scores(**{metric: rate([counts]) for metric, counts in by_metric.items()})


def count(
    references: Sequence[str],
    hypotheses: Sequence[str],
    keywords: Sequence[Iterable[str]] | None = None,
    normalize: Callable[[str], str] | None = None,
) -> dict[str, Counts]:
    """Counts of `wer`, `cer` and, with keywords, `b_wer` and `u_wer`; a metric without reference words is left out."""
    normalize = _with_plain_apostrophes(normalize or normalizer("english"))
    references, hypotheses = (
        [" ".join(normalize(text).split()) for text in texts] for texts in (references, hypotheses)
    )
    by_metric = {
        "wer": _count(jiwer.process_words(references, hypotheses)),
        "cer": _count(jiwer.process_characters(references, hypotheses)),
    }
    if keywords is not None:
        words = [{word for keyword in listed for word in normalize(keyword).split()} for listed in keywords]
        by_metric["b_wer"], by_metric["u_wer"] = keyword_counts(references, hypotheses, words)
    return {metric: counts for metric, counts in by_metric.items() if counts.total.any()}


def _with_plain_apostrophes(normalize: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: normalize(text.translate(_APOSTROPHES))


def _count(output: jiwer.WordOutput | jiwer.CharacterOutput) -> Counts:
    errors = [
        sum(
            max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            for chunk in alignment
            if chunk.type != "equal"
        )
        for alignment in output.alignments
    ]
    return Counts(np.array(errors), np.array([len(reference) for reference in output.references]))


def keyword_counts(
    references: Sequence[str], hypotheses: Sequence[str], keywords: Sequence[set[str]]
) -> tuple[Counts, Counts]:
    """Counts of the words that are in the utterance's set, and of all others, in normalized texts.

    A wrong or missing word is grouped by the reference's word, an inserted one by itself.
    """
    columns = np.zeros((len(references), 2, 2), np.int64)  # utterance; keyword or not; errors, words
    for row, reference, hypothesis, listed in zip(columns, references, hypotheses, keywords, strict=True):
        for reference_word, hypothesis_word in align_words(reference, hypothesis):
            group = row[0 if (reference_word or hypothesis_word) in listed else 1]
            group += reference_word != hypothesis_word, reference_word != GAP
    return Counts(columns[:, 0, 0], columns[:, 0, 1]), Counts(columns[:, 1, 0], columns[:, 1, 1])


def align_words(reference: str, hypothesis: str) -> list[tuple[str, str]]:
    """Aligns normalized texts: pairs of a reference word and a hypothesis word, in order.

    Missing and inserted words are paired with `GAP`.
    """
    # Aligned backwards: of alignments with equal cost, this chooses the one of the lists' script, with few exceptions.
    reference_words, hypothesis_words = reference.split()[::-1], hypothesis.split()[::-1]
    return kaldialign.align(reference_words, hypothesis_words, GAP, sclite_mode=True)[::-1]


def rate(sets: Sequence[Counts]) -> Rate:
    """The rate of a set, or the unweighted mean of several sets' rates."""
    return _mean([(counts.errors, counts.total) for counts in sets])


def difference(a: Sequence[Counts], b: Sequence[Counts]) -> Rate:
    """b's rate minus a's on the same utterances, which are resampled together."""
    return _mean([(counts_b.errors - counts_a.errors, counts_a.total) for counts_a, counts_b in zip(a, b, strict=True)])


def relative_difference(a: Sequence[Counts], b: Sequence[Counts]) -> Rate:
    """b's rate minus a's in percent of a's, on the same utterances, which are resampled together."""
    return _mean(
        [(counts_b.errors - counts_a.errors, counts_a.errors) for counts_a, counts_b in zip(a, b, strict=True)]
    )


def _mean(sets: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rate:
    """The mean of the sets' ratios, in percent; the sets are resampled independently."""
    ratios = [100.0 * top.sum() / bottom.sum() for top, bottom in sets]
    resampled = [_resampled(top, bottom, seed) for seed, (top, bottom) in enumerate(sets)]
    low, high = np.nanpercentile(np.mean(resampled, axis=0), [2.5, 97.5])
    return Rate(float(np.mean(ratios)), float(low), float(high))


def _resampled(top: np.ndarray, bottom: np.ndarray, seed: int) -> np.ndarray:
    """Ratios of resampled utterances, in percent: `[RESAMPLES]`; NaN where none of them has a word."""
    rng, size, ratios = np.random.default_rng(seed), len(top), np.full(RESAMPLES, np.nan)
    rows = max(1, _CHUNK // size)
    for start in range(0, RESAMPLES, rows):
        picks = rng.integers(size, size=(min(rows, RESAMPLES - start), size))
        words = bottom[picks].sum(1)
        np.divide(100.0 * top[picks].sum(1), words, out=ratios[start : start + rows], where=words > 0)
    return ratios


@dataclasses.dataclass(frozen=True)
class TranslationScore:
    """BLEU or chrF.

    Fields:
      score: the corpus score with sacrebleu's bootstrap interval.
      p_value: result of the paired bootstrap test against the first system; None for the first system.
      signature: sacrebleu's description of how the score was computed.
    """

    score: Rate
    p_value: float | None
    signature: str


def score_translations(
    references: Sequence[str], *systems: Sequence[str], language: str = "en"
) -> dict[str, list[TranslationScore]]:
    """`bleu` and `chrf` of the translations of one system, or of several in comparison with the first (sacrebleu).

    Args:
      references, systems: raw texts, neither normalized nor tokenized.
      language: code of the references' language, which selects BLEU's tokenizer.

    Raises:
      GraniteError: the language's tokenizer is not installed.
    """
    try:
        metrics: dict[str, Any] = {"BLEU": BLEU(tokenize=_TOKENIZERS.get(language, "13a")), "chrF2": CHRF()}
    except RuntimeError as error:
        raise GraniteError(
            f"BLEU for {language} needs pip install 'sacrebleu[{language}]' ({one_line(error)})"
        ) from None
    named: list[tuple[str, Sequence[str]]] = [(str(position), texts) for position, texts in enumerate(systems)]
    signatures, results = PairedTest(named, metrics, [references], test_type="bs")()
    scores: dict[str, list[TranslationScore]] = {}
    for key, name in (("bleu", "BLEU"), ("chrf", "chrF2")):
        system_results: list[Any] = results[name]
        scores[key] = [
            TranslationScore(_interval(result), result.p_value, str(signatures[name])) for result in system_results
        ]
    return scores


def _interval(result: Any) -> Rate:
    return Rate(
        float(result.score), max(0.0, float(result.mean - result.ci)), min(100.0, float(result.mean + result.ci))
    )
