import json

import pytest

from memtrain.cli.bench import bench
from memtrain.data.bench import LOADERS, measure_loading


def test_bench_data_compares_both_pipelines(capsys):
    bench(["data", "--images", "2", "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["images_per_second"]) == {"Pillow, lanczos", "Pillow, bicubic", "memtrain"}
    assert set(found["speedup"]) == {"Pillow, lanczos", "Pillow, bicubic"}


def test_both_loaders_make_the_batches_of_a_round(tmp_path):
    found = measure_loading(images=32, rounds=1, folder=tmp_path, side=64)
    assert set(found.images_per_second) == set(LOADERS) and min(found.images_per_second.values()) > 0
    assert found.spread == (found.speedup, found.speedup)
    with pytest.raises(ValueError, match="a round loads 16 images at least, got 8"):
        measure_loading(images=8, rounds=1, folder=tmp_path)


def test_start_up_keeps_a_count_per_shard_alone(capsys):
    """Memory and time are for the benchmark; here: nothing that grows with the samples is opened before the batch."""
    bench(["startup", "--shards", "300", "--samples", "1000", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 300_000 and found["first_batch_seconds"] > found["corpus_seconds"] > 0
    bench(["startup", "--shards", "2", "--samples", "50"])
    assert "first batch after" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["data", "--images", "0"], ["startup", "--shards", "0"]])
def test_wrong_counts_are_named(wrong):
    with pytest.raises(ValueError, match=f"{wrong[1]} must be >= 1, got 0"):
        bench(wrong)
