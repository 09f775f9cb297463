"""Results as Markdown: the Open ASR leaderboard's table, a table with a row for each set, and where the time went."""

from collections.abc import Iterable, Sequence
from typing import Any

from granite_jax.evaluation.metrics import RESAMPLES

_TITLES = {"wer": "WER", "cer": "CER", "b_wer": "B-WER", "u_wer": "U-WER", "bleu": "BLEU", "chrf": "chrF"}


def to_markdown(results: dict[str, Any]) -> str:
    """Tables of what `evaluate` returns."""
    sets = results["sets"]
    main = "wer" if "wer" in sets[0] else "bleu"
    average = [f"Average {_TITLES[main]}"] if main in results["average"] else []
    leaderboard = _table(
        ["model", *average, "RTFx", *(entry["name"] for entry in sets)],
        [
            [
                results["model"],
                *(_interval(results["average"][main], main) for _ in average),
                _number(results["rtfx"]),
                *(_interval(entry[main], main) for entry in sets),
            ]
        ],
    )
    metrics = [name for name in _TITLES if any(name in entry for entry in sets)]
    details = _table(
        ["set", "utterances", "scored", "failed", "hours", *(_TITLES[name] for name in metrics), "RTFx"],
        [
            [
                entry["name"],
                *(str(entry[key]) for key in ("utterances", "scored", "failed")),
                f"{entry['hours']:.2f}",
                *(_interval(entry.get(name), name) for name in metrics),
                _number(entry["rtfx"]),
            ]
            for entry in sets
        ],
    )
    return "\n".join([*leaderboard, "", *details, "", *_notes(results)]) + "\n"


def _notes(results: dict[str, Any]) -> list[str]:
    seconds, scoring, packages = results["seconds"], results["scoring"], results["packages"]
    if scoring["translation"]:
        method = "; ".join(f"{_TITLES[name]} {text}" for name, text in results["sets"][0]["signatures"].items())
    else:
        method = f'normalizer "{scoring["normalizer"]}" (whisper-normalizer {packages["whisper-normalizer"]})'
        method += f", jiwer {packages['jiwer']}, {RESAMPLES:,} bootstrap resamples of utterances"
    late = seconds["late_compilations"]
    devices = results["devices"]
    return [
        f"95 % intervals; {method}.",
        "",
        *_flags(results["sets"]),
        f"RTFx is {seconds['audio']:.0f} s of audio in {seconds['steady']:.1f} s, {seconds['wait']:.1f} s of it waiting"
        f" for audio, on {len(devices)} {devices[0]}; {late or 'no'} programs were compiled meanwhile. Before that,"
        f" {seconds['load']:.1f} s to load and {seconds['compile']:.1f} s to compile.",
    ]


def _flags(sets: Sequence[dict[str, Any]]) -> list[str]:
    """How many transcripts have each flag."""
    lines = [
        f"Flags in {entry['name']}: {', '.join(f'{flag} {count}' for flag, count in sorted(entry['flags'].items()))}."
        for entry in sets
        if entry.get("flags")
    ]
    return [*lines, ""] if lines else []


def comparison_to_markdown(comparison: dict[str, Any]) -> str:
    """A table of what `compare` returns."""
    translation = any("bleu" in entry for entry in comparison["sets"])
    rows = []
    for entry in [*comparison["sets"], {"name": "average", **comparison["average"]}]:
        for name, title in _TITLES.items():
            if name in entry:
                scores = entry[name]
                outcome = f"{scores['p_value']:.3f}" if translation else _interval(scores["difference"], name, sign="+")
                rows.append([entry["name"], title, _interval(scores["a"], name), _interval(scores["b"], name), outcome])
    last_column = "p, sacrebleu's paired bootstrap" if translation else "B - A, paired"
    table = _table(["set", "metric", f"A: {comparison['a']}", f"B: {comparison['b']}", last_column], rows)
    return "\n".join([*table, "", "95 % bootstrap intervals over utterances."]) + "\n"


def _interval(score: dict[str, float] | None, name: str, sign: str = "") -> str:
    if score is None:
        return "-"
    unit = "" if name in ("bleu", "chrf") else " %"
    return f"{score['rate']:{sign}.2f}{unit} ({score['low']:{sign}.2f} to {score['high']:{sign}.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines]
