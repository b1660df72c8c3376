"""What is marked `fuzz` runs where `-m` names it, and is left out of every other run, `-m "not slow"` too."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "fuzz" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("fuzz")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
