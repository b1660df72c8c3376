import pytest

from tests.support.program import small_run


@pytest.fixture
def run(corpus, pipeline_folder, tmp_path):
    """Arguments of a small run in tmp_path/faults/one."""
    return lambda *more, steps=12: small_run(corpus, pipeline_folder, tmp_path, "run_id=one", *more, steps=steps)
