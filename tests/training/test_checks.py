"""What can be known to fail before the first step; and what the user should know by then."""

import logging
import shutil

import pytest

from memtrain.training.checkpoint import AsideIO, checkpoint
from memtrain.training.checks import (
    CHECKPOINT_BYTES_PER_PARAMETER,
    EXPORT_BYTES_PER_PARAMETER,
    LOGS_BYTES,
    check_disk,
    warn_of_sacrificed,
)
from tests.conftest import build_data, build_module, fit


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
