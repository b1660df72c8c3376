import math

import numpy as np
import pytest
import torch
from PIL import Image

from memtrain.callbacks.copies import Copies
from memtrain.callbacks.curves import MemorizationCurves
from memtrain.callbacks.validation import Validation
from memtrain.core.exclusion import CANARY, REFERENCE, TRAINED, FixedThreshold
from memtrain.report.curves import draw_curves, read_metrics
from memtrain.report.pictures import draw_samples
from memtrain.report.table import put_between_marks
from tests.conftest import build_data, build_module, fit
from tests.training.test_module import Record


def validation(**options) -> Validation:
    defaults = dict(every=2, samples=6, timesteps_per_sample=4, high_noise=0.5, batch_size=5)
    return Validation(**(defaults | options))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_curves_are_the_means_of_what_was_observed(pipeline_folder, corpus, tmp_path):
    curves, record = MemorizationCurves(every=3, high_noise=0.5), Record()
    module = build_module(pipeline_folder, FixedThreshold(0.5), caption_dropout=0.3)
    trainer = fit(module, build_data(corpus), tmp_path, 6, accumulate=2, callbacks=[curves, record])
    score = torch.cat([o.score for o in record.observed])
    scored = torch.cat([o.scored for o in record.observed])
    group = torch.cat([o.group for o in record.observed])
    noisy = torch.cat([o.timesteps for o in record.observed]) >= 500
    kept = torch.cat(record.kept)
    for number in (TRAINED, CANARY):
        assert curves.excluded_fraction(number) == pytest.approx((~kept)[group == number].double().mean().item())
    last = slice(len(score) // 2, None)  # the second point holds steps 4 to 6
    mine = (group == TRAINED)[last] & scored[last]
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert found["score/train"] == pytest.approx(score[last][mine].mean().item(), rel=1e-5)
    assert found["score_high_noise/train"] == pytest.approx(score[last][mine & noisy[last]].mean().item(), rel=1e-5)
    assert found["samples_seen"] == 48 and curves.excluded_fraction(REFERENCE) >= 0


def test_curves_of_a_resumed_run_remember_the_first_part(pipeline_folder, corpus, tmp_path):
    curves = MemorizationCurves(every=2, high_noise=0.5)
    fit(build_module(pipeline_folder), build_data(corpus), tmp_path, 4, callbacks=[curves])
    again = MemorizationCurves(every=2, high_noise=0.5)
    again.load_state_dict(curves.state_dict())
    assert torch.equal(again.total, curves.total) and again.total.sum() > 0


def test_validation_is_a_function_of_the_weights_alone(pipeline_folder, corpus, tmp_path):
    """Other batch sizes, other steps before it: the same figures where the weights did not change."""
    figures = []
    for batch_size, steps in ((5, 2), (32, 3)):
        module = build_module(pipeline_folder, score_every=0)
        module.optimizer_config = module.optimizer_config.__class__(
            1e-30, (0.9, 0.999), 0.0, 1e-3, "constant", 0, eight_bit=False
        )
        trainer = fit(module, build_data(corpus), tmp_path, steps, callbacks=[validation(batch_size=batch_size)])
        figures.append({k: v.item() for k, v in trainer.callback_metrics.items() if "val_" in k or "heldout" in k})
    assert len(figures[0]) == 9 and figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_validation_leaves_training_untouched(pipeline_folder, corpus, tmp_path):
    from tests.conftest import weights

    plain, watched = build_module(pipeline_folder), build_module(pipeline_folder)
    fit(plain, build_data(corpus), tmp_path, 4)
    copies = Copies(generations=1, reference=2, num_steps=2, guidance_scale=2.0, max_rmse=0.5, batch_size=2, shown=2)
    fit(watched, build_data(corpus), tmp_path, 4, callbacks=[validation(every=1), copies])
    assert torch.equal(weights(plain), weights(watched))


def test_a_generation_equal_to_the_training_image_is_a_copy(pipeline_folder, corpus, tmp_path, monkeypatch):
    """The cut is on the RMSE of scaled latents: at 0 nothing is a copy, at infinity everything is."""
    rates = {}
    for cut in (1e-6, math.inf):
        copies = Copies(generations=2, reference=4, num_steps=2, guidance_scale=2.0, max_rmse=cut, batch_size=3, shown=2)
        module = build_module(pipeline_folder, score_every=0)
        trainer = fit(module, build_data(corpus), tmp_path, 1, callbacks=[copies])
        rates[cut] = [trainer.callback_metrics[f"copy_rate/{g}"].item() for g in ("canary", "reference")]
        distance = trainer.callback_metrics["copy_rmse/canary"].item()
        assert 0.1 < distance < 10
    assert rates == {1e-6: [0, 0], math.inf: [1, 1]}
    assert pixels(tmp_path / "samples.png").std() > 10


def test_captions_are_shown_as_text_whatever_they_hold(tmp_path):
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    rows = [(caption, image, image[None], [0.1]) for caption in ("$x_", "<script>", "\u4e2d $$ \\frac", "")]
    draw_samples(tmp_path / "s.png", rows, 0.5)
    assert pixels(tmp_path / "s.png").shape[1] > 100


def test_curves_are_drawn_from_whatever_columns_there_are(tmp_path):
    (tmp_path / "m.csv").write_text("step,heldout_loss,excluded/train\n1,,0.5\n2,0.1,\n3,,0.25\n")
    columns = read_metrics(tmp_path / "m.csv")
    assert columns == {"excluded/train": ([1, 3], [0.5, 0.25]), "heldout_loss": ([2], [0.1])}
    draw_curves(tmp_path / "m.csv", tmp_path / "c.png")
    assert pixels(tmp_path / "c.png").shape[1] > 500


def test_a_table_goes_between_its_marks_and_nowhere_else():
    text = "a\n<!-- results: begin -->\nold\n<!-- results: end -->\nb\n"
    assert put_between_marks(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="has no <!-- results"):
        put_between_marks("no marks", "new")
