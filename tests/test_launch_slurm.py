"""launch/slurm.sbatch on the SLURM of tests/support/slurm.py: stopped, put back into the queue, gone on."""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import memtrain
from memtrain.training.resume import checkpoints_in
from tests.support import slurm
from tests.support.forks import wait_until
from tests.support.program import small_run

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "launch" / "slurm.sbatch"

PROGRAM = '#!/bin/sh\nexec "{python}" -m tests.support.slow_to_end "$@"\n'


class Cluster:
    """A checkout on a cluster; `program` is its .venv/bin/memtrain."""

    def __init__(self, folder: Path, program: str):
        self.folder = folder / "a checkout"
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        installed = self.folder / ".venv" / "bin" / "memtrain"
        installed.write_text(program)
        installed.chmod(0o755)
        ours = ("MEMTRAIN_RUN_ID", "WANDB_SERVICE")  # W&B's process of these tests, too, is not the job's
        inherited = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("SLURM_")}
        self.environment = (
            inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)} | slurm.install(folder / "slurm")
        )

    def call(self, *command: str) -> str:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def parts(self, *words: str) -> str:
        """The number of the job that merges what an array has done."""
        script = str(REPO / "launch" / "array.sbatch")
        array = self.call("sbatch", "--parsable", "--array=1-3", script, *words).strip()
        return self.call("sbatch", "--parsable", f"--dependency=afterok:{array}", script, *words).strip()

    def submit(self, *words: str) -> None:
        said = self.call("sbatch", "--nodes=1", "--ntasks-per-node=2", str(SCRIPT), *words)
        self.job = re.fullmatch(r"Submitted batch job (\d+)\n", said)[1]

    def wait(self) -> int:
        """The job's exit code."""
        wait_until(lambda: slurm.state(self.environment, self.job) in ("COMPLETED", "FAILED"))
        return int(self.note("code"))

    def note(self, name: str) -> str:
        path = Path(self.environment["STAND_IN_JOBS"]) / self.job / name
        return path.read_text() if path.exists() else ""

    def said(self) -> str:
        return (self.folder / f"slurm-{self.job}.out").read_text()


@pytest.fixture
def cluster(tmp_path):
    made = []
    yield lambda program: made.append(Cluster(tmp_path, program)) or made[0]
    for one in made:
        slurm.shut_down(one.environment)


def test_bash_reads_the_batch_script_and_slurm_its_lines():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    asked = {n: line for n, line in enumerate(lines) if line.startswith("#SBATCH")}
    assert max(asked) < first_command  # SLURM reads no further
    options = dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?(?: +#.*)?", line).groups() for line in asked.values())
    assert {"nodes", "ntasks-per-node", "requeue", "signal"} <= options.keys()
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # a rank a GPU, as Lightning asks
    assert options["signal"].startswith("USR1@") and options["job-name"] not in ("bash", "interactive")


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (2, 1), (75, 2), (143, 1)])
def test_a_job_whose_first_task_asks_for_it_goes_back_into_the_queue(cluster, tmp_path, code, starts):
    note = f'echo "${{SLURM_RESTART_COUNT:-0}} $SLURM_PROCID $@" >>"{tmp_path}/tasks"'
    first = f'[ -n "$SLURM_RESTART_COUNT" ] || [ "$SLURM_PROCID" -gt 0 ] || exit {code}'
    cluster = cluster(f"#!/bin/sh\n{note}\n{first}\n")
    cluster.submit("experiment=demo", "a=b c")
    assert cluster.wait() == (0 if starts == 2 else code), cluster.said()
    tasks = sorted((tmp_path / "tasks").read_text().splitlines())
    started = [f"{start} {rank} train" for start in range(starts) for rank in range(2)]
    assert [" ".join(task.split()[:3]) for task in tasks] == started
    assert all("resume=auto" in task and "experiment=demo a=b c" in task for task in tasks)


def test_an_array_does_a_command_in_parts_and_merges_them(cluster, forks, corpus, tmp_path):
    cluster = cluster(f'#!/bin/sh\nexec "{forks.python}" -m memtrain.cli.main "$@"\n')
    shards = tmp_path / "shards"
    shutil.copytree(corpus, shards)
    job = cluster.parts("shards", "index", str(shards), "workers=1", "--no-hashes")
    wait_until(lambda: slurm.state(cluster.environment, job) in ("COMPLETED", "FAILED"))
    said = {path.name: path.read_text() for path in cluster.folder.glob("slurm-*.out")}
    assert len(list(shards.glob("*.index.npy"))) == 3, said
    assert "in 3 shards" in said.pop(f"slurm-{job}.out")
    assert len(said) == 3 and all("indexed 16 samples in 1 shards" in text for text in said.values()), said


@pytest.mark.slow
def test_a_training_whose_time_is_over_and_that_is_preempted_goes_on_as_one_run(
    cluster, forks, corpus, pipeline_folder, tmp_path
):
    """SIGUSR1 to the tasks, requeued by the script; then SIGTERM and requeued by SLURM; then to its end."""
    cluster = cluster(PROGRAM.format(python=forks.python))
    words = small_run(corpus, pipeline_folder, tmp_path / "runs", steps=24)[1:]
    words = [word for word in words if not word.startswith(("name=", "logger=", "data.batch_size="))]
    cluster.submit(*words, "logger=[csv,wandb]", "data.batch_size=2")
    folder = tmp_path / "runs" / f"slurm-{cluster.job}" / f"slurm-{cluster.job}-0"

    def saved() -> list[int]:
        return list(checkpoints_in(folder / "checkpoints"))

    wait_until(lambda: saved() or cluster.note("code"))
    cluster.call("scancel", "--signal=USR1", cluster.job)
    wait_until(lambda: cluster.note("codes") or cluster.note("code"))
    assert cluster.note("codes") == "[75, 0]\n", cluster.said()
    stopped = saved()[-1]
    wait_until(lambda: saved()[-1] > stopped or cluster.note("code"))
    assert f"going on from {folder}/checkpoints/step-{stopped:08d}.ckpt" in cluster.said()
    cluster.call("scontrol", "requeue", cluster.job)
    assert cluster.wait() == 0, cluster.said()
    assert cluster.note("codes") == "[75, 0]\n[143, 0]\n[0, 0]\n"
    assert json.loads((folder / "run.json").read_text())["finished_at"] == saved()[-1] == 24
    (identity,) = {path.name.rsplit("-", 1)[1] for path in (folder / "wandb").glob("offline-run-*")}
    assert identity == json.loads((folder / "run.json").read_text())["wandb_id"]
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 3
    ledger = memtrain.read_ledger(folder).to_table(columns=["step", "key", "timestep"]).to_pylist()
    assert max(Counter(tuple(row.values()) for row in ledger).values()) == 1
    assert {row["step"] for row in ledger} == set(range(24))
