"""Word error rates of a checkpoint on synthesised speech, with bootstrap confidence intervals.

References and hypotheses pass Whisper's English normaliser (as on the Open ASR leaderboard) before words are aligned
(jiwer). Invented names and all other words are also counted apart; an inserted word counts as an other word.
"""

import dataclasses
from collections.abc import Sequence

import jiwer
import numpy as np
from whisper_normalizer.english import EnglishTextNormalizer

_RESAMPLES = 2_000


@dataclasses.dataclass(frozen=True)
class ErrorRate:
    """Errors a hundred reference words, and the 95 % bootstrap interval over utterances."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.2f} % ({self.low:.2f} to {self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Error rates of all words, of invented names, and of the other words."""

    all_words: ErrorRate
    names: ErrorRate
    other_words: ErrorRate


def evaluate(references: Sequence[str], hypotheses: Sequence[str], names: Sequence[Sequence[str]]) -> Evaluation:
    """Compares hypotheses with references; `names` holds the invented names of each reference."""
    normalise = EnglishTextNormalizer()
    counts = np.array(
        [
            _count(normalise(reference), normalise(hypothesis), {normalise(name) for name in spoken})
            for reference, hypothesis, spoken in zip(references, hypotheses, names, strict=True)
        ]
    )
    # Columns: name errors, name words, other errors, other words.
    columns = {"all_words": ([0, 2], [1, 3]), "names": ([0], [1]), "other_words": ([2], [3])}
    return Evaluation(**{key: _rate(counts[:, e].sum(1), counts[:, n].sum(1)) for key, (e, n) in columns.items()})


def _count(reference: str, hypothesis: str, names: set[str]) -> tuple[int, int, int, int]:
    aligned = jiwer.process_words(reference, hypothesis)
    words = aligned.references[0]
    wrong = np.zeros(len(words), bool)
    insertions = 0
    for chunk in aligned.alignments[0]:
        if chunk.type == "insert":
            insertions += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            wrong[chunk.ref_start_idx : chunk.ref_end_idx] = True
    is_name = np.array([word in names for word in words], bool)
    return int(wrong[is_name].sum()), int(is_name.sum()), int(wrong[~is_name].sum()) + insertions, int((~is_name).sum())


def _rate(errors: np.ndarray, words: np.ndarray) -> ErrorRate:
    rng = np.random.default_rng(0)
    picks = rng.integers(len(errors), size=(_RESAMPLES, len(errors)))
    rates = 100.0 * errors[picks].sum(1) / np.maximum(words[picks].sum(1), 1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return ErrorRate(100.0 * errors.sum() / max(words.sum(), 1), float(low), float(high))
