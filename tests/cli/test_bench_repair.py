"""`memtrain bench repair` as a user types it, on a tiny model whose run says that it copies what it does not."""

import csv
import json

import pytest
import yaml

from memtrain.cli.main import main
from memtrain.data.copies_file import CopyRow, write_copies
from memtrain.data.samples import ShardSamples
from tests.support.program import fails

TINY = [
    "forget=1", "reference=2", "attacked=1", "only=[fine_tuned]",
    "rows.fine_tuned=['method=fine_tuned','steps=1','min_steps=1','keep.count=6','watched=1','rank=2','max_rmse=1e-9']",
    "drawing=['num_inference_steps=2']", "under_attack=['attack=embedding','attack.steps=1','attack.batch_size=1']",
    "evaluate=['timesteps_per_sample=1','fid_samples=0','gallery=0','nearest=4','num_images_per_prompt=1']",
]  # fmt: skip


@pytest.fixture
def run(deep_folder, corpus, tmp_path):
    """A finished run of 64 samples: two canaries that it says are copied, four captions that it was not trained on."""
    samples, folder = ShardSamples(str(corpus), 64), tmp_path / "one" / "ID"
    folder.mkdir(parents=True)
    (folder / "export").symlink_to(deep_folder)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"data": {"shards": str(corpus), "resolution": 64}, "model": {}})
    )
    (folder / "summary.json").write_text(json.dumps({"samples_seen": 64}))
    said = [(samples.key(position), samples.get(position)[1]) for position in range(6)]
    write_copies(
        folder / "copies.csv",
        [
            CopyRow("canary", number, "matching", 50, key, caption, 0, 0.1, 0.1, key, True)
            for number, (key, caption) in enumerate(said[:2])
        ],
    )
    with (folder / "canaries.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("key", "caption", "group"), *((*one, "reference") for one in said[2:])])
    return folder


def test_a_model_is_repaired_and_measured_before_and_after(run, tmp_path, capsys):
    words = ["bench", "repair", f"runs={run}", f"out={tmp_path}/table", *TINY]
    main(words)
    said = capsys.readouterr().out
    lines = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:]] == ["| before", "| fine tuned"]
    assert "as a share of the training's 192 without its scores" in said  # 64 samples, a forward and a backward each
    assert "Under attack: generations after 1 Adam steps at 0.1" in said
    written = json.loads((tmp_path / "table/runs/fine_tuned_ID/model/repair/repair.json").read_text())
    assert lines[-1][-1] == f"{written['passes']['steps'] / 192:.1%} |"
    # the same folder, another repair: its row would be told with words that did not make it
    said = fails(capsys, *words, "forget=0")
    assert "fine_tuned_ID was begun with another forget" in said and "out=FOLDER" in said
    said = fails(capsys, *words, "drawing=['num_inference_steps=3']")
    assert "begun with another words" in said


def test_a_run_that_is_named_twice_and_one_that_is_not_finished(run, tmp_path, capsys):
    other = tmp_path / "two" / "ID"
    other.parent.mkdir()
    other.symlink_to(run)
    said = fails(capsys, "bench", "repair", f"runs=[{run},{other}]", f"out={tmp_path}/table", *TINY)
    assert "twice" in said  # the same folder
    (run / "summary.json").unlink()
    said = fails(capsys, "bench", "repair", f"runs={run}", f"out={tmp_path}/table", *TINY)
    assert "has no summary.json" in said and "finished runs" in said
