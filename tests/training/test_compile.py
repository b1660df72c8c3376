"""model.compile=true: how often the network is compiled, and that its forwards say the same."""

import os
import shutil
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from memtrain.audit.denoiser import Denoiser
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit, weights
from tests.support.callbacks import copies, validation
from tests.support.families import flux, stable_diffusion, stable_diffusion_3
from tests.support.flows import few_tokens  # noqa: F401
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


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("make", [stable_diffusion_3, flux])
def test_a_transformer_is_compiled_once_for_any_number_of_rows(pipeline_folder, counter, make):
    """The rows of what it is told are made on the way, and marked there: else each count has a graph of its own."""
    model = Denoiser.of(make(stable_diffusion(pipeline_folder))).model
    model.network.compile()
    model.compiled = True
    for rows in (5, 4, 1):
        inputs = torch.randn(rows, *model.own_shape), torch.arange(rows) * 100, model.encode(["fox"] * rows)
        with torch.no_grad():
            found = model.predict(*inputs)
            with torch.compiler.set_stance("force_eager"):
                torch.testing.assert_close(found, model._call(*inputs))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(
    "MEMTRAIN_EVERY_COMMAND" not in os.environ or shutil.which("g++") is None,
    reason="MEMTRAIN_EVERY_COMMAND=1, and g++: inductor takes a minute or two of a core",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in what inductor imports
def test_inductor_makes_a_graph_of_the_step_and_one_of_the_scoring_forward(flow_folder, corpus, tmp_path):
    """On a CPU; with rows left out, scores now and then, a reference set and validations of other sizes."""
    trained = []
    for compile in (False, True):
        torch._dynamo.reset()
        counters.clear()
        module = build_module(
            flow_folder, quick_evidence(), dict(compile=compile), scoring=Scoring(every_visits=2), reference_batch=3
        )
        (folder := tmp_path / str(compile)).mkdir()
        fit(module, build_data(corpus), folder, 6, callbacks=[validation(every=3)])
        trained.append(weights(module))
    torch.testing.assert_close(*trained, rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
