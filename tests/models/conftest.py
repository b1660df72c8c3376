"""Models of several depths, whose layers have names to be known by."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pipeline_folder(pipelines) -> Path:
    return pipelines["deep"]
