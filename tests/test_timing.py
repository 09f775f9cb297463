"""The timing that benchmarks share."""

import itertools
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

timing = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "timing.py")))


def test_measurements_are_compared_within_a_turn() -> None:
    # Given two functions whose machine becomes ten times slower in the second turn
    order: list[str] = []
    first, second = itertools.cycle([1.0, 10.0, 2.0]), itertools.cycle([2.0, 20.0, 8.0])
    measures = {
        "first": lambda: (order.append("first"), next(first))[1],
        "second": lambda: (order.append("second"), next(second))[1],
    }
    # When they are measured in turns
    measured = timing.measure_in_turns(measures, 3)
    # Then each ran once a turn, and ratios are of measurements of the same turn
    assert order == ["first", "second"] * 3
    assert measured == {"first": [1.0, 10.0, 2.0], "second": [2.0, 20.0, 8.0]}
    assert timing.paired_ratios(measured) == {"first": [1.0, 1.0, 1.0], "second": [2.0, 2.0, 4.0]}
    assert timing.median_ratios(measured) == {"first": 1.0, "second": 2.0}


def test_elapsed_is_the_time_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a clock that a call moves by three seconds, then that is what it took
    clock = [5.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert timing.elapsed(lambda: clock.append(clock.pop() + 3.0)) == 3.0
