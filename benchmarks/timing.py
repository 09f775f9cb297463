"""Timing of several ways to do the same work, in turns, so that a machine's slow moments affect all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

Measured = TypeVar("Measured")


def elapsed(run: Callable[[], Any]) -> float:
    """The seconds that a call takes until the arrays that it returns are computed."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure_in_turns(measures: Mapping[str, Callable[[], Measured]], turns: int) -> dict[str, list[Measured]]:
    """What each of the functions returns in every turn. In a turn, each is called once."""
    measured: dict[str, list[Measured]] = {name: [] for name in measures}
    for _ in range(turns):
        for name, measure in measures.items():
            measured[name].append(measure())
    return measured


def paired_ratios(measured: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The ratio of each measurement to the first function's measurement in the same turn."""
    baseline = next(iter(measured.values()))
    return {
        name: [value / base for value, base in zip(values, baseline, strict=True)] for name, values in measured.items()
    }


def median_ratios(measured: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each function's `paired_ratios`."""
    return {name: statistics.median(ratios) for name, ratios in paired_ratios(measured).items()}
