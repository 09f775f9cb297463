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
      `a` and `b`; `sets`: for every set and metric the scores of both runs and, for error rates, their `difference` (b
      minus a, with a paired bootstrap interval), for BLEU and chrF the `p_value` of sacrebleu's paired bootstrap test;
      `average`: the same for the means of the sets' error rates.

    Raises:
      GraniteError: a directory holds no finished run, or the runs differ in sets, utterances, references or scoring.
    """
    results_a, results_b = _results(Path(a)), _results(Path(b))
    for key, value in results_a["scoring"].items():
        if results_b["scoring"].get(key) != value:
            raise GraniteError(f"the runs differ in {key}: {value} in {a}, {results_b['scoring'].get(key)} in {b}")
    names, other_names = ([entry["name"] for entry in run["sets"]] for run in (results_a, results_b))
    if names != other_names:
        raise GraniteError(f"the runs are on other sets: {', '.join(names)} in {a}, {', '.join(other_names)} in {b}")
    language, translation = results_a["scoring"]["language"], results_a["scoring"]["translation"]
    normalize = normalizer(results_a["scoring"]["normalizer"], language)
    sets, counted = [], []
    for entry_a, entry_b in zip(results_a["sets"], results_b["sets"], strict=True):
        lines = [transcribed.read(Path(out) / entry["directory"]) for out, entry in ((a, entry_a), (b, entry_b))]
        if [(line.id, line.reference, line.keywords) for line in lines[0]] != [
            (line.id, line.reference, line.keywords) for line in lines[1]
        ]:
            raise GraniteError(f"set {entry_a['name']}: the runs have other utterances, references or keywords")
        scored = [[line for line in run_lines if line.is_scored(normalize)] for run_lines in lines]
        comparison: dict[str, Any] = {"name": entry_a["name"], "scored": len(scored[0])}
        if translation:
            references = [line.reference for line in scored[0]]
            texts = [[line.hypothesis for line in run_lines] for run_lines in scored]
            for name, (score_a, score_b) in score_translations(references, *texts, language=language).items():
                comparison[name] = {
                    "a": dataclasses.asdict(score_a.score),
                    "b": dataclasses.asdict(score_b.score),
                    "p_value": score_b.p_value,
                }
        else:
            counts = [transcribed.error_counts(run_lines, normalize) for run_lines in scored]
            counted.append(counts)
            comparison |= {name: _compare([counts[0][name]], [counts[1][name]]) for name in counts[0]}
        sets.append(comparison)
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
