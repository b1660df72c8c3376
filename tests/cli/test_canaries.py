"""Listed canaries and foreign pictures, from what is typed to what a run leaves."""

import csv

import pyarrow as pa

from memtrain.audit.suspects import Judged
from memtrain.audit.training_samples import choose
from memtrain.cli.main import main
from memtrain.data.ledger import read_ledger
from memtrain.data.samples import ShardSamples
from memtrain.report.thumbnails import samples_by_key
from tests.support.program import fails, small_run


def test_a_run_with_a_list_and_foreign_pictures(corpus, pipeline_folder, tmp_path, capsys):
    samples = ShardSamples(str(corpus), 64)
    keys = [samples.key(position) for position in range(9)]
    listing = tmp_path / "listed.csv"
    listing.write_text("key,canary,kind\n" + "".join(f"{key},{n // 3},matching\n" for n, key in enumerate(keys)))
    argv = small_run(corpus, pipeline_folder, tmp_path, "run_id=one", steps=3)
    argv = [word for word in argv if not word.startswith(("canaries.", "callbacks.canaries="))]
    argv += [f"canaries.file={listing}", "canaries.count=null", "canaries.repeats=null", "canaries.sacrificed=1"]
    assert "canaries.repeats=100 would plant others" in fails(capsys, *argv, "canaries.repeats=100")
    assert "must be corpus or foreign, got mine" in fails(capsys, *argv, "canaries.source=mine")

    argv += ["canaries.source=foreign", "canaries.foreign_repeats=99", "callbacks.canaries.reference=2"]
    main(argv)
    run = tmp_path / "faults/one"
    with (run / "canaries.csv").open(newline="") as file:
        rows = {row["key"]: row["group"] for row in csv.DictReader(file)}
    assert [key for key, group in rows.items() if group == "canary"] == keys[::3]
    assert [key for key, group in rows.items() if group == "sacrificed"] == ["foreign/000000"]
    assert "will draw them: foreign/000000; canaries.source=foreign has them" in (run / "run.log").read_text()
    assert "foreign/000000" in read_ledger(run).to_table()["key"].to_pylist()
    # what looks keys up in the shards does without
    chosen = choose(samples, str(run / "canaries.csv"), "group", 9, seed=0)
    assert set(chosen.groups) == {"canary", "reference"}
    pictures, none = pa.table({"key": [keys[1], "foreign/000000"]}), pa.array([], pa.string())
    judged = Judged(pictures, pa.table({"key": none, "duplicate_of": none}), 2, 1, 1.0, 1, has_reference=True)
    assert judged.every_sample(pictures)["key"].to_pylist() == [keys[1]]
    config = {"data": {"shards": str(corpus), "resolution": 64, "caption": "txt"}}
    assert samples_by_key(config, ["foreign/000000"]) == ({}, None)

    listing.write_text(listing.read_text().replace("2,matching", "1,matching"))
    assert "names has changed since" in fails(
        capsys, *argv, "trainer.max_steps=4", f"resume={run}", "resume.allow=[trainer]"
    )
