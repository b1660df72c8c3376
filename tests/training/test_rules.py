"""All rules that learn, in training: on two ranks as on one, with remembered scores, from a step on."""

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from memtrain.cli.main import config_folder
from memtrain.core.exclusion import Decision, ExclusionRule, Observations
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit
from tests.support.rules import quick_rules


def test_every_rule_of_conf_that_learns_is_tested_here():
    files = {file.stem: OmegaConf.load(file) for file in (config_folder() / "exclusion").glob("*.yaml")}
    rules = {name: get_class(file["_target_"]) for name, file in files.items() if "_target_" in file}
    learning = {name: rule for name, rule in rules.items() if rule.learns}
    assert {name: type(rule) for name, rule in quick_rules().items()} == learning


class Panel(ExclusionRule):
    """Lets all rules watch one run, of which the first is in force, and notes what each would do."""

    learns = True

    def __init__(self):
        self.rules, self.rows = quick_rules(), []

    def setup(self, num_samples, num_timesteps):
        for rule in self.rules.values():
            rule.setup(num_samples, num_timesteps)

    def decide(self, observed: Observations) -> Decision:
        decisions = [rule.decide(observed) for rule in self.rules.values()]
        said = [c.double() for d in decisions for c in (d.keep_mask, d.threshold)]
        rows = torch.stack([observed.timesteps.double(), observed.sample_index.double(), *said], 1)
        self.rows.append(rows[observed.captioned])  # the others fill up a rank's turn of the reference set
        return decisions[0]

    def update(self, observed):
        for rule in self.rules.values():
            rule.update(observed)

    def said(self) -> torch.Tensor:
        """A row for each visit with a caption: timestep, sample, and keep and threshold of each rule."""
        return torch.cat(self.rows)

    def state(self) -> dict[str, torch.Tensor]:
        return {f"{n}.{k}": v for n, rule in self.rules.items() for k, v in rule.state_dict().items()}


def ordered(rows: torch.Tensor) -> torch.Tensor:
    return rows[(rows[:, 0] * 1e6 + rows[:, 1]).argsort()]


def train_a_rank(pipeline: str, corpus: str, out: str) -> None:
    panel = Panel()
    module = build_module(pipeline, panel, reference_batch=5)
    trainer = fit(module, build_data(corpus, 2, sacrificed=1), out, 8, accumulate=2, ranks=2)
    torch.save(dict(said=panel.said(), state=panel.state()), f"{out}/rank{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_ranks_decide_as_one(forks, pipeline_folder, corpus, tmp_path):
    forks.call(train_a_rank, pipeline_folder, corpus, tmp_path, log=tmp_path / "log", ranks=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][name]), name

    panel = Panel()
    module = build_module(pipeline_folder, panel, reference_batch=5)
    fit(module, build_data(corpus, 8, sacrificed=1), tmp_path, 8)
    for name, value in panel.state().items():
        torch.testing.assert_close(ranks[0]["state"][name], value, atol=1e-3, rtol=1e-3, msg=name)
    one, two = ordered(panel.said()), ordered(torch.cat([rank["said"] for rank in ranks]))
    assert torch.equal(one[:, :2], two[:, :2])
    for number, name in enumerate(panel.rules):
        keep, threshold = one[:, 2 + 2 * number], one[:, 3 + 2 * number]
        assert torch.equal(keep, two[:, 2 + 2 * number]), name
        torch.testing.assert_close(threshold, two[:, 3 + 2 * number], rtol=1e-3, atol=1e-5, msg=name)
        assert 0 < keep.mean() < 1, name  # it left out some, and not all


@pytest.mark.parametrize("name", ["quantile", "calibrated", "iet_agc", "evidence"])
def test_a_rule_is_in_force_from_its_start_step_on(pipeline_folder, corpus, tmp_path, name):
    rule = quick_rules()[name]
    rule.start_step = 4
    scoring = Scoring(every=0) if name == "iet_agc" else Scoring(every_visits=2)
    module = build_module(pipeline_folder, rule, scoring=scoring, reference_batch=4, reference_every=1)
    kept = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(pl_module.last_step.trained.decision.keep_mask)

    fit(module, build_data(corpus, 8, sacrificed=1), tmp_path, 10, callbacks=[Keep()])
    assert torch.cat(kept[:4]).all() and not torch.cat(kept[4:]).all()
