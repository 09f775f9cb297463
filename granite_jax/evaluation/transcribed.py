"""The utterances of a finished job with their references, from which scores and comparisons are computed."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from granite_jax import batch
from granite_jax.errors import GraniteError
from granite_jax.evaluation.datasets import EvaluationSet
from granite_jax.evaluation.metrics import Counts, count
from granite_jax.files import atomic

UTTERANCES = "utterances.jsonl"
_UNSCORED = "ignore time segment in scoring"  # Tedlium's reference for what is not to be scored


@dataclasses.dataclass(frozen=True)
class Transcribed:
    """One line of `utterances.jsonl`.

    Fields:
      id, reference, keywords: as in the set.
      hypothesis: the transcript; empty if there was an error.
      seconds: length of the audio; 0 if there was an error.
      error: the job's error, or None.
      flags: of the transcript.
    """

    id: str
    reference: str
    hypothesis: str
    seconds: float
    keywords: tuple[str, ...] | None
    error: str | None
    flags: tuple[str, ...] = ()

    def is_scored(self, normalize: Callable[[str], str]) -> bool:
        """Whether it counts."""
        return is_scored(self.reference, normalize)


def is_scored(reference: str, normalize: Callable[[str], str]) -> bool:
    """Whether a normalized reference has words to score; others are left out, as on the Open ASR leaderboard."""
    return " ".join(normalize(reference).split()) not in ("", _UNSCORED)


def collect(evaluation_set: EvaluationSet, directory: Path) -> list[Transcribed]:
    """Joins the set with the results of its finished job, and writes `utterances.jsonl` beside them.

    Raises:
      GraniteError: parts are missing or damaged, or belong to another set.
    """
    batch.merge(directory)
    results = {line["index"]: line for name in ("transcripts", "errors") for line in _read(directory / f"{name}.jsonl")}
    expected = len(evaluation_set.utterances)
    if len(results) != expected:
        raise GraniteError(f"set {evaluation_set.name}: has {expected} utterances, but {len(results)} were transcribed")
    utterances = [
        Transcribed(
            utterance.id,
            utterance.text,
            results[index].get("text", ""),
            results[index].get("duration", 0.0),
            utterance.keywords,
            results[index].get("error"),
            tuple(results[index].get("flags", ())),
        )
        for index, utterance in enumerate(evaluation_set.utterances)
    ]
    lines = [json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n" for line in utterances]
    atomic.replace(directory / UTTERANCES, "".join(lines))
    return utterances


def read(directory: Path) -> list[Transcribed]:
    """Reads `utterances.jsonl`. Raises GraniteError if it is missing or damaged."""
    path = directory / UTTERANCES
    try:
        return [_parse(line) for line in _read(path)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise GraniteError(f"{path}: is not the result of an evaluation ({error})") from None


def error_counts(lines: Sequence[Transcribed], normalize: Callable[[str], str]) -> dict[str, Counts]:
    """Counts for utterances that are all scored; keyword counts only if all have a list."""
    keywords = [line.keywords for line in lines if line.keywords is not None]
    return count(
        [line.reference for line in lines],
        [line.hypothesis for line in lines],
        keywords if len(keywords) == len(lines) else None,
        normalize,
    )


def _parse(fields: dict[str, Any]) -> Transcribed:
    keywords, flags = fields.pop("keywords"), fields.pop("flags", ())
    return Transcribed(keywords=None if keywords is None else tuple(keywords), flags=tuple(flags), **fields)


def _read(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
