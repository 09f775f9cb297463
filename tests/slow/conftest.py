"""Everything here is of the slow tier, unless it is marked soak: it needs more packages, more processes, or minutes."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("soak") is None:
            item.add_marker(pytest.mark.slow)
