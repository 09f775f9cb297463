"""Results as Markdown: the Open ASR leaderboard's table, a row a set, and where the time went."""

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
        ["model", *average, "RTFx", *(each["name"] for each in sets)],
        [
            [
                results["model"],
                *(_interval(results["average"][main], main) for _ in average),
                _number(results["rtfx"]),
                *(_interval(each[main], main) for each in sets),
            ]
        ],
    )
    metrics = [name for name in _TITLES if any(name in each for each in sets)]
    details = _table(
        ["set", "utterances", "scored", "failed", "hours", *(_TITLES[name] for name in metrics), "RTFx"],
        [
            [
                each["name"],
                *(str(each[key]) for key in ("utterances", "scored", "failed")),
                f"{each['hours']:.2f}",
                *(_interval(each.get(name), name) for name in metrics),
                _number(each["rtfx"]),
            ]
            for each in sets
        ],
    )
    return "\n".join([*leaderboard, "", *details, "", *_notes(results)]) + "\n"


def _notes(results: dict[str, Any]) -> list[str]:
    seconds, scoring, packages = results["seconds"], results["scoring"], results["packages"]
    if scoring["translation"]:
        how = "; ".join(f"{_TITLES[name]} {text}" for name, text in results["sets"][0]["signatures"].items())
    else:
        how = f'normalizer "{scoring["normalizer"]}" (whisper-normalizer {packages["whisper-normalizer"]})'
        how += f", jiwer {packages['jiwer']}, {RESAMPLES:,} bootstrap resamples of utterances"
    late = seconds["late_compilations"]
    devices = results["devices"]
    return [
        f"95 % intervals; {how}.",
        "",
        f"RTFx is {seconds['audio']:.0f} s of audio in {seconds['steady']:.1f} s, {seconds['wait']:.1f} s of it waiting"
        f" for audio, on {len(devices)} {devices[0]}; {late or 'no'} programs were compiled meanwhile. Before that,"
        f" {seconds['load']:.1f} s to load and {seconds['compile']:.1f} s to compile.",
    ]


def comparison_to_markdown(comparison: dict[str, Any]) -> str:
    """A table of what `compare` returns."""
    translation = any("bleu" in each for each in comparison["sets"])
    rows = []
    for each in [*comparison["sets"], {"name": "average", **comparison["average"]}]:
        for name, title in _TITLES.items():
            if name in each:
                found = each[name]
                last = f"{found['p_value']:.3f}" if translation else _interval(found["difference"], name, sign="+")
                rows.append([each["name"], title, _interval(found["a"], name), _interval(found["b"], name), last])
    last = "p, sacrebleu's paired bootstrap" if translation else "B - A, paired"
    table = _table(["set", "metric", f"A: {comparison['a']}", f"B: {comparison['b']}", last], rows)
    return "\n".join([*table, "", "95 % bootstrap intervals over utterances."]) + "\n"


def _interval(found: dict[str, float] | None, name: str, sign: str = "") -> str:
    if found is None:
        return "-"
    unit = "" if name in ("bleu", "chrf") else " %"
    return f"{found['rate']:{sign}.2f}{unit} ({found['low']:{sign}.2f} to {found['high']:{sign}.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines]
