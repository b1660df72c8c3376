"""A table of baselines: what is planned, what is gone on with, what is kept."""

import os
import signal
from dataclasses import replace

import pytest

from memtrain.report.mitigation import by_row, read_result
from memtrain.sweep.bench import alone, evaluated, write_evaluated
from memtrain.sweep.protocol import Record, Stage, Standing, check_words, next_stage, plan
from tests.support.benches import planned, protocol, quick, run_tiny, tiny

ROWS = {"none": ["exclusion=none", "copies=0.75"], "evidence": ["exclusion=evidence", "copies=0.25"]}


def test_all_rows_of_a_seed_come_before_the_next_and_a_rows_own_words_go_before_others(tmp_path):
    made = protocol(ROWS, "logger=csv", "optimizer.lr=1e-3", seeds=3)
    runs = plan(made, tmp_path, ["evidence", "none"], 2, ["optimizer.lr=1e-4", "exclusion=fixed"])
    assert [run.name for run in runs] == ["evidence_seed0", "none_seed0", "evidence_seed1", "none_seed1"]
    own = ["exclusion=none", "copies=0.75", "seed=1", "data.shards='c'"]
    assert sorted(runs[3].words) == sorted(["logger=csv", "optimizer.lr=1e-4", *own])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rows": ["nine"]}, r"rows names nine, which the protocol has not; it has none, evidence"),
        ({"seeds": 0}, r"seeds must be >= 1, got 0"),
        ({"overrides": ["run_id=x"]}, r"run_id=x: the bench names its runs itself"),
    ],
)
def test_what_cannot_be_planned_is_named(more, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        plan(protocol(ROWS), tmp_path, **more)


def test_what_is_next_for_a_run_is_said_by_its_folder(tmp_path):
    run, other = planned(tmp_path, ROWS, "x=1", evaluate=["attack=embedding"])
    assert next_stage(run) is Stage.TRAIN and "resume" not in " ".join(run.to_train())
    Record(list(run.words)).write(run.folder)
    (run.folder / "config.yaml").write_text(
        "data: {shards: /data/it, resolution: 256, caption: top, where: null}\n"
        "model: {pretrained: /b, t5_padding: zero}\n"
    )
    (run.folder / "summary.json").write_text("{}")
    assert next_stage(run) is Stage.TRAIN and run.to_train()[-1] == f"resume='{run.folder}'"  # it has not ended
    (run.folder / "run.json").write_text('{"finished_at": 4}')
    assert next_stage(run) is Stage.EVALUATE
    told = ["model=/b", f"lora={run.folder}/export", "t5_padding='zero'", "data.caption='top'", "resolution=256"]
    assert run.to_evaluate()[:6] == [*told, "data=/data/it"]  # what it reads and draws is as it was in training
    assert "samples.count=16" in run.to_evaluate()  # as many as the protocol has, not memtrain evaluate
    lists = {
        "copies": ["k,c,canary", "r0,c,reference", "r1,c,reference"],
        "canaries": ["r0,c,reference", "r2,,held_out"],
    }
    for name, rows in lists.items():
        (run.folder / f"{name}.csv").write_text("\n".join(["key,caption,group", *rows]))
    write_evaluated(replace(run, protocol=replace(run.protocol, reference=1)))
    written = (run.folder / "evaluated.csv").read_text().splitlines()[1:]
    assert written == ["k,c,canary", "r0,c,reference", "r2,,held_out"]
    Record(list(run.words), ["attack=embedding"]).write(run.folder)
    assert next_stage(run) is Stage.NOTHING
    assert next_stage(planned(tmp_path, ROWS, "x=1", evaluate=["attack=none"])[0]) is Stage.EVALUATE
    check_words([run, other])
    with pytest.raises(ValueError, match=r"none_seed0 was begun with other words \(x=1, x=2\)"):
        check_words(planned(tmp_path, ROWS, "x=2"))


def test_canaries_with_enough_repeats_are_evaluated_evenly_spread():
    made = protocol(ROWS, min_repeats=20, canaries=2, reference=1)
    rows = [dict(key=f"k{n}{g}", group="canary", canary=str(n), repeats=str(10 * n)) for n in range(7) for g in "ab"]
    rows += [dict(key=f"r{n}", group="reference", canary="", repeats="0") for n in range(2)]
    # by hand: canaries 2 to 6 have 20 repeats and more, of whose five the first and the third are taken
    assert [row["key"] for row in evaluated(rows, made)] == ["k2a", "k4a", "r0"]
    # what a run without copies.csv says of its own
    listed = [dict(key=f"k{n}", group="canary") for n in range(3)] + [dict(key="r", group="reference")]
    assert [row["key"] for row in evaluated(listed, made)] == ["k0", "k1", "r"]


def test_how_long_it_will_take():
    assert Standing(10, 6).seconds_left(2, minutes=1) == 180
    assert Standing(10, 6, seconds=[30, 50]).seconds_left(2, minutes=1) == 120
    assert Standing(10, 6, seconds=[30, 50]).seconds_left(2, minutes=1, gone=40) == 100
    assert Standing(10, 0).seconds_left(2, minutes=1) == 0


def test_a_run_that_fails_is_named_and_stops_no_other(tmp_path):
    runs = planned(tmp_path, {"bad": ["broken=1"], **ROWS}, seeds=2, evaluate=["a=1"])
    bench = quick(tmp_path, runs, workers=2)
    bench.run()
    assert bench.failed == {f"bad_seed{seed}": "training, exit code 2: it is broken" for seed in (0, 1)}
    assert set(bench.finished) == {f"{row}_seed{seed}" for row in ROWS for seed in (0, 1)}
    results = [read_result(run.folder, run.row, run.seed) for run in runs if run.name in bench.finished]
    assert [one.figures.copies for one in by_row(results, ["none"])["none"]] == [0.75, 0.75]
    assert {one.figures.attacked for one in results} == {0.5}
    assert (runs[1].folder / "evaluated.csv").read_text().splitlines()[1:] == [f"k{n},c,canary" for n in range(4)]
    again = quick(tmp_path, planned(tmp_path, ROWS, seeds=2, evaluate=["a=1"]))
    said = [(run.folder / "trial.log").stat() for run in again.runs]
    again.run()  # nothing is made again
    assert len(again.finished) == 4 and said == [(run.folder / "trial.log").stat() for run in again.runs]


def test_evaluations_wait_for_the_training_that_judges_them(tmp_path):
    """It is begun with the first row and ends after it, for it ends when it finds that row trained."""
    judged = dict(evaluate=["a=1"], judge=["waits=none_seed0", "copies=0"], seeds=1)
    runs = planned(tmp_path, ROWS, **judged)
    assert [run.name for run in runs] == ["judge_seed1", "none_seed0", "evidence_seed0"]
    assert [run.evaluation for run in runs] == [[], *[["a=1", f"judge='{runs[0].folder}/export'"]] * 2]
    bench = quick(tmp_path, runs, workers=2)
    bench.run()
    assert not bench.failed and set(bench.finished) == {run.name for run in runs}
    assert all((run.folder / "evaluation").is_dir() == (run.row != "judge") for run in runs)


def test_without_its_judge_nothing_is_evaluated(tmp_path):
    runs = planned(tmp_path, ROWS, evaluate=["a=1"], judge=["broken=1"])
    bench = quick(tmp_path, runs)
    bench.run()
    assert set(bench.failed) == {run.name for run in runs} and not bench.finished
    assert bench.failed["none_seed0"] == f"evaluation: what is to judge it, {runs[0].folder}, is not there"
    assert next_stage(runs[1]) is Stage.EVALUATE  # trained; the same command goes on from here


def test_a_run_that_cannot_be_begun_stops_no_other(tmp_path):
    runs = planned(tmp_path, ROWS)
    runs[0].folder.parent.mkdir()
    runs[0].folder.write_text("where its folder should be")
    bench = quick(tmp_path, runs)
    bench.run()
    assert list(bench.finished) == ["evidence_seed0"] and bench.failed["none_seed0"].startswith("training: ")


def test_two_benches_do_not_work_on_one_table(tmp_path):
    with alone(tmp_path), pytest.raises(ValueError, match="another bench works on out="), alone(tmp_path):
        pass


@pytest.mark.slow
def test_a_bench_that_is_killed_and_started_again_makes_the_same_table(forks, corpus, pipeline_folder, tmp_path):
    """With real trainings, the bench killed by SIGKILL in the first: what it left ends by itself, with a checkpoint."""
    arguments = [str(forks.python), str(corpus), str(pipeline_folder)]
    run_tiny(*arguments, str(tmp_path / "whole"))
    killed = tmp_path / "killed"
    [bench] = forks.start([*arguments, str(killed)], tmp_path / "log", function=run_tiny)
    checkpoints = killed / "runs" / "fixed_seed0" / "checkpoints"
    forks.wait_until(lambda: any(checkpoints.glob("step-*.ckpt")))
    os.kill(bench, signal.SIGKILL)
    assert forks.wait() == [-signal.SIGKILL]
    run_tiny(*arguments, str(killed))
    log = (killed / "runs" / "fixed_seed0" / "run.log").read_text()
    assert "going on from" in log
    found = [
        [read_result(run.folder, run.row, run.seed) for run in tiny(*arguments[1:], str(tmp_path / out))]
        for out in ("whole", "killed")
    ]
    for whole, again in zip(*found, strict=True):
        assert replace(whole.figures, steps_per_second=0) == replace(again.figures, steps_per_second=0)
        assert whole.generations == again.generations and len(whole.generations) > 0
    assert found[0][0].figures.excluded > 0
