"""Who started this process: torchrun, srun or a person. How many ranks there are, and the id that they share."""

from __future__ import annotations

import datetime
import os
import secrets


def new_run_id() -> str:
    """One id for all ranks, whoever started them.

    Lightning's children find it in the environment, ranks of torchrun in the store that its agents keep, tasks
    of srun take that of their job and step, which a requeued job has again.
    """
    fresh = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    environment = os.environ
    if "MEMTRAIN_RUN_ID" not in environment:
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            fresh = _agreed_on("run_id", fresh)
        elif _is_task_of_srun():
            fresh = f"slurm-{environment['SLURM_JOB_ID']}-{environment['SLURM_STEP_ID']}"
    return environment.setdefault("MEMTRAIN_RUN_ID", fresh)


def _agreed_on(name: str, proposed: str) -> str:
    """What the first rank proposes, over the store of torchrun's agents."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.compare_set(f"memtrain/{name}", "", proposed).decode()


def processes_per_node(otherwise: int) -> int:
    """Of the launcher that started this process: torchrun, or srun; `otherwise` where none did."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    if _is_task_of_srun():
        return int(environment["SLURM_NTASKS"]) // nodes()
    return otherwise


def nodes() -> int:
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment["GROUP_WORLD_SIZE"])
    return int(environment["SLURM_NNODES"]) if _is_task_of_srun() else 1


def _is_task_of_srun() -> bool:
    """False in a shell that srun opened: there Lightning, too, goes by the job's name, and starts the ranks."""
    return "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
