"""Comparisons of one checkpoint, computed once, and a summary of the errors that were measured.

Run by `pytest tests/parity`; needs torch, torchaudio and transformers 5.8.1.
"""

import collections
from collections.abc import Callable

import pytest
import torch
import transformers
from goldens.cases import CASES
from parity.comparison import Comparison

if transformers.__version__ != "5.8.1":
    raise ImportError(f"the oracle is transformers 5.8.1, not {transformers.__version__}: later releases scale logits")

torch.use_deterministic_algorithms(True)

_measured: dict[str, list[float]] = collections.defaultdict(list)


@pytest.fixture(scope="session", params=CASES)
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """One checkpoint and everything that both sides compute with it."""
    return Comparison(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def measure() -> Callable[[str, float], float]:
    """Notes a figure for the summary, which shows the largest and the sum under every name; returns it."""

    def note(name: str, value: float) -> float:
        _measured[name].append(float(value))
        return value

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was measured."""
    terminalreporter.section("parity with transformers")
    for name, values in _measured.items():
        if name.startswith("count"):
            terminalreporter.line(f"{name:68} {sum(values):10.0f}")
        else:
            terminalreporter.line(f"{name:68} {max(values):10.1e}")
