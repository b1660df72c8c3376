"""trainer.precision=16-mixed, with a real scaler on the CPU: overflows of the scaled gradient are its own affair."""

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from memtrain.training.checkpoint import checkpoint
from tests.conftest import build_data, build_module, fit, weights
from tests.support.rules import quick_evidence
from tests.support.training import Poison


def fp16(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def train(pipeline, corpus, folder, scale, steps=3, callbacks=(), ckpt_path=None, **options):
    module = build_module(pipeline, quick_evidence(), **options)
    plugin = fp16(scale)
    fit(module, build_data(corpus), folder, steps, callbacks=callbacks, ckpt_path=ckpt_path, plugins=[plugin])
    return module, plugin.scaler.get_scale()


def test_the_scaler_backs_off_and_nobody_is_blamed(pipeline_folder, corpus, tmp_path, caplog):
    keep = checkpoint(3, str(tmp_path / "checkpoints"))
    before = weights(build_module(pipeline_folder))
    module, scale = train(pipeline_folder, corpus, tmp_path, 2.0**60, callbacks=[keep], max_bad_steps=1)
    assert scale == 2.0**57 and module.global_step == 3 and module.accumulation.scaler_backoffs == 3
    assert module.stops.bad_steps == module.accumulation.updates_skipped == module.ema._ema.optimization_step == 0
    assert torch.equal(weights(module), before) and module.exclusion.reference.count.sum() > 0  # which has learnt
    assert not [record for record in caplog.records if record.levelname == "WARNING" and ".tar" in record.message]
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    rest, scale = train(pipeline_folder, corpus, tmp_path, 1.0, steps=4, callbacks=[keep], ckpt_path=last)
    assert rest.accumulation.scaler_backoffs == 4 and scale == 2.0**56  # both go on


@pytest.mark.parametrize("scale", [2.0**60, 2.0**16])
def test_a_loss_that_is_not_finite_is_a_bad_step_whatever_the_scale(pipeline_folder, corpus, tmp_path, caplog, scale):
    poison = Poison({3})  # the second call is the reference set's
    module, _ = train(pipeline_folder, corpus, tmp_path, scale, method=poison)
    assert module.stops.bad_steps == 1 and module.accumulation.scaler_backoffs == (2 if scale > 2**20 else 0)
    assert "step 1: a loss or gradient is not finite; samples of this rank: 0" in caplog.text
    assert weights(module).isfinite().all()


def test_a_gradient_that_overflows_without_a_scale_is_a_bad_step(pipeline_folder, corpus, tmp_path):
    module = build_module(pipeline_folder)
    module.trained_parameters()[0].register_hook(lambda gradient: gradient * torch.inf)
    fit(module, build_data(corpus), tmp_path, 1, plugins=[fp16(1.0)])
    assert module.stops.bad_steps == 1 and module.accumulation.scaler_backoffs == 0
