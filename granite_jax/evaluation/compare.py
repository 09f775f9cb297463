"""Two finished runs on the same utterances: how much better is one, and is that more than chance?"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from granite_jax.errors import GraniteError
from granite_jax.evaluation import transcribed
from granite_jax.evaluation.metrics import Counts, difference, rate, score_translations
from granite_jax.evaluation.normalize import normalizer


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, Any]:
    """Compares the runs of two directories, utterance by utterance.

    Returns:
      `a`, `b`, and `sets`: for every set and metric the scores of both and, for error rates, their `difference` (b's
      less a's, with the interval of a paired bootstrap), for BLEU and chrF the `p_value` of sacrebleu's paired
      bootstrap test; `average`, of the sets' error rates.

    Raises:
      GraniteError: a directory is not that of a finished run, or the runs are of other sets, references or normalizers.
    """
    first, second = _results(Path(a)), _results(Path(b))
    for key, value in first["scoring"].items():
        if second["scoring"].get(key) != value:
            raise GraniteError(f"the runs differ in {key}: {value} in {a}, {second['scoring'].get(key)} in {b}")
    names, others = ([each["name"] for each in run["sets"]] for run in (first, second))
    if names != others:
        raise GraniteError(f"the runs are on other sets: {', '.join(names)} in {a}, {', '.join(others)} in {b}")
    language, translation = first["scoring"]["language"], first["scoring"]["translation"]
    normalize = normalizer(first["scoring"]["normalizer"], language)
    sets, counted = [], []
    for ours, theirs in zip(first["sets"], second["sets"], strict=True):
        lines = [transcribed.read(Path(out) / each["directory"]) for out, each in ((a, ours), (b, theirs))]
        if [(line.id, line.reference, line.keywords) for line in lines[0]] != [
            (line.id, line.reference, line.keywords) for line in lines[1]
        ]:
            raise GraniteError(f"set {ours['name']}: the runs have other utterances, references or keywords")
        scored = [[line for line in some if line.is_scored(normalize)] for some in lines]
        found: dict[str, Any] = {"name": ours["name"], "scored": len(scored[0])}
        if translation:
            references = [line.reference for line in scored[0]]
            texts = [[line.hypothesis for line in some] for some in scored]
            for name, (one, other) in score_translations(references, *texts, language=language).items():
                found[name] = {
                    "a": dataclasses.asdict(one.score),
                    "b": dataclasses.asdict(other.score),
                    "p_value": other.p_value,
                }
        else:
            counts = [transcribed.error_counts(some, normalize) for some in scored]
            counted.append(counts)
            found |= {name: _compare([counts[0][name]], [counts[1][name]]) for name in counts[0]}
        sets.append(found)
    names = [name for name in counted[0][0] if all(name in counts for counts, _ in counted)] if counted else []
    average = {name: _compare(*([counts[run][name] for counts in counted] for run in (0, 1))) for name in names}
    return {"a": os.fspath(a), "b": os.fspath(b), "sets": sets, "average": average}


def _compare(a: list[Counts], b: list[Counts]) -> dict[str, Any]:
    return {
        "a": dataclasses.asdict(rate(a)),
        "b": dataclasses.asdict(rate(b)),
        "difference": dataclasses.asdict(difference(a, b)),
    }


def _results(directory: Path) -> dict[str, Any]:
    path = directory / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not results["sets"] or not results["scoring"]["normalizer"]:
            raise ValueError("it is empty")
    except FileNotFoundError:
        raise GraniteError(f"{path}: is missing: the evaluation has not been finished") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise GraniteError(f"{path}: is not the result of an evaluation ({error})") from None
    return results
