"""A run whose canaries are the corpus' own duplicates: every count is of pictures, every list names all samples."""

import csv
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from memtrain.audit.suspects import judge
from memtrain.cli.ledger import ledger
from memtrain.cli.main import main
from memtrain.data.datamodule import from_shards
from memtrain.data.ledger import read_ledger
from memtrain.data.samples import ShardSamples
from tests.support.corpora import encode, sample, textured, write_tar
from tests.support.program import small

# what each sample shows: picture 0 five times, 1 four times, 2 three times, 24 others once
SHOWS = [0, 1, 2, 0, 1, *range(3, 15), 0, 2, 0, 1, *range(15, 27), 1, 2, 0]
STEPS = 30


def key(position: int) -> str:
    return f"00000.tar/{position:03d}"


def samples_of(picture: int) -> list[str]:
    return [key(position) for position, shown in enumerate(SHOWS) if shown == picture]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("natural") / "shards"
    parts = [sample(f"{n:03d}", encode(textured(shown)), f"picture {shown}") for n, shown in enumerate(SHOWS)]
    write_tar(folder / "00000.tar", [member for part in parts for member in part])
    return folder


def settings(shards, pipeline, tmp_path, **others) -> list[str]:
    return [
        *small(shards, pipeline, tmp_path),
        "data.resolution=64",
        "canaries.count=2",
        "canaries.repeats=null",
        "reference.count=10",
        "reference.every=1",
        "loss.caption_dropout=0",
        f"trainer.max_steps={STEPS}",
        "callbacks.validation.every=30",
        "callbacks.checkpoint.every=30",
        "callbacks.copies.every=0",
        "callbacks.copies.num_images_per_prompt=2",
        "callbacks.copies.reference=2",
        "callbacks.memorized_table.num_inference_steps=2",
        "callbacks.memorized_table.num_images_per_prompt=1",
        *(f"{name.replace('__', '.')}={value}" for name, value in others.items()),
    ]


@pytest.fixture(scope="module")
def run(shards, pipeline_folder, tmp_path_factory):
    """The second largest group is sacrificed, by the name of its last sample."""
    folder = tmp_path_factory.mktemp("run")
    main(settings(shards, pipeline_folder, folder, canaries__sacrificed_keys=f"[{samples_of(1)[-1]}]"))
    return folder / "runs/demo/one"


def test_canaries_are_listed_once_a_picture(run):
    with (run / "canaries.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["key"], row["group"]) for row in csv.DictReader(file) if row["group"] != "reference"]
    assert rows == [(samples_of(0)[0], "canary"), (samples_of(1)[0], "sacrificed")]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["canaries"] == {
        "canary": {"pictures": 1, "samples": 5},
        "sacrificed": {"pictures": 1, "samples": 4},
    }
    assert list(summary["memorized_at"]) == [samples_of(0)[0], samples_of(1)[0]]
    assert summary["copy_rate"]["sacrificed"] is not None


def test_the_log_names_the_sacrificed_at_the_start(run):
    said = (run / "run.log").read_text()
    assert f"the exported model will draw them: {samples_of(1)[0]} (4 samples); canaries.sacrificed_keys names" in said


def test_the_ledger_judges_pictures(run, capsys):
    judged = judge(run)
    rows = {row["key"]: row for row in judged.table.to_pylist()}
    names, visits = read_ledger(run).to_table()["key"].to_pylist(), {}
    for name in names:
        visits[name] = visits.get(name, 0) + 1
    for picture, group in ((0, "canary"), (1, "sacrificed"), (2, "train")):
        row = rows[samples_of(picture)[0]]
        assert (row["group"], row["samples"]) == (group, len(samples_of(picture)))
        assert row["visits"] == sum(visits[name] for name in samples_of(picture))
        assert not rows.keys() & set(samples_of(picture)[1:])
    ledger(["show", str(run)])
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if samples_of(0)[0] in line)
    assert re.split(r"\s+", line.strip())[1:3] == ["canary", "5"] and "count as one picture" in said


def test_a_list_of_suspects_leaves_out_every_copy(run, shards, tmp_path, capsys):
    out = tmp_path / "list.parquet"
    ledger(["suspects", str(run), "--out", str(out), "--false-positive-rate", "0.9"])
    assert "WARNING" not in capsys.readouterr().err
    listed = pq.read_table(out)
    named = set(listed["key"].to_pylist())
    pictures = {SHOWS[int(name.split("/")[1])] for name in named}
    assert named == {name for picture in pictures for name in samples_of(picture)} and len(listed) == len(named)
    assert pictures & {0, 1, 2}
    left = ShardSamples(str(shards), 64, exclude_keys=str(out))
    assert not pictures & {SHOWS[int(left.key(n).split("/")[1])] for n in range(len(left))}


def test_copies_that_a_short_run_has_not_seen_are_listed_too(run, shards, tmp_path, capsys):
    """Of a ledger of a share of the rows, that does not name all samples; and of one whose shards are gone."""
    some = tmp_path / "some"
    (some / "ledger").mkdir(parents=True)
    table = pq.read_table(next((run / "ledger").glob("*.parquet")))
    last = [samples_of(picture)[-1] for picture in (0, 1, 2)]
    unseen = np.isin(table["key"].to_numpy(zero_copy_only=False), last)
    pq.write_table(table.filter(~unseen), some / "ledger/rank0-000001.parquet")
    (some / "config.yaml").write_text((run / "config.yaml").read_text())
    judged, out = judge(some), tmp_path / "list.parquet"
    assert not set(last) & set(judged.keys["key"].to_pylist())
    ledger(["suspects", str(some), "--out", str(out), "--false-positive-rate", "0.999"])
    named = set(pq.read_table(out)["key"].to_pylist())
    for picture in (0, 1, 2):
        assert set(samples_of(picture)) <= named or not set(samples_of(picture)) & named
    assert {0, 1, 2} & {SHOWS[int(name.split("/")[1])] for name in named}
    (some / "config.yaml").unlink()
    ledger(["suspects", str(some), "--out", str(tmp_path / "less.parquet"), "--false-positive-rate", "0.999"])
    assert "the corpus was not asked" in capsys.readouterr().err


def test_the_report_says_how_many_samples_a_picture_is(run):
    text = re.sub(r"\s+", " ", (run / "report.html").read_text(encoding="utf-8"))
    assert "5 samples of this picture" in text and "4 samples of this picture" in text
    assert re.search(r"of \d+ ordinary training pictures \(\d+ samples\) look memorized", text)
    assert "of 2 canaries (9 samples) look memorized" in text
    assert "The exported model draws the 1 sacrificed canary, which no rule may exclude" in text


def test_a_planted_canary_can_be_named_too(shards, pipeline_folder, tmp_path, capsys):
    planted = dict(canaries__repeats=4, trainer__max_steps=2, callbacks__copies="null", callbacks__export="null")
    planted |= dict(callbacks__memorized_table="null", callbacks__sample_grid="null", callbacks__report="null")
    main(settings(shards, pipeline_folder, tmp_path, canaries__sacrificed_keys=f"[{key(7)}]", **planted))
    with (tmp_path / "runs/demo/one/canaries.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["key"], row["group"]) for row in csv.DictReader(file)]
    assert (key(7), "sacrificed") in rows and [group for _, group in rows].count("canary") == 1
    with pytest.raises(SystemExit):
        main(settings(shards, pipeline_folder, tmp_path, canaries__sacrificed_keys="[00000.tar/nowhere]", **planted))
    assert "no sample 00000.tar/nowhere in data.shards" in capsys.readouterr().err


def test_drawn_ones_are_the_most_frequent(shards):
    data = from_shards(str(shards), 64, 2, 0, seed=0, canaries=2, repeats=None, reference=4, sacrificed=1)
    assert [data.samples.key(int(n)) for n in data.groups.sacrificed] == samples_of(0)
