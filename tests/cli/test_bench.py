"""`memtrain bench mitigation` as a user types it."""

import csv

import pytest
import yaml

from memtrain.cli import bench_mitigation
from memtrain.cli.arguments import spelled
from memtrain.cli.main import config_folder, main
from tests.support.program import fails

CONF = config_folder() / "protocol"
TINY = [
    "data.resolution=64", "data.batch_size=4", "data.num_workers=0", "trainer=cpu", "trainer.max_steps=2",
    "canaries.count=3", "canaries.repeats=4", "canaries.file=null", "reference.count=8", "reference.batch_size=4",
    "optimizer.warmup_steps=0",
    "callbacks.copies.num_inference_steps=2", "callbacks.copies.num_images_per_prompt=1",
    "callbacks.copies.reference=2", "callbacks.copies.shown=0", "callbacks.validation.timesteps_per_sample=2",
    *(f"callbacks.{name}=null" for name in ("sample_grid", "memorized_table", "report")),
    "protocol.evaluate=[attack=embedding,attack.steps=1,attack.batch_size=1,num_images_per_prompt=1,"
    "num_inference_steps=2,timesteps_per_sample=2,fid_samples=8,gallery=0]",
    "protocol.canaries=2", "protocol.reference=2",
]  # fmt: skip


def test_what_is_said_beside_the_benchs_own_keys_is_for_the_runs():
    own = ["protocol=demo", "rows=[none]", "seeds=2", "workers=1"]
    assert spelled("bench_mitigation", [*own, "trainer.max_steps=3"]) == [r"overrides=['trainer.max_steps=3']", *own]
    words = "+protocol.rows.mine=[exclusion=fixed,score.timesteps=[700,1000],model.pretrained=/a b]"
    assert spelled("bench_mitigation", [words]) == [
        "+protocol.rows.mine=['exclusion=fixed','score.timesteps=[700,1000]','model.pretrained=/a b']"
    ]


def test_a_plan_is_printed_and_nothing_is_started(capsys, tmp_path):
    out = tmp_path / "out"
    mine = "+protocol.rows.mine=[exclusion=fixed,exclusion.threshold=3]"
    main(
        [
            "bench",
            "mitigation",
            "rows=[none,mine]",
            mine,
            "seeds=2",
            f"out={out}",
            "workers=2",
            "dry_run=true",
            "protocol.minutes=5",
        ]
    )
    said = capsys.readouterr().out
    assert "mine_seed1: training" in said and "exclusion.threshold=3" in said and "seed=1" in said
    assert "judge_seed3: training" in said
    assert "5 runs, 5 of them to be made, 2 at a time: about 12 min" in said and not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rows=[nine]"], "rows names nine, which the protocol has not; it has none, "),
        (["rows=[none]", "trainer.max_stepz=3"], "row none: "),
        (["rows=[none]", "run_id=x"], "run_id=x: the bench names its runs itself"),
        (["rows=[none]", "protocol.evaluate=[atack=embedding]"], "protocol.evaluate: "),
        (["protocol=wen2024"], "the protocol has no corpus of its own; name yours with shards=FOLDER"),
        (["protocol=laion10k"], "the protocol has no corpus of its own; name yours with shards=FOLDER"),
        (["shards=mine"], "shards=mine: the protocol has a corpus of its own, data/demo; say protocol.corpus=FOLDER"),
        (["shards=data"], "shards=data: the protocol has a corpus of its own"),  # though `data` is a part of its name
        (["rows=[none]", "adapter=lora"], "judge: its training exports an adapter alone"),
        (["rows=[none]", "protocol.corpus=gone", "protocol.make=[]"], "data.shards=gone"),
        (["rows=[none]", "data.caption=alt"], "row none trains on data.caption=alt, protocol.cache=['model=demo'"),
        (["rows=[none]", "protocol.cache=[modle=demo]"], "protocol.cache: "),
        (["rows=[none]", "protocol.judge=[trainer.max_stepz=3]"], "row judge: "),
        (["workers=many", "rows=[none]"], "workers must be >= 1 or auto, got many"),
        (["into=nowhere.md"], "into=nowhere.md has no line <!-- mitigation: begin -->"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(words, said, capsys, tmp_path):
    assert said in fails(capsys, "bench", "mitigation", f"out={tmp_path}/out", *words)
    assert not (tmp_path / "out").exists()


def test_two_protocols_say_the_same_to_a_run_but_for_pictures_and_canaries():
    """So that what is shown of the one, below, holds for the other."""
    first, second = (yaml.safe_load((CONF / f"{name}.yaml").read_text()) for name in ("laion10k", "imagenette"))
    assert {word.split("=")[0] for word in first["words"]} == {word.split("=")[0] for word in second["words"]}
    assert first["evaluate"] == second["evaluate"] and second["rows"].items() <= first["rows"].items()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["laion10k", "wen2024"])
def test_a_published_protocol_runs_from_its_corpus_to_its_table(
    protocol, forks, corpus, pipeline_folder, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(bench_mitigation, "_PROGRAM", [str(forks.python), "-m", "memtrain.cli.main"])
    out, text = tmp_path / "out", tmp_path / "text.md"
    text.write_text("before\n<!-- mitigation: begin -->\n<!-- mitigation: end -->\nafter\n")
    words = [f"protocol={protocol}", f"shards={corpus}", f"out={out}", f"into={text}", "rows=[none]", "seeds=1"]
    if protocol == "laion10k":
        words.append(f"protocol.make=[shards,draw,${{shards}},{out}/corpus,--count,40]")
        words.append(f"protocol.cache=[model.pretrained={pipeline_folder},data.resolution=64,data.flip=0.5]")
        words.append("protocol.judge=[exclusion=none,callbacks.copies=null]")
    main(["bench", "mitigation", *words, "workers=1", f"model.pretrained={pipeline_folder}", *TINY])
    [row] = csv.DictReader((out / "results.csv").read_text().splitlines())
    assert row["row"] == "none" and float(row["heldout_loss"]) > 0
    assert all(row[name] for name in ("attacked", "reference_attacked", "kernel_distance", "nearest", "copies"))
    judged = protocol == "laion10k"
    assert bool(row["caption_margin"]) == judged == (out / "runs" / "judge_seed3").is_dir()
    assert "| none | 1 |" in text.read_text() and text.read_text().endswith("after\n")
    assert (out / "plane.png").is_file() and (out / "table.md").read_text().strip() in capsys.readouterr().out
    assert (out / "corpus").is_dir() == (protocol == "laion10k")
