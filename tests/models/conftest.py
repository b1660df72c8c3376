"""Models of several depths, whose layers have names to be known by."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pipeline_folder(deep_folder) -> Path:
    return deep_folder
