"""model.compile=true: how often the UNet is compiled, and that its forwards say the same."""

from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit, weights
from tests.support.callbacks import copies, validation
from tests.support.rules import quick_evidence


@pytest.fixture
def counter(monkeypatch):
    """Counts graphs. They run as they are traced: the compiler behind them takes minutes and is not ours."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_run_compiles_two_graphs_and_is_the_run_that_is_not_compiled(pipeline_folder, corpus, tmp_path, counter):
    """One to four rows are scored, three of the reference set, five in validation; three are generated."""
    trained = []
    for compile in (False, True):
        module = build_module(
            pipeline_folder, quick_evidence(), dict(compile=compile), scoring=Scoring(every_visits=2), reference_batch=3
        )
        (folder := tmp_path / str(compile)).mkdir()
        fit(module, build_data(corpus), folder, 6, callbacks=[validation(every=3), copies()])
        trained.append(weights(module))
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)
    for rows in (1, 7):
        inputs = torch.randn(rows, 4, 8, 8), torch.arange(rows) * 100, module.model.null(1)
        for spread in (inputs[2].expand(rows), inputs[2].index([0] * rows)):  # another layout
            with torch.no_grad():
                found = module.model.predict(*inputs[:2], spread)
                with torch.compiler.set_stance("force_eager"):
                    torch.testing.assert_close(found, module.model.unet(*inputs[:2], spread.hidden)[0])
    assert counter.frame_count == 2
