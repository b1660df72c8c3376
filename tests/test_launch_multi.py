"""Many ranks: what launchers say is understood, and launch/ says what launchers and memtrain take."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pyarrow.compute as pc
import pytest
import pytorch_lightning as pl
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

import memtrain
from memtrain.cli import schema
from memtrain.cli.arguments import spelled
from memtrain.cli.launcher import new_run_id, nodes, processes_per_node
from memtrain.cli.main import config_folder
from memtrain.training.resume import checkpoints_in
from tests.support.forks import PATIENCE, wait_until
from tests.support.program import small, small_run

REPO = Path(__file__).resolve().parents[1]
LAUNCH = REPO / "launch"

# The second task on the second of two nodes, two tasks each.
SRUN = {
    "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "memtrain", "SLURM_NNODES": "2",
    "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_NODELIST": "node[1-2]",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1",
    "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
}  # fmt: skip


@pytest.fixture
def said(monkeypatch):
    """Sets the environment as a launcher would."""
    monkeypatch.delenv("MEMTRAIN_RUN_ID", raising=False)
    for name in [*SRUN, *TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE"]:
        monkeypatch.delenv(name, raising=False)

    def say(environment: dict[str, str]) -> None:
        monkeypatch.delenv("MEMTRAIN_RUN_ID", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return say


def composed(overrides: list[str]):
    schema.register()
    OmegaConf.register_new_resolver("memtrain.devices", processes_per_node, replace=True)
    OmegaConf.register_new_resolver("memtrain.nodes", nodes, replace=True)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", overrides)


# ---- what launchers say


@pytest.mark.parametrize(("environment", "kind"), [(SRUN, SLURMEnvironment), (TORCHRUN, TorchElasticEnvironment)])
def test_the_trainer_has_the_ranks_that_the_launcher_started(said, environment, kind, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # the trainer sets it, for all who come after
    said(environment)
    settings = composed(["trainer=cpu"]).trainer
    trainer: pl.Trainer = instantiate(settings, logger=False, enable_checkpointing=False)
    strategy = trainer.strategy
    assert isinstance(strategy.cluster_environment, kind)
    assert (trainer.num_nodes, trainer.num_devices, strategy.cluster_environment.global_rank()) == (2, 2, 3)


def test_without_a_launcher_ddp_takes_all_gpus_and_the_others_one_device(said):
    assert composed(["trainer=ddp"]).trainer.devices == -1
    assert [composed([f"trainer={name}"]).trainer.devices for name in ("auto", "cpu", "gpu")] == [1, 1, 1]
    assert composed(["trainer=ddp"]).trainer.num_nodes == 1


def test_tasks_of_one_step_share_a_run_id_which_a_requeued_job_has_again(said):
    found = []
    for rank, restarts in (("0", "0"), ("3", "0"), ("0", "1")):
        said(SRUN | {"SLURM_PROCID": rank, "SLURM_RESTART_COUNT": restarts})
        found.append(new_run_id())
    assert len(set(found)) == 1 and "4242" in found[0]
    said(SRUN | {"SLURM_STEP_ID": "1"})
    assert new_run_id() != found[0]  # the next srun of the same job is another run


def test_in_a_shell_that_srun_opened_each_run_has_its_own_id_and_all_gpus(said):
    found = []
    for _ in range(2):
        said(SRUN | {"SLURM_JOB_NAME": "bash", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"})
        found.append(new_run_id())
    assert len(set(found)) == 2 and composed(["trainer=ddp"]).trainer.devices == -1


def test_a_run_id_that_is_given_stands(said):
    said(SRUN | {"MEMTRAIN_RUN_ID": "mine"})
    assert new_run_id() == "mine"


# ---- scripts


@pytest.fixture
def checkout(forks, tmp_path) -> Path:
    """launch/ in a folder of its own, with a .venv in which memtrain is installed: that of these tests."""
    root = tmp_path / "a checkout"
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    shutil.copytree(LAUNCH, root / "launch")
    shutil.copy(REPO / "pyproject.toml", root)
    calls = {"python": "", "memtrain": "-m memtrain.cli.main", "torchrun": "-m torch.distributed.run"}
    for program, call in calls.items():
        (programs / program).write_text(f'#!/bin/sh\nexec {shlex.quote(str(forks.python))} {call} "$@"\n')
        (programs / program).chmod(0o755)
    stamp = 'printf "%s\\n%s\\n" "$repo" "$(fingerprint)" >"$venv/memtrain-installed"'
    subprocess.run(["bash", "-c", f"source launch/common.sh; {stamp}"], cwd=root, check=True)
    return root


@pytest.mark.slow
def test_two_torchrun_agents_as_two_nodes_train_as_one_process(forks, checkout, pipeline_folder, corpus, tmp_path):
    """`bash launch/torchrun_node.sh` twice on loopback: one run folder, and the losses of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    said = [word for word in small(corpus, pipeline_folder, tmp_path)[1:] if not word.startswith("run_id=")]
    without = ("copies", "sample_grid", "memorized_table", "export", "report")
    said += [f"callbacks.{name}=null" for name in without] + [
        "trainer=cpu",
        "trainer.max_steps=4",
        "logger=tensorboard",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "MEMTRAIN_RUN_ID"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "ENDPOINT": endpoint, "NPROC": "1"}
    environment["PYTHON_EXEC"] = str(forks.python)  # what torchrun starts ranks with
    agents = [
        subprocess.Popen(
            ["bash", checkout / "launch/torchrun_node.sh", *said, "name=two", "data.batch_size=4"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    codes, said_alone = forks.run(["train", *said, "name=one", "data.batch_size=8", "run_id=1"], tmp_path / "log")
    said_by = [agent.communicate(timeout=PATIENCE)[0] for agent in agents]
    assert codes == [0], said_alone
    assert [agent.returncode for agent in agents] == [0, 0], said_by
    (folder,) = (tmp_path / "runs" / "two").iterdir()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "runs/one/1")]
    assert summaries[0]["samples_seen"] == summaries[1]["samples_seen"] == 32
    assert abs(summaries[0]["heldout_loss"] - summaries[1]["heldout_loss"]) < 1e-5
    tables = []
    for path in (folder, tmp_path / "runs/one/1"):
        table = memtrain.read_ledger(path).to_table(columns=["step", "key", "timestep", "loss", "kept"])
        order = [(name, "ascending") for name in ("step", "key", "timestep")]
        tables.append(table.take(pc.sort_indices(table, sort_keys=order)))
    two, one = tables
    assert len(two) == len(one) > 6 and two.drop_columns("loss").equals(one.drop_columns("loss"))
    assert pc.max(pc.abs(pc.subtract(two["loss"], one["loss"]))).as_py() < 1e-5
    assert sum(text.count("steps, 32 samples seen") for text in said_by) == 1  # rank 0 alone


@pytest.mark.slow
def test_local_hands_a_signal_on_to_its_ranks(forks, checkout, pipeline_folder, corpus, tmp_path):
    """SIGUSR1, of which torchrun by itself dies, leaving the ranks alone."""
    said = small_run(corpus, pipeline_folder, tmp_path / "runs", "data.batch_size=2", steps=5000)[1:]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "MEMTRAIN_RUN_ID": "one", "NPROC": "2"}
    environment["PYTHON_EXEC"] = str(forks.python)
    started = subprocess.Popen(
        ["bash", checkout / "launch/local.sh", *said],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    checkpoints = tmp_path / "runs" / "faults" / "one" / "checkpoints"
    wait_until(lambda: checkpoints_in(checkpoints) or started.poll() is not None)
    started.send_signal(signal.SIGUSR1)
    text = started.communicate(timeout=PATIENCE)[0]  # ends when all who write there have ended
    assert started.returncode == 1 and text.count("SIGUSR1: this step is finished") == 2, text
    assert text.count(f"stopped after step {list(checkpoints_in(checkpoints))[-1]}") == 1


# ---- templates


def words_for_memtrain(text: str) -> list[str]:
    """The key=value words after `train`, joined lines taken apart, what a shell would put in made up."""
    line = re.sub(r"\\\n", " ", text)
    command = re.search(r"(?:main|memtrain) train\s+(.*)", line, re.S)[1]
    words = [word for word in shlex.split(command) if re.match(r"[\w./@]+=", word)]
    return [re.sub(r"\$\w+", "x", word) for word in words]


def kubernetes() -> dict:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def container() -> dict:
    (only,) = kubernetes()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    return only


def skypilot() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def slurm_recipe() -> list[str]:
    text = re.sub(r"\\\n", " ", (LAUNCH / "slurm.sbatch").read_text())
    return [*shlex.split(re.search(r"set -- (.*)", text)[1]), "name=x", "resume=auto"]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(lambda: words_for_memtrain(skypilot()["run"]), id="skypilot"),
        pytest.param(lambda: container()["command"][4:], id="kubernetes"),
        pytest.param(slurm_recipe, id="slurm"),
    ],
)
def test_memtrain_takes_what_the_templates_say(said, words):
    assert "resume=auto" in words()
    composed(spelled("train", words()))


def fits(value, form) -> bool:
    """`form`: a type, several, a list of such, or a dict of the keys that may be there; "!key" must."""
    if isinstance(form, dict):
        names = {name.lstrip("!") for name in form}
        must = {name[1:] for name in form if name.startswith("!")}
        assert must <= value.keys() and (value.keys() <= names or "*" in names), value.keys() ^ names
        inner = {name.lstrip("!"): kind for name, kind in form.items()}
        return all(fits(v, inner.get(k, inner.get("*"))) for k, v in value.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(v, form[0]) for v in value)
    assert isinstance(value, form) and not (isinstance(value, bool) and form is int), (value, form)
    return True


def test_skypilot_reads_its_template():
    """Against the part of SkyPilot's task schema that is used (docs.skypilot.co, SkyPilot YAML)."""
    mount = {"!name": str, "store": str, "mode": str, "source": str, "persistent": bool}
    recovery = {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": [int]}
    resources = {"!accelerators": str, "use_spot": bool, "disk_size": int, "job_recovery": recovery}
    task = skypilot()
    assert fits(
        task,
        {
            "name": str, "!num_nodes": int, "!resources": resources, "workdir": str,
            "envs": {"*": (str, int)},
            "secrets": {"*": (str, type(None))}, "file_mounts": {"*": mount}, "setup": str, "!run": str,
        },
    )  # fmt: skip
    assert re.fullmatch(r"[A-Za-z0-9]+:\d+", task["resources"]["accelerators"])
    assert all(m["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED") for m in task["file_mounts"].values())
    known = {f"SKYPILOT_{name}" for name in ("NUM_NODES", "NUM_GPUS_PER_NODE", "NODE_IPS", "TASK_ID")}
    known |= {*task["envs"], *re.findall(r"(\w+)=\S", task["run"])}
    assert set(re.findall(r"\$(\w+)", task["run"])) <= known
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_training_operator_reads_its_template():
    """Against the part of PyTorchJob v1 that is used (kubeflow/training-operator, apis/kubeflow.org/v1)."""
    mounts = [{"!name": str, "!mountPath": str}]
    one = {
        "!name": str, "!image": str, "!command": [str], "env": [{"!name": str, "value": str}],
        "resources": {"limits": {"*": (int, str)}}, "volumeMounts": mounts,
    }  # fmt: skip
    pod = {
        "!containers": [one], "volumes": [{"!name": str, "*": dict}], "securityContext": {"fsGroup": int},
        "terminationGracePeriodSeconds": int,
    }  # fmt: skip
    replicas = {"!replicas": int, "restartPolicy": str, "!template": {"!spec": pod}}
    elastic = {"rdzvBackend": str, "minReplicas": int, "maxReplicas": int, "maxRestarts": int}
    spec = {
        "elasticPolicy": elastic, "nprocPerNode": str,
        "runPolicy": {"backoffLimit": int, "cleanPodPolicy": str},
        "!pytorchReplicaSpecs": {"Master": replicas, "Worker": replicas},
    }  # fmt: skip
    job = kubernetes()
    assert fits(job, {"!apiVersion": str, "!kind": str, "!metadata": {"!name": str}, "!spec": spec})
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    assert job["spec"]["elasticPolicy"]["minReplicas"] == worker["replicas"]  # the global batch is that of all
    assert container()["name"] == "pytorch"  # the operator sets the environment of no other
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    volumes = {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container()["volumeMounts"]}


def test_the_dockerfile_copies_what_there_is_and_does_not_run_as_root():
    lines = re.sub(r"\\\n", " ", (LAUNCH / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM" and re.fullmatch(r"python:3\.1\d-slim", steps[0][1])
    for source in [word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]]:
        assert (REPO / source).exists(), source
    assert "launch/constraints.txt" in " ".join(rest for name, rest in steps if name == "RUN")
    assert [name for name, _ in steps][-2:] == ["USER", "CMD"] and json.loads(steps[-1][1])[0] == "memtrain"
