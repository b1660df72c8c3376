"""`memtrain train -m`: each job a run of its own, whichever of Hydra's launchers starts it."""

import json
import os
import pickle
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

import memtrain
from memtrain.cli import jobs
from memtrain.training.resume import checkpoints_in
from tests.support import slurm
from tests.support.forks import PATIENCE, wait_until
from tests.support.program import fails, small_run

REPO = Path(__file__).resolve().parents[2]


class Jobs:
    """`memtrain train -m` with some thresholds, as a program of its own; its runs are `faults/mine-N`.

    `python` is what it and its jobs are started with.
    """

    def __init__(self, python: Path, folder: Path, corpus: Path, pipeline: Path, *more: str, **environment: str):
        self.folder = folder / "runs" / "faults"
        more = ("exclusion=fixed", "logger=[csv,wandb]", *more)
        train, *words = small_run(corpus, pipeline, folder / "runs", *more, steps=5000)
        self.command = [python, "-m", "memtrain.cli.main", train, "-m", *words]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_", "WANDB_SERVICE"))}
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "MEMTRAIN_RUN_ID": "mine"}
        self.environment = inherited | own | environment
        self.log = folder / "log"
        self.started: list[subprocess.Popen] = []

    def start(self, *more: str) -> subprocess.Popen:
        with self.log.open("w") as log:
            process = subprocess.Popen([*self.command, *more], env=self.environment, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def end(self) -> None:
        """What a test that failed has left going on."""
        for process in self.started:
            process.terminate()
            process.wait(PATIENCE)

    def saved(self, job: int) -> list[int]:
        return list(checkpoints_in(self.folder / f"mine-{job}" / "checkpoints"))

    def wait(self, process: subprocess.Popen, *begun: int, enough=all) -> None:
        """Until these jobs have a checkpoint."""
        wait_until(lambda: enough(map(self.saved, begun)) or process.poll() is not None)
        assert process.poll() is None, self.log.read_text()

    def check(self, *thresholds: float, steps: int) -> None:
        """Each is a whole run with its own threshold, ledger and W&B id."""
        ids = set()
        for job, threshold in enumerate(thresholds):
            run = self.folder / f"mine-{job}"
            state = json.loads((run / "run.json").read_text())
            config = yaml.safe_load((run / "config.yaml").read_text())
            assert (state["finished_at"], config["exclusion"]["threshold"]) == (steps, threshold)
            assert set(memtrain.read_ledger(run).to_table()["step"].to_pylist()) == set(range(steps))
            ids |= {state["wandb_id"] or run.name}
            ids |= {path.name.rsplit("-", 1)[1] for path in run.glob("wandb/offline-run-*")}
        assert len(ids) == len(thresholds)


@pytest.fixture
def jobs_of(forks, corpus, pipeline_folder, tmp_path):
    made: list[Jobs] = []
    yield (
        lambda *more, **environment: (
            made.append(Jobs(forks.python, tmp_path, corpus, pipeline_folder, *more, **environment)) or made[0]
        )
    )
    for one in made:
        one.end()


@pytest.mark.slow
def test_joblib_stops_all_jobs_and_goes_on_with_each(jobs_of):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    several = jobs_of("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = several.start("exclusion.threshold=1,3")
    several.wait(process, 0, 1)
    process.send_signal(signal.SIGTERM)  # the program alone: it tells its jobs
    assert process.wait(PATIENCE) == 143, several.log.read_text()
    said = several.log.read_text()
    assert "the same command with MEMTRAIN_RUN_ID=mine goes on" in said and "Traceback" not in said
    stopped = [several.saved(job)[-1] for job in (0, 1)]
    steps = max(stopped) + 2
    more = [f"trainer.max_steps={steps}", "resume.allow=[trainer.max_steps]", "logger=csv"]
    assert several.start("exclusion.threshold=1,3,-2", *more).wait(PATIENCE) == 2
    said = several.log.read_text()
    assert all(f"mine-{job}/checkpoints/step-{step:08d}.ckpt" in said for job, step in enumerate(stopped))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: exclusion.threshold must be > 0, got -2; use exclusion=none to keep every sample"]
    assert "Traceback" not in said and not (several.folder / "mine-2").exists()
    several.check(1, 3, steps=steps)


@pytest.mark.slow
def test_submitit_runs_jobs_on_this_machine(jobs_of):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    several = jobs_of("hydra/launcher=submitit_local", "trainer.max_steps=2", "logger=csv")
    assert several.start("exclusion.threshold=1,3").wait(PATIENCE) == 0, several.log.read_text()
    several.check(1, 3, steps=2)


@pytest.mark.slow
def test_jobs_of_slurm_go_back_into_the_queue_and_on_with_their_run(jobs_of, tmp_path):
    """One gets submitit's signal, for its time is over; SLURM preempts the other."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    cluster = slurm.install(tmp_path / "slurm")
    several = jobs_of("hydra/launcher=slurm", "trainer.max_steps=40", "logger=csv", **cluster)
    process = several.start("exclusion.threshold=1,3")
    try:
        wait_until(lambda: len(list(Path(cluster["STAND_IN_JOBS"]).iterdir())) == 2)
        first, second = (folder.name for folder in sorted(Path(cluster["STAND_IN_JOBS"]).iterdir()))
        orders = {0: ("scancel", "--signal=USR2", first), 1: ("scontrol", "requeue", second)}
        while orders:
            several.wait(process, *orders, enough=any)
            for job in [job for job in orders if several.saved(job)]:
                subprocess.run(orders.pop(job), env=several.environment, check=True)
        assert process.wait(PATIENCE) == 0, several.log.read_text()
        wait_until(lambda: all(slurm.state(cluster, job) == "COMPLETED" for job in (first, second)))
    finally:
        slurm.shut_down(cluster)
    codes = [(Path(cluster["STAND_IN_JOBS"]) / job / "codes").read_text() for job in (first, second)]
    # submitit's handler asks for the requeue and exits with 255, unless the SIGTERM of the requeue is there before
    assert codes[0] in ("[255]\n[0]\n", "[143]\n[0]\n") and codes[1] == "[143]\n[0]\n"
    several.check(1, 3, steps=40)


def test_one_name_for_all_jobs_is_refused(capsys, monkeypatch):
    monkeypatch.delenv("MEMTRAIN_RUN_ID", raising=False)
    assert "run_id=one is for one run" in fails(capsys, "train", "-m", "run_id=one", "seed=1,2")
    jobs.check(["run_id=a,b", "run_dir=runs/${seed}", "seed=1,2"])


@pytest.mark.parametrize(("launcher", "extra"), [("joblib", "joblib"), ("slurm", "submitit")])
def test_a_launcher_that_is_not_there_is_named(capsys, monkeypatch, launcher, extra):
    monkeypatch.setattr(jobs, "_is_installed", lambda module: False)
    assert f"pip install '.[{extra}]'" in fails(capsys, "train", "-m", f"hydra/launcher={launcher}", "seed=1,2")
    monkeypatch.setattr(jobs, "_is_installed", lambda module: True)
    monkeypatch.setattr(jobs.shutil, "which", lambda program: None)
    if launcher == "slurm":
        assert "there is no srun here" in fails(capsys, "train", "-m", f"hydra/launcher={launcher}", "seed=1,2")


def test_a_stop_comes_back_from_another_process():
    assert pickle.loads(pickle.dumps(jobs.Stopped(143))).code == 143


def test_joblibs_processes_share_the_gpus(monkeypatch):
    def gpu_of(process: str, named: str | None) -> str | None:
        monkeypatch.setattr(jobs.multiprocessing.current_process(), "name", process)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if named is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        jobs._take_a_gpu()
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # put back at the end
    assert [gpu_of(f"LokyProcess-{n}", None) for n in (1, 2, 3)] == ["0", "1", "0"]
    assert [gpu_of(f"LokyProcess-{n}", "5,7") for n in (1, 2)] == ["5", "7"]
    assert gpu_of("MainProcess", "5,7") == "5,7" and gpu_of("LokyProcess-1", "") == ""


def test_tasks_that_submitit_starts_here_are_no_ranks(monkeypatch):
    monkeypatch.setenv("SUBMITIT_LOCAL_NTASKS", "2")
    with pytest.raises(ValueError, match="tasks_per_node=2"):
        jobs._check_tasks()
