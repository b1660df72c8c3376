"""A SLURM of one machine, as far as launch/slurm.sbatch and submitit use it: sbatch, srun, scontrol, scancel, sacct.

Jobs run at once, one beside the other; their nodes are all this machine. As in SLURM a signal of scancel reaches the
tasks alone; a job that is requeued is sent SIGTERM first, its script too; and `srun --kill-on-bad-exit` sends SIGTERM
to the other tasks as soon as one has ended with another code than 0, and ends with the highest of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "scontrol", "scancel", "sacct")
KILL_WAIT = 60.0  # s between SIGTERM and SIGKILL; SLURM's KillWait is 30, on machines that are less busy


def install(folder: Path) -> dict[str, str]:
    """Make the programs; returns what the environment needs to find them and their jobs."""
    programs, jobs = folder / "programs", folder / "jobs"
    programs.mkdir(parents=True)
    jobs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{__file__}" {name} "$@"\n')
        (programs / name).chmod(0o755)
    # Lightning's port is made of the last four digits of the first job's number
    first = str(random.randrange(1000, 9000))
    return {"PATH": f"{programs}:{os.environ['PATH']}", "STAND_IN_JOBS": str(jobs), "STAND_IN_FIRST": first}


def state(environment: dict[str, str], job: str) -> str:
    """PENDING, RUNNING, COMPLETED or FAILED."""
    return (Path(environment["STAND_IN_JOBS"]) / job / "state").read_text()


def shut_down(environment: dict[str, str]) -> None:
    """End all jobs at once, and what they have started."""
    for folder in Path(environment["STAND_IN_JOBS"]).iterdir():
        for name in ("controller", "group"):
            if (folder / name).exists():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int((folder / name).read_text()), signal.SIGKILL)


# ---- the programs


def sbatch(*arguments: str) -> None:
    options, (script, *words) = _options(arguments)
    text = Path(script).read_text()
    asked = [word for line in re.findall("^#SBATCH (.*)", text, re.M) for word in shlex.split(line, comments=True)]
    options = _options(asked)[0] | options
    number = int(os.environ["STAND_IN_FIRST"]) + len(list(_jobs().iterdir()))
    first, last = map(int, re.match(r"(\d+)-(\d+)", options["array"]).groups()) if "array" in options else (0, 0)
    for index in range(first, last + 1):
        about = {
            "SLURM_JOB_ID": str(number + index),
            "SLURM_JOB_NAME": options.get("job-name", Path(script).name),
            "SLURM_SUBMIT_DIR": os.getcwd(),
            "SLURM_NNODES": options.get("nodes", "1"),
            "SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node", "1"),
        }
        about["SLURM_NTASKS"] = str(int(about["SLURM_NNODES"]) * int(about["SLURM_NTASKS_PER_NODE"]))
        about["SLURM_JOB_NUM_NODES"] = about["SLURM_NNODES"]
        about["SLURM_NODELIST"] = about["SLURM_JOB_NODELIST"] = "localhost"
        if "array" in options:
            about |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(index)}
            about["SLURM_ARRAY_TASK_COUNT"] = str(last - first + 1)
        folder = _jobs() / _name(about)
        folder.mkdir()
        (folder / "script").write_text(text)  # as it is now: SLURM, too, keeps a copy
        (folder / "state").write_text("PENDING")
        (folder / "job.json").write_text(json.dumps({"about": about, "words": words, "options": options}))
        subprocess.Popen(
            [sys.executable, "-I", __file__, "_run", folder.name], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(number if "parsable" in options else f"Submitted batch job {number}")


def _run(name: str) -> None:
    """What slurmd does for a job, from its start until it has ended and nobody has put it back into the queue."""
    folder = _jobs() / name
    job = json.loads((folder / "job.json").read_text())
    again, restarts = folder / "again", 0
    (folder / "controller").write_text(str(os.getpid()))
    while not _depended_on(job["options"].get("dependency", "")):
        time.sleep(0.05)
    while True:
        environment = os.environ | job["about"]
        if restarts:
            environment["SLURM_RESTART_COUNT"] = str(restarts)
        (folder / "state").write_text("RUNNING")
        name = "slurm-%A_%a.out" if "array" in job["options"] else "slurm-%j.out"
        output = job["options"].get("output", f"{job['about']['SLURM_SUBMIT_DIR']}/{name}")
        output = Path(_path(output, job["about"]))
        output.parent.mkdir(parents=True, exist_ok=True)  # submitit makes it, once sbatch has returned
        with output.open("ab") as file:
            script = subprocess.Popen(
                ["bash", folder / "script", *job["words"]], cwd=job["about"]["SLURM_SUBMIT_DIR"], env=environment,
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip
            (folder / "group").write_text(str(script.pid))
            while script.poll() is None and not again.exists():
                time.sleep(0.05)
        if not again.exists():
            break
        _end(script, folder)
        again.unlink()
        restarts += 1
        (folder / "group").unlink()
        (folder / "state").write_text("PENDING")
    (folder / "group").unlink()
    (folder / "controller").unlink()
    (folder / "code").write_text(str(script.returncode))
    (folder / "state").write_text("FAILED" if script.returncode else "COMPLETED")


def _depended_on(said: str) -> bool:
    """Whether the job of `afterok:17`, or all of an array, have ended well; true where nothing is said."""
    number = said.removeprefix("afterok:")
    folders = [folder for folder in _jobs().iterdir() if folder.name.split("_")[0] == number]
    return all((folder / "state").read_text() == "COMPLETED" for folder in folders)


def srun(*arguments: str) -> None:
    options, command = _options(arguments)
    folder = _jobs() / _name(os.environ)
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    told = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: told.append(number))  # the tasks have it, too, and decide
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        environment = os.environ | {
            "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node),
            "SLURM_NODEID": str(rank // per_node),
        }  # fmt: skip
        with contextlib.ExitStack() as files:
            streams = {
                stream: files.enter_context(open(_path(options[option], environment), "ab"))
                for stream, option in (("stdout", "output"), ("stderr", "error"))
                if option in options
            }
            tasks.append(subprocess.Popen(command, env=environment, **streams))
    (folder / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    killed = options.get("kill-on-bad-exit") != "1"
    while any(task.poll() is None for task in tasks):
        time.sleep(0.02)
        if not killed and any(task.poll() for task in tasks):
            killed = True
            for task in tasks:
                task.terminate()  # does nothing where one has ended
    (folder / "tasks").unlink()
    codes = [code if code >= 0 else 128 - code for code in (task.returncode for task in tasks)]
    with (folder / "codes").open("a") as file:
        file.write(f"{codes}\n")
    sys.exit(max(codes))


def scontrol(verb: str, name: str) -> None:
    assert verb == "requeue", verb
    (_jobs() / name / "again").touch()


def scancel(option: str, name: str) -> None:
    number = signal.Signals[f"SIG{option.removeprefix('--signal=')}"]
    for task in (_jobs() / name / "tasks").read_text().split():
        os.kill(int(task), number)


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for folder in _jobs().iterdir():
        print(f"{folder.name}|{(folder / 'state').read_text()}|localhost")


# ---- what they share


def _jobs() -> Path:
    return Path(os.environ["STAND_IN_JOBS"])


def _name(about) -> str:
    """As in `scontrol requeue 17` or `17_2`."""
    if "SLURM_ARRAY_JOB_ID" in about:
        return f"{about['SLURM_ARRAY_JOB_ID']}_{about['SLURM_ARRAY_TASK_ID']}"
    return about["SLURM_JOB_ID"]


def _options(words) -> tuple[dict[str, str], list[str]]:
    """Those before the first word that is none, and the rest."""
    options, rest = {}, list(words)
    while rest and rest[0].startswith("--"):
        name, has_value, value = rest.pop(0)[2:].partition("=")
        if not has_value and name in ("output", "error"):
            value = rest.pop(0)
        options[name] = value
    return options, rest


def _path(pattern: str, about) -> str:
    fields = {
        "%j": about["SLURM_JOB_ID"], "%A": about.get("SLURM_ARRAY_JOB_ID", ""),
        "%a": about.get("SLURM_ARRAY_TASK_ID", ""), "%t": about.get("SLURM_PROCID", "0"),
    }  # fmt: skip
    return re.sub("%[jAat]", lambda field: fields[field[0]], pattern)


def _end(script: subprocess.Popen, folder: Path) -> None:
    """SIGTERM to a job's script and its tasks; SIGKILL to all that is left when they have ended or had their time."""
    end = time.monotonic() + KILL_WAIT
    tasks = folder / "tasks"
    script.terminate()  # does nothing where it has ended
    for task in tasks.read_text().split() if tasks.exists() else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(task), signal.SIGTERM)
    while (script.poll() is None or tasks.exists()) and time.monotonic() < end:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(script.pid, signal.SIGKILL)
    tasks.unlink(missing_ok=True)
    script.wait()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
