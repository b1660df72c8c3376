import csv
import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from memtrain.callbacks.canaries import CanaryList
from memtrain.callbacks.curves import MemorizationCurves
from memtrain.callbacks.generation import compare
from memtrain.callbacks.live_statistics import CAPTIONED
from memtrain.callbacks.memorized_table import VisitedSamples
from memtrain.callbacks.search import training_pictures
from memtrain.callbacks.validation import Validation
from memtrain.core.copies import copy_cut, latent_rmse
from memtrain.core.exclusion import CANARY, REFERENCE, TRAINED, FixedThreshold
from memtrain.core.visits import SUMS, columns_of
from memtrain.data.copies_file import read_copies
from memtrain.report.curves import draw_curves, read_metrics
from memtrain.report.pictures import draw_samples
from memtrain.report.table import put_between_marks
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit
from tests.support.callbacks import copies, pixels, table, validation
from tests.support.training import Record


def test_curves_are_the_means_of_what_was_observed(pipeline_folder, corpus, tmp_path):
    curves, record = MemorizationCurves(every=3, high_noise=0.5), Record()
    module = build_module(pipeline_folder, FixedThreshold(0.5), caption_dropout=0.3)
    trainer = fit(module, build_data(corpus), tmp_path, 6, accumulate=2, callbacks=[curves, record])
    score = torch.cat([o.score for o in record.observed])
    scored = torch.cat([o.scored for o in record.observed])
    group = torch.cat([o.group for o in record.observed])
    noisy = torch.cat([o.timesteps for o in record.observed]) >= 500
    kept, captioned = torch.cat(record.kept), torch.cat([o.captioned for o in record.observed])
    assert not captioned.all()
    for number in (TRAINED, CANARY):
        of = (group == number) & captioned
        assert curves.excluded_fraction(number) == pytest.approx((~kept)[of].double().mean().item())
    last = slice(len(score) // 2, None)  # the second point holds steps 4 to 6
    mine = (group == TRAINED)[last] & scored[last]
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert found["score/train"] == pytest.approx(score[last][mine].mean().item(), rel=1e-5)
    assert found["score_high_noise/train"] == pytest.approx(score[last][mine & noisy[last]].mean().item(), rel=1e-5)
    assert found["samples_seen"] == 48 and curves.excluded_fraction(REFERENCE) >= 0
    assert 0 < found["scoring_share"] < 1 and found["samples_per_second"] > 0
    loss = torch.cat([o.loss for o in record.observed])[last]
    assert found["loss/all"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert found["loss/kept"] == pytest.approx(loss[kept[last]].mean().item(), rel=1e-5)
    assert found["loss/excluded"] == pytest.approx(loss[~kept[last]].mean().item(), rel=1e-5)
    in_bin = mine & (torch.cat([o.timesteps for o in record.observed])[last] // 100 == 3)
    assert found["score_by_timestep/train/t300"] == pytest.approx(score[last][in_bin].mean().item(), rel=1e-5)
    assert {v for k, v in found.items() if k.startswith("threshold_by_timestep")} == {0.5}


def test_curves_of_a_resumed_run_remember_the_first_part(pipeline_folder, corpus, tmp_path):
    curves = MemorizationCurves(every=2, high_noise=0.5)
    fit(build_module(pipeline_folder), build_data(corpus), tmp_path, 4, callbacks=[curves])
    again = MemorizationCurves(every=2, high_noise=0.5)
    again.load_state_dict(curves.state_dict())
    assert torch.equal(again.total, curves.total) and again.total.sum() > 0
    half = curves.late[:, :, TRAINED].sum()  # steps 3 and 4
    fit(build_module(pipeline_folder), build_data(corpus), tmp_path, 2, callbacks=[again])
    assert again.total.sum() > curves.total.sum() and 0 < half < curves.total[:, :, TRAINED].sum()


def test_a_checkpoint_between_two_points_of_the_curves_holds_all_rows_so_far(pipeline_folder, corpus, tmp_path):
    """Else a run that is cut off there comes to another excluded share than the undisturbed one."""
    curves, record, states = MemorizationCurves(every=9, high_noise=0.5), Record(), []

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            states.append(curves.state_dict())

    module = build_module(pipeline_folder, FixedThreshold(0.5), caption_dropout=0.3)
    fit(module, build_data(corpus), tmp_path, 4, callbacks=[curves, record, Save()])
    for step, state in enumerate(states, start=1):
        captioned = sum(observed.captioned.sum().item() for observed in record.observed[:step])
        seen = state["total"][CAPTIONED].sum() - state["total"][CAPTIONED][:, REFERENCE].sum()
        assert seen.item() == captioned
    assert torch.equal(states[-1]["total"], curves.total) and torch.equal(states[-1]["late"], curves.late)


def test_validation_is_a_function_of_the_weights_alone(pipeline_folder, corpus, tmp_path):
    """Other batch sizes, other steps before it: the same figures where the weights did not change."""
    figures = []
    for batch_size, steps in ((5, 2), (32, 3)):
        module = build_module(pipeline_folder, scoring=Scoring(every=0))
        module.optimizer_config = module.optimizer_config.__class__(
            1e-30, (0.9, 0.999), 0.0, 1e-3, "constant", 0, eight_bit=False
        )
        trainer = fit(module, build_data(corpus), tmp_path, steps, callbacks=[validation(batch_size=batch_size)])
        figures.append({k: v.item() for k, v in trainer.callback_metrics.items() if "val_" in k or "heldout" in k})
    assert len(figures[0]) == 9 and figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_scores_that_are_not_finite_tell_nobody_apart(pipeline_folder, corpus, tmp_path):
    """A nan sorts above all: pictures that have no score would be told from all others."""
    look = Validation(5, 4, 2, 0.7, 8)

    def looked_at(*arguments, found=look._look_at):
        timesteps, loss, score, second = found(*arguments)
        return timesteps, loss, torch.full_like(score, torch.nan), second

    look._look_at = looked_at
    trainer = fit(build_module(pipeline_folder), build_data(corpus), tmp_path, 1, callbacks=[look])
    assert trainer.callback_metrics["heldout_loss"].isfinite()
    assert trainer.callback_metrics["auc_canary_vs_reference"].isnan()
    assert trainer.callback_metrics["tpr_at_1pct_fpr"].isnan()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((1, 0.7), "timesteps_per_sample=1 looks at none at high noise, from 0.7 of the schedule on; say 2 or more"),
        ((4, 0.9), "timesteps_per_sample=4 looks at none at high noise, from 0.9 .* say 5 or more"),
        ((4, 1.0), r"high_noise is a share of the schedule in \[0, 1\), got 1"),
    ],
)
def test_a_validation_that_sees_no_high_noise_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Validation(1, 4, *options, 8)
    Validation(1, 4, 5, 0.9, 8)


def test_validation_leaves_training_untouched(pipeline_folder, corpus, tmp_path):
    from tests.conftest import weights

    plain, watched = build_module(pipeline_folder), build_module(pipeline_folder)
    fit(plain, build_data(corpus), tmp_path, 4)
    curves = MemorizationCurves(every=1, high_noise=0.5)
    watching = [curves, CanaryList(reference=2), validation(every=1), copies(every=1), table(every=2)]
    fit(watched, build_data(corpus), tmp_path, 4, callbacks=watching)
    assert torch.equal(weights(plain), weights(watched))


def test_the_bound_is_on_the_rmse_of_scaled_latents(pipeline_folder, corpus, tmp_path):
    """At a bound near 0 nothing is a copy; at infinity, where no reference caption sets a cut, everything is. That no
    canary has `min_repeats` leaves none out."""
    rates = {}
    for bound, reference in ((1e-6, 4), (math.inf, 0)):
        looks = copies(reference=reference, max_rmse=bound, min_repeats=1000)
        module = build_module(pipeline_folder, scoring=Scoring(every=0))
        trainer = fit(module, build_data(corpus), tmp_path, 1, callbacks=[looks])
        found = trainer.callback_metrics
        rates[bound] = [found[f"{name}/canary"].item() for name in ("copy_rate", "copy_rate_nearest")]
        assert 0.1 < found["copy_rmse/canary"].item() < 10 and looks.cut.distance == pytest.approx(bound)
    assert rates == {1e-6: [0, 0], math.inf: [1, 1]}
    assert pixels(tmp_path / "samples.png").std() > 10


def test_every_generation_is_held_against_its_own_picture_and_the_nearest_that_is_trained_on(
    pipeline_folder, corpus, tmp_path
):
    """`copies.csv` against the pictures encoded one by one; the cut is what the reference captions' rows say."""
    data = build_data(corpus, repeats=[3, 1], sacrificed=1)
    looks, module = copies(reference=4, max_rmse=9.0, min_repeats=2), build_module(pipeline_folder)
    trainer = fit(module, data, tmp_path, 1, callbacks=[looks])
    rows = read_copies(tmp_path / "copies.csv")
    assert rows == looks.rows and len({(row.key, row.generation) for row in rows}) == len(rows) == 3 * 2 + 4
    trained = np.setdiff1d(np.arange(48), data.groups.reference)
    latents = module.encode_samples(range(48)).latents
    last = module.encode_samples(data.groups.reference[:1])
    (made,) = compare(trainer, module, last, [(0, 0)], *looks.options, with_latents=True)
    distances = latent_rmse(made.latents[None], latents)
    (row,) = [row for row in rows if row.group == "reference" and row.key == data.samples.key(int(last.positions[0]))]
    nearest = trained[distances[trained].argmin()]
    assert row.nearest_key == data.samples.key(int(nearest)) and row.canary is None and row.repeats == 0
    assert row.nearest_rmse == pytest.approx(distances[nearest].item(), rel=1e-5)
    assert row.rmse == pytest.approx(distances[last.positions[0]].item(), rel=1e-5)
    chance = torch.tensor([row.nearest_rmse for row in rows if row.group == "reference"])
    assert looks.cut == copy_cut(chance, 9.0) and looks.cut.distance < chance.min()
    assert {row.kind for row in rows} == {"planted", ""} and all(
        row.is_copy == (row.rmse <= looks.cut.distance) for row in rows
    )
    # two canaries, of which the one with a single repeat is in the file and in no rate
    few = [row for row in rows if row.group == "canary"]
    assert {row.repeats for row in few} == {3, 1} and {row.repeats for row in looks.counted()} == {3, 0}
    assert pixels(tmp_path / "doses.png").std() > 10


def test_of_many_pictures_some_are_searched_and_all_canaries_are(pipeline_folder, corpus):
    data = build_data(corpus)
    some = training_pictures(data.groups, data.samples.counts, 10, seed=3)
    assert np.isin(data.groups.canary, some).all() and not np.isin(data.groups.reference, some).any()
    assert len(some) <= 10 + len(data.groups.canary) and (np.diff(some) > 0).all()
    everything = training_pictures(data.groups, data.samples.counts, 48, seed=3)
    assert len(everything) == 48 - len(data.groups.reference)


def test_a_canary_is_memorized_at_the_first_look_at_which_half_its_generations_are_copies(
    pipeline_folder, corpus, tmp_path
):
    """With a cut of infinity that is the first look, with none never; those not watched are looked at in the end.

    What is told in the end goes by the cut that is known then, not by what it was taken for at a look.
    """
    module = build_module(pipeline_folder, scoring=Scoring(every=0))
    everything = copies(every=2, max_rmse=math.inf, watched=2, reference=0)
    trainer = fit(module, build_data(corpus, sacrificed=1), tmp_path, 4, accumulate=2, callbacks=[everything])
    keys = [trainer.datamodule.samples.key(int(p)) for p in trainer.datamodule.groups.planted]
    assert everything.memorized_at(trainer) == {keys[0]: 2, keys[1]: 4, keys[2]: 2}
    assert trainer.callback_metrics["memorized_canaries"] == 1
    assert {trainer.callback_metrics[f"copy_rate/{g}"].item() for g in ("canary", "sacrificed")} == {1}
    curves = everything.curves(trainer)
    assert curves["copy_rate/canary"] == ([2, 4], [1, 1]) and curves["memorized_canaries"] == ([2, 4], [1, 1])
    last = dict(everything.looks.distances[4])
    everything.on_train_end(trainer, module)  # as where a run stops early at a step that was looked at
    assert everything.looks.distances[4] == last
    resumed = copies(max_rmse=math.inf)
    resumed.load_state_dict(everything.state_dict())
    assert resumed.memorized_at(trainer) == everything.memorized_at(trainer)
    everything.cut = copy_cut(torch.tensor([1e-6]))
    assert set(everything.memorized_at(trainer).values()) == {None}
    assert everything.curves(trainer)["memorized_canaries"] == ([2, 4], [0, 0])


def test_canaries_are_named_with_group_and_caption(pipeline_folder, corpus, tmp_path):
    data = build_data(corpus, sacrificed=1)
    fit(build_module(pipeline_folder), data, tmp_path, 1, callbacks=[CanaryList(reference=5)])
    with (tmp_path / "canaries.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    groups = data.groups
    positions = [*groups.canary, *groups.sacrificed, *groups.reference]
    others = len(groups.reference) - 5  # named, for nobody is to take them for training pictures
    assert [row["key"] for row in rows] == [data.samples.key(int(p)) for p in positions] and others > 0
    assert [row["group"] for row in rows] == [
        *["canary"] * 2, "sacrificed", *["reference"] * 5, *["held_out"] * others
    ]  # fmt: skip
    assert list(rows[0]) == ["key", "caption", "group"]
    assert [row["caption"] for row in rows] == data.decode(positions[:8]).captions + [""] * others


def test_visited_samples_are_summed_and_of_bounded_number():
    generator = np.random.default_rng(0)
    index = generator.integers(0, 50, 2000)
    rows = generator.random((2 + SUMS, 2000))
    whole, parts = VisitedSamples(), VisitedSamples()
    whole.add(index, rows)
    for part in np.array_split(np.arange(2000), 7):
        parts.add(index[part], rows[:, part])
    np.testing.assert_array_equal(whole.index, parts.index)
    np.testing.assert_allclose(whole.sums, parts.sums)
    np.testing.assert_allclose(whole.sums[0], np.bincount(index, rows[0]))
    strength = whole.index.astype(float)
    whole.forget(strength, capacity=25)
    assert len(whole.index) == 50
    whole.forget(strength, capacity=10)
    assert whole.index.tolist() == list(range(40, 50)) and np.array_equal(whole.sums, parts.sums[:, 40:])


def test_what_stands_out_is_told_by_the_reference_sets_visits():
    """The one that is high more often stands out more, the one without a visit that counts not at all."""
    z, time = torch.randn(40, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 1, 40)
    reference, often = VisitedSamples(), VisitedSamples()
    reference.add(np.arange(40) % 8, torch.cat([torch.ones(2, 40).double(), columns_of(z, time)]).numpy())
    columns = columns_of(torch.tensor([4.0, 4, 4, 4, 0]), torch.full((5,), 0.5))
    counts = torch.tensor([1.0, 1, 1, 1, 0])
    rows = torch.cat([torch.ones(1, 5).double(), torch.cat([torch.full((1, 5), 2.0).double(), columns]) * counts])
    often.add(np.array([3, 3, 3, 5, 9]), rows.numpy())
    strength = often.evidence(reference)
    assert often.index[often.highest(strength, 3)].tolist() == [3, 5] and strength[0] > strength[1] > 1
    assert often.score.tolist() == [2, 2, 0]


def test_the_table_of_the_most_memorized_shows_real_visits(pipeline_folder, corpus, tmp_path):
    looks, record = table(), Record()
    module = build_module(pipeline_folder, reference_every=1, reference_batch=32)
    data = build_data(corpus)
    fit(module, data, tmp_path, 12, callbacks=[looks, record])
    index = torch.cat([o.sample_index for o in record.observed]).numpy()
    captioned = torch.cat([o.captioned for o in record.observed]).numpy()
    visits = np.bincount(index[captioned], minlength=48)
    np.testing.assert_array_equal(looks.visited.sums[0], visits[looks.visited.index])
    assert looks.visited.sums[2].sum() > 0 and (looks.visited.sums[2] <= looks.visited.sums[0]).all()
    np.testing.assert_array_equal(looks.reference.index, np.sort(data.groups.reference))
    shown, held_out = looks.visited.evidence(looks.reference), looks.visited.evidence(None)
    assert np.isfinite(shown).all() and shown.any() and not np.array_equal(shown, held_out)
    assert pixels(tmp_path / "memorized.png").std() > 10
    again = table()
    again.load_state_dict(looks.state_dict())
    np.testing.assert_array_equal(again.visited.sums, looks.visited.sums)
    np.testing.assert_array_equal(again.reference.sums, looks.reference.sums)


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
    (tmp_path / "m.csv").write_text("step,samples_seen\n0,0\n")
    draw_curves(tmp_path / "m.csv", tmp_path / "c.png")


def test_a_table_goes_between_its_marks_and_nowhere_else():
    text = "a\n<!-- results: begin -->\nold\n<!-- results: end -->\nb\n"
    assert put_between_marks(text, "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="has no <!-- results"):
        put_between_marks("no marks", "new")
