"""What can be known to fail before the first step; and what the user should know by then."""

import logging
import shutil

import pytest
import torch

from memtrain.core.exclusion import KeepAll
from memtrain.training.checkpoint import AsideIO, checkpoint
from memtrain.training.checks import (
    CHECKPOINT_BYTES_PER_PARAMETER,
    EXPORT_BYTES_PER_PARAMETER,
    LOGS_BYTES,
    bytes_of_samples,
    check_disk,
    warn_of_sacrificed,
)
from memtrain.training.score_memory import Scoring
from tests.conftest import build_data, build_module, fit
from tests.support.rules import quick_evidence


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_disk_that_holds_what_a_run_has_at_its_most_is_large_enough_and_a_smaller_one_is_not(
    pipeline_folder, corpus, tmp_path, monkeypatch, keep
):
    """The most is on disk while a checkpoint is written and the ones that stay are still there."""
    folder, sizes = tmp_path / "run/checkpoints", []
    replace = AsideIO.save_checkpoint

    def measured(self, *arguments, **named):
        replace(self, *arguments, **named)
        sizes.append(sum(path.stat().st_size for path in folder.glob("*.ckpt") if not path.is_symlink()))

    monkeypatch.setattr(AsideIO, "save_checkpoint", measured)
    module = build_module(pipeline_folder)
    fit(module, build_data(corpus), tmp_path / "run", 5, callbacks=[checkpoint(1, str(folder), keep)])
    count = sum(parameter.numel() for parameter in module.trained_parameters())
    counted = (keep + 1) * count * (CHECKPOINT_BYTES_PER_PARAMETER + 8)  # AdamW's two moments
    assert counted <= max(sizes) < 1.5 * counted  # names and small state come on top, and count for a tiny model
    shutil.rmtree(folder)

    needed = counted + count * EXPORT_BYTES_PER_PARAMETER + LOGS_BYTES

    def free(bytes_):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * bytes_, bytes_, bytes_))

    free(needed)
    check_disk(tmp_path / "run", module.trained_parameters(), module.optimizer_config, keep)
    free(needed - 1)
    says = rf"too full for a run.* {keep + 1} checkpoints \(callbacks.checkpoint.keep={keep}"
    with pytest.raises(OSError, match=says):
        check_disk(tmp_path / "run", module.trained_parameters(), module.optimizer_config, keep)


@pytest.mark.parametrize(
    ("rule", "scoring", "a_sample"),
    [
        (KeepAll(), Scoring(), 0),
        (quick_evidence(), Scoring(), 4 + 1),
        (quick_evidence(), Scoring(every_visits=3), 4 + 1 + 4 + 2 + 1),
    ],
)
def test_the_room_is_told_with_what_is_kept_of_samples_and_the_best_weights(
    pipeline_folder, corpus, tmp_path, monkeypatch, rule, scoring, a_sample
):
    assert bytes_of_samples(rule, scoring, 10**9) == 10**9 * a_sample
    module, data = build_module(pipeline_folder, rule, scoring=scoring), build_data(corpus)
    fit(module, data, tmp_path, 1, callbacks=[checkpoint(1, str(tmp_path))])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["memtrain"]
    kept = [state["exclusion"], state["scores"] or {}]
    found = sum(value.nbytes for part in kept for name, value in part.items() if len(value) == data.groups.num_samples)
    assert found == bytes_of_samples(rule, scoring, data.groups.num_samples)
    count = sum(parameter.numel() for parameter in module.trained_parameters())
    needed = 2 * (count * (CHECKPOINT_BYTES_PER_PARAMETER + 8 + 4) + 1000) + count * EXPORT_BYTES_PER_PARAMETER
    disk = shutil._ntuple_diskusage(10 * needed, 0, needed + LOGS_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    options = (tmp_path / "another", module.trained_parameters(), module.optimizer_config, 1)
    check_disk(*options, of_samples=999, keeps_best=True)
    with pytest.raises(OSError, match="too full"):
        check_disk(*options, of_samples=1000, keeps_best=True)


def test_a_run_that_goes_on_needs_no_room_for_the_checkpoints_that_it_has(
    pipeline_folder, corpus, tmp_path, monkeypatch
):
    module = build_module(pipeline_folder)
    count = sum(parameter.numel() for parameter in module.trained_parameters())
    fit(module, build_data(corpus), tmp_path, 3, callbacks=[checkpoint(1, str(tmp_path / "checkpoints"), 2)])
    free = count * (CHECKPOINT_BYTES_PER_PARAMETER + 8 + EXPORT_BYTES_PER_PARAMETER) + LOGS_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    check_disk(tmp_path, module.trained_parameters(), module.optimizer_config, keep=2)
    with pytest.raises(OSError, match="3 checkpoints"):
        check_disk(tmp_path / "another", module.trained_parameters(), module.optimizer_config, keep=2)
    check_disk(
        tmp_path / "another", module.trained_parameters(), module.optimizer_config, keep=0
    )  # callbacks.checkpoint=null


def test_the_sacrificed_are_named_with_the_remedy(corpus, caplog):
    caplog.set_level(logging.INFO, logger="memtrain.training.checks")

    def said():
        return [record for record in caplog.records if record.name == "memtrain.training.checks"]

    data = build_data(corpus, sacrificed=1)
    warn_of_sacrificed(data, named=False)
    (record,) = said()
    key = data.samples.key(int(data.groups.sacrificed[0]))
    assert record.levelname == "WARNING" and f"the exported model will draw them: {key}. " in record.message
    assert "canaries.sacrificed_keys=[KEY,…]" in record.message and "canaries.sacrificed=0" in record.message
    caplog.clear()
    warn_of_sacrificed(build_data(corpus, sacrificed_keys=[key]), named=True)
    (record,) = said()
    assert record.levelname == "INFO" and key in record.message
    caplog.clear()
    warn_of_sacrificed(build_data(corpus), named=False)
    assert not said()
