"""The `memtrain` program: one command a line, all configured alike (`key=value`, Hydra)."""

from __future__ import annotations

import datetime
import errno
import importlib
import logging
import os
import re
import secrets
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from memtrain.cli import jobs
from memtrain.data.escaping import PrintableFormatter, printable

HELP = """memtrain: fine-tune text-to-image diffusion models without memorizing them

Usage: memtrain COMMAND [key=value …]

  train     fine-tune, score every sample at every step, leave the memorized out of the loss
  report    one page about one or several runs: memtrain report RUN
  ledger    who was scored, excluded, looks memorized: memtrain ledger suspects RUN --out list.parquet
  sweep     search settings, each a run of its own: memtrain sweep study=thresholds trials=20
  detect    which prompts a finished model has memorized
  explain   which words of a prompt trigger it
  mitigate  generate without it
  evaluate  copies, alignment and quality of one or several models
  shards    check, index, pack shards, find duplicates in them: memtrain shards check PATH
  cache     encode a corpus once: latents and text embeddings beside its shards
  bench     measure: memtrain bench data | startup | score | detect
  demo      write the demo corpus: memtrain demo OUT

  memtrain COMMAND --help        keys, groups and examples
  memtrain COMMAND --cfg job     print the composed config

First steps
  memtrain demo data/demo
  memtrain train experiment=demo

An error is one line; MEMTRAIN_TRACEBACK=1 shows where it came from.
"""


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


def _job_run_id() -> str:
    """The run's id; jobs of -m add their number to the one that they have in common."""
    from hydra.core.hydra_config import HydraConfig

    return f"{new_run_id()}-{HydraConfig.get().job.num}" if jobs.is_job() else new_run_id()


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


def config_folder() -> Path:
    """conf/ inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 2 after a one-line message where the user can mend what is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    command, *rest = argv or ["--help"]
    if os.getcwd() not in sys.path:  # for classes of the user's own, as with `python -m`; last, so that it hides nothing
        sys.path.append(os.getcwd())
    try:
        if command in ("-h", "--help", "help"):
            print(HELP)
        elif command == "--version":
            from memtrain import __version__

            print(f"memtrain {__version__}")
        elif command in COMMANDS:
            COMMANDS[command](command, rest)
        else:
            raise ValueError(f"no command {command!r}; memtrain --help lists them")
        sys.stdout.flush()
    except BrokenPipeError:  # `memtrain … | head`: nobody listens any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("MEMTRAIN_TRACEBACK") == "1":
            raise
        message = one_line(error)
        if message is None:
            raise
        print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(2)


def _with_hydra(command: str, arguments: list[str]) -> None:
    """memtrain.cli.COMMAND has a function of that name, for the composed config, and may spell arguments for Hydra."""
    module = importlib.import_module(f"memtrain.cli.{command}")
    spelled = getattr(module, "spelled", list)  # what a person types that is not key=value yet
    _run(getattr(module, command), command, spelled(arguments))


def _plain(command: str, arguments: list[str]) -> None:
    quiet()
    getattr(importlib.import_module(f"memtrain.cli.{command}"), command)(arguments)


COMMANDS = {
    **dict.fromkeys(("train", "sweep", "detect", "explain", "mitigate", "evaluate", "cache", "demo"), _with_hydra),
    **dict.fromkeys(("report", "ledger", "shards", "bench"), _plain),
}


def quiet() -> None:
    """Say what memtrain has to say; keep the libraries' advice and loading bars off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("memtrain").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch|wandb)\b")


def _run(task: Callable, config_name: str, overrides: list[str]) -> None:
    import hydra
    from omegaconf import OmegaConf

    from memtrain.cli import schema

    quiet()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
    schema.register()
    OmegaConf.register_new_resolver("memtrain.run_id", _job_run_id, replace=True)
    OmegaConf.register_new_resolver("memtrain.devices", processes_per_node, replace=True)
    OmegaConf.register_new_resolver("memtrain.nodes", nodes, replace=True)
    OmegaConf.register_new_resolver("memtrain.demo_pipeline", demo_pipeline, replace=True)
    original = sys.argv
    # Hydra's grammar spells infinity inf; YAML's spelling is .inf
    spelled = [re.sub(r"=([+-]?)\.(inf|Inf|INF|nan|NaN|NAN)$", r"=\1\2", override) for override in overrides]

    several = bool({"-m", "--multirun"} & set(overrides))
    if several:
        jobs.check(overrides)
        new_run_id()  # here: so that the jobs, in this process or in others, have it in common
    failures: list[Exception] = []
    here = os.getpid()

    def with_argv(cfg):  # Lightning starts further ranks with sys.argv as it was
        sys.argv = original
        if jobs.is_job():
            try:
                return jobs.run(task, cfg, here)
            except Exception as error:  # Hydra says whose it is, and brings it here, if need be without its cause
                said = one_line(error)
                if said is None:
                    raise
                raise ValueError(said) from error
        try:
            task(cfg)
        except Exception as error:  # raised below: Hydra would print a line of its own
            failures.append(error)

    sys.argv = [original[0], *spelled]
    program = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(with_argv)
    try:
        with jobs.stopped_together() if several else nullcontext():
            program()
    finally:
        sys.argv = original
    if failures:
        raise failures[0]


def demo_pipeline() -> str:
    return str(Path(__file__).resolve().parents[1] / "demo" / "pipeline")


def one_line(error: BaseException) -> str | None:
    """What a person needs to know, on one line; None where the error is ours and deserves its traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    override = _override_of(chain[0])
    if override and not isinstance(chain[0], HydraException):
        return _unexpected(override, chain[0])
    for link in reversed(chain):  # the innermost says it best
        if isinstance(link, (ValueError, OSError)) and not isinstance(link, OmegaConfBaseException):
            if isinstance(link, OSError) and link.strerror:
                said = f"{link.strerror}: {link.filename}" if link.filename else link.strerror
                full = link.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                return said + ("; free some space or write to another folder" if full else "")
            return _joined(str(link))
        if isinstance(link, RuntimeError) and "PytorchStreamWriter failed" in str(link):
            return f"a checkpoint could not be written ({_joined(str(link))}); is the disk full?"
    for link in chain:
        if isinstance(link, (HydraException, OmegaConfBaseException)):
            causes = [_joined(str(part)) for part in chain[chain.index(link) :]]
            return "; ".join(dict.fromkeys(causes))
    return None


def _override_of(error: BaseException) -> str | None:
    """What Hydra was merging when this was raised. It says so itself, but for errors that it does not expect."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_apply_overrides_to_config" and "override" in frame.f_locals:
            return frame.f_locals["override"].input_line
    return None


def _unexpected(override: str, error: BaseException) -> str:
    """What is wrong with an override where OmegaConf fails with an error of another kind than its own."""
    above = override.split("=")[0].lstrip("+").rpartition(".")[0]
    if isinstance(error, AssertionError) and above:  # it looks for a key in what has none
        return f"{override} sets a part of {above}, which is null; leave it out, or give {above} a value"
    return f"{override} cannot be set ({_joined(str(error))})"


def _joined(text: str) -> str:
    """Lines of a message joined to one, without OmegaConf's notes on types and Hydra's on folders."""
    text = text.split("Config search path:")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("object_type=", "reference_type=", "Set the env"))]
    return re.sub(r":?; ", "; ", "; ".join(kept))


if __name__ == "__main__":
    main()
