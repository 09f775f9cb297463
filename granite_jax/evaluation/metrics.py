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

from granite_jax.audio.resample import one_line
from granite_jax.errors import GraniteError
from granite_jax.evaluation.normalize import normalizer

RESAMPLES = 2_000
_CHUNK = 1 << 22  # utterances that are drawn at a time
_TOKENIZERS = {"ja": "ja-mecab", "zh": "zh"}
GAP = ""  # stands where a word has no counterpart: no word is empty


@dataclasses.dataclass(frozen=True)
class Rate:
    """A percentage and its 95 % interval: errors of a hundred reference words or characters, or BLEU or chrF."""

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
      wer, cer: of words, of characters.
      b_wer, u_wer: of the words that are in the utterance's keyword list, and of all others; None without lists. An
        inserted word counts where it belongs.
    """

    wer: Rate
    cer: Rate
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
      references: with words left in them when normalized.
      keywords: of each utterance: those of its words, or else names of several words, that B-WER is about.
      normalize: default Whisper's English normalizer.
    """
    counts = count(references, hypotheses, keywords, normalize)
    return Scores(**{name: rate([each]) for name, each in counts.items()})


def count(
    references: Sequence[str],
    hypotheses: Sequence[str],
    keywords: Sequence[Iterable[str]] | None = None,
    normalize: Callable[[str], str] | None = None,
) -> dict[str, Counts]:
    """What `score` is made of: `wer`, `cer`, and with keywords `b_wer`, `u_wer`, where there is a word of the kind."""
    normalize = normalize or normalizer("english")
    said, heard = ([" ".join(normalize(text).split()) for text in texts] for texts in (references, hypotheses))
    counts = {"wer": _count(jiwer.process_words(said, heard)), "cer": _count(jiwer.process_characters(said, heard))}
    if keywords is not None:
        words = [{word for keyword in listed for word in normalize(keyword).split()} for listed in keywords]
        counts["b_wer"], counts["u_wer"] = keyword_counts(said, heard, words)
    return {name: each for name, each in counts.items() if each.total.any()}


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
    """Counts of the words that are in the utterance's set, and of the others, of texts that are normalized.

    A wrong or missing word counts by the reference's word, an inserted one by itself.
    """
    columns = np.zeros((len(references), 2, 2), np.int64)  # utterance; keyword or not; errors, words
    for row, reference, hypothesis, listed in zip(columns, references, hypotheses, keywords, strict=True):
        for said, heard in align_words(reference, hypothesis):
            group = row[0 if (said or heard) in listed else 1]
            group += said != heard, said != GAP
    return Counts(columns[:, 0, 0], columns[:, 0, 1]), Counts(columns[:, 1, 0], columns[:, 1, 1])


def align_words(reference: str, hypothesis: str) -> list[tuple[str, str]]:
    """Pairs of a reference's word and the hypothesis's word in its place, in order, of texts that are normalized.

    A missing word is paired with `GAP`, and so is an inserted one.
    """
    # Backwards, so that alignments of equal cost are, but for few, chosen as by the lists' script.
    said_words, heard_words = reference.split()[::-1], hypothesis.split()[::-1]
    return kaldialign.align(said_words, heard_words, GAP, sclite_mode=True)[::-1]


def rate(sets: Sequence[Counts]) -> Rate:
    """The rate of a set, or the mean of several sets' rates, each of which weighs the same."""
    return _mean([(counts.errors, counts.total) for counts in sets])


def difference(a: Sequence[Counts], b: Sequence[Counts]) -> Rate:
    """How much higher b's rate is than a's, of the same utterances: both are resampled together."""
    return _mean([(theirs.errors - ours.errors, ours.total) for ours, theirs in zip(a, b, strict=True)])


def relative_difference(a: Sequence[Counts], b: Sequence[Counts]) -> Rate:
    """How much higher b's rate is than a's, in percent of a's, of the same utterances: both are resampled together."""
    return _mean([(theirs.errors - ours.errors, ours.errors) for ours, theirs in zip(a, b, strict=True)])


def _mean(sets: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rate:
    """Of the sets' ratios, in percent; the sets are resampled independently."""
    ratios = [100.0 * top.sum() / bottom.sum() for top, bottom in sets]
    resampled = [_resampled(top, bottom, seed) for seed, (top, bottom) in enumerate(sets)]
    low, high = np.nanpercentile(np.mean(resampled, axis=0), [2.5, 97.5])
    return Rate(float(np.mean(ratios)), float(low), float(high))


def _resampled(top: np.ndarray, bottom: np.ndarray, seed: int) -> np.ndarray:
    """Ratios of resampled utterances, in percent: `[RESAMPLES]`; not a number where none of them has a word."""
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
      score: of the corpus, and sacrebleu's bootstrap interval.
      p_value: of the paired bootstrap test against the first system; None for that one.
      signature: sacrebleu's, which says how it was computed.
    """

    score: Rate
    p_value: float | None
    signature: str


def score_translations(
    references: Sequence[str], *systems: Sequence[str], language: str = "en"
) -> dict[str, list[TranslationScore]]:
    """`bleu` and `chrf` of the translations of one system, or of several in comparison with the first (sacrebleu).

    Args:
      references, systems: as they are, neither normalized nor tokenized.
      language: that of the references, as a code, which decides on BLEU's tokenizer.

    Raises:
      GraniteError: the language's tokenizer is not installed.
    """
    try:
        metrics: dict[str, Any] = {"BLEU": BLEU(tokenize=_TOKENIZERS.get(language, "13a")), "chrF2": CHRF()}
    except RuntimeError as error:
        raise GraniteError(
            f"BLEU for {language} needs pip install 'sacrebleu[{language}]' ({one_line(error)})"
        ) from None
    named: list[tuple[str, Sequence[str]]] = [(str(place), texts) for place, texts in enumerate(systems)]
    signatures, results = PairedTest(named, metrics, [references], test_type="bs")()
    found: dict[str, list[TranslationScore]] = {}
    for key, name in (("bleu", "BLEU"), ("chrf", "chrF2")):
        scores: list[Any] = results[name]
        found[key] = [TranslationScore(_interval(each), each.p_value, str(signatures[name])) for each in scores]
    return found


def _interval(found: Any) -> Rate:
    return Rate(float(found.score), max(0.0, float(found.mean - found.ci)), min(100.0, float(found.mean + found.ci)))
