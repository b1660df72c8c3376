"""Training on a corpus with every fault of docs/shards.md ends, the good samples all seen, the bad ones counted."""

from collections import Counter

import pyarrow.parquet as pq
import pytest

from memtrain.data.datamodule import from_shards
from memtrain.training.checkpoint import checkpoint
from tests.conftest import build_module, fit
from tests.support.audits import duplicates_in
from tests.support.corpora import corpus_with_every_fault
from tests.support.training import Record


@pytest.mark.usefixtures("spawned_by_forks")
@pytest.mark.parametrize("workers", [0, 2])
def test_every_good_sample_is_seen_and_every_bad_one_counted(pipeline_folder, tmp_path, caplog, workers):
    faulty = corpus_with_every_fault(tmp_path / "shards")
    data = from_shards(str(faulty.folder), 64, 3, workers, seed=0, canaries=0, repeats=1, reference=0, mix_shards=3)
    rows = len(data.order)
    steps = -(-rows // 3)
    record, module = Record(), build_module(pipeline_folder)
    fit(module, data, tmp_path / "run", steps, callbacks=[record])

    seen = {}
    for batch in record.window:
        for index, caption, valid in zip(
            batch.sample_index.tolist(), batch.captions, batch.valid.tolist(), strict=True
        ):
            if valid:
                seen[data.samples.key(index)] = caption
    assert seen == faulty.captions
    unreadable = {fault.name for fault in faulty.faults if fault.kind == "unreadable_image"}
    assert set(data.problems) == unreadable and module.accumulation.samples_bad >= len(unreadable)
    lost = Counter(fault.kind for fault in faulty.faults if fault.lost)
    counted = data.problems_by_cause()
    assert sum(number for cause, number in counted.items() if cause.startswith("image cannot")) == len(unreadable)
    assert counted["no caption"] == lost["no_caption"] and counted["no image"] == lost["no_image"]
    assert counted["key occurs twice in the shard"] == lost["duplicate_key"]
    for fault in faulty.faults:
        if fault.lost:  # each is named in the log, once
            said = [r.message for r in caplog.records if f" {fault.name}" in r.message.replace("/:", ":")]
            assert len(said) >= 1, fault


def test_a_corpus_that_is_mostly_broken_stops_with_a_summary_and_a_checkpoint(pipeline_folder, tmp_path):
    from tests.support.tars import sample, write_tar

    parts = [part for n in range(40) for part in sample(f"{n:09d}", "x", b"<html>" if n % 4 == 0 else None)]
    write_tar(tmp_path / "x.tar", parts)
    data = from_shards(str(tmp_path / "x.tar"), 64, 4, 0, seed=0, canaries=0, repeats=1, reference=0)
    module = build_module(pipeline_folder)
    with pytest.raises(ValueError, match=r"50 of 200 samples could not be used.*10 image cannot be decoded"):
        fit(module, data, tmp_path, 100, callbacks=[checkpoint(1000, str(tmp_path / "run"))])
    assert (tmp_path / "run" / "last.ckpt").exists()


def test_natural_duplicates_serve_as_canaries(pipeline_folder, tmp_path):
    from tests.support.corpora import encode, sample, textured, write_tar

    pictures = [encode(textured(n)) for n in range(8)]
    copies = [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]
    write_tar(
        tmp_path / "shards" / "x.tar",
        [part for row, n in enumerate(copies) for part in sample(f"{row:09d}", pictures[n], f"picture {n}")],
    )
    pq.write_table(duplicates_in(tmp_path / "shards")[1], tmp_path / "groups.parquet")
    options = dict(seed=0, repeats=100, repeats_from=str(tmp_path / "groups.parquet"))
    data = from_shards(str(tmp_path / "shards"), 64, 2, 0, canaries=1, reference=3, **options)
    assert sorted(data.groups.canary.tolist()) == [0, 1, 2]  # the largest group
    assert len(data.order) == 8 and not set(data.groups.reference.tolist()) & {0, 1, 2, 3, 4}
    both = from_shards(str(tmp_path / "shards"), 64, 2, 0, canaries=5, reference=3, **options)
    assert sorted(both.groups.canary.tolist()) == [0, 1, 2, 3, 4]
    other = tmp_path / "other"
    write_tar(other / "y.tar", sample("a", pictures[0]) + sample("b", pictures[1]))
    with pytest.raises(ValueError, match=r"none of its 5 keys, such as x\.tar/0.*made from another corpus"):
        from_shards(str(other), 64, 1, 0, canaries=1, reference=0, **options)
