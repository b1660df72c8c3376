"""The `memtrain` program: one command a line, all configured alike (`key=value`, Hydra)."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from memtrain.cli.arguments import spelled
from memtrain.cli.errors import one_line
from memtrain.cli.launcher import new_run_id, nodes, processes_per_node
from memtrain.cli.terminal import quiet
from memtrain.data.escaping import printable
from memtrain.data.paths import config_folder

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """memtrain: fine-tune text-to-image diffusion models without memorizing them

Usage: memtrain COMMAND [key=value …]

  train     fine-tune, score every sample at every step, leave the memorized out of the loss
  report    one page about one or several runs: memtrain report RUN
  ledger    who was scored, excluded, looks memorized: memtrain ledger suspects RUN --out list.parquet
  sweep     search settings, each a run of its own: memtrain sweep study=thresholds trials=20
  detect    which prompts a finished model has memorized
  explain   which words of a prompt trigger it
  mitigate  generate without it
  repair    take what it has memorized out of it again
  evaluate  copies, alignment and quality of one or several models
  shards    check, index, pack shards, find duplicates in them: memtrain shards check PATH
  cache     encode a corpus once: latents and text embeddings beside its shards
  bench     baselines against one another: memtrain bench mitigation protocol=demo
            ways to repair a model: memtrain bench repair runs=[RUN]
            measure: memtrain bench all | peers | real_size | score | detect | memory | data | startup |
            scale | duplicates | kept
  demo      write the demo corpus: memtrain demo OUT

  memtrain COMMAND --help        keys, groups and examples
  memtrain COMMAND --cfg job     print the composed config

First steps
  memtrain demo data/demo
  memtrain train experiment=demo

An error is one line; MEMTRAIN_TRACEBACK=1 shows where it came from.
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with 2 after a one-line message where the user can mend what is wrong."""
    atexit.register(gc.freeze)  # the process' memory goes as a whole: nothing in it is looked through for garbage
    argv = sys.argv[1:] if argv is None else argv
    command, *rest = argv or ["--help"]
    if os.getcwd() not in sys.path:  # for classes of the user's own, as with `python -m`; last: it hides nothing
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
    finally:
        gc.enable()  # a training switches it off while it starts


def _with_hydra(command: str, arguments: list[str]) -> None:
    """memtrain.cli.COMMAND has a function of that name, for the composed config."""
    _run(getattr(importlib.import_module(f"memtrain.cli.{command}"), command), command, spelled(command, arguments))


def _plain(command: str, arguments: list[str]) -> None:
    quiet()
    getattr(importlib.import_module(f"memtrain.cli.{command}"), command)(arguments)


def _bench(command: str, arguments: list[str]) -> None:
    """`bench mitigation` and `repair` are configured as a training is; what else is measured has a few options."""
    if arguments[:1] in (["mitigation"], ["repair"]):
        _with_hydra(f"bench_{arguments[0]}", arguments[1:])
    else:
        _plain(command, arguments)


COMMANDS = {
    **dict.fromkeys(("train", "sweep", "cache", "demo"), _with_hydra),
    **dict.fromkeys(("detect", "explain", "mitigate", "repair", "evaluate"), _with_hydra),
    **dict.fromkeys(("report", "ledger", "shards"), _plain),
    "bench": _bench,
}


def _run(task: Callable, config_name: str, overrides: list[str]) -> None:
    import hydra

    from memtrain.cli import jobs, schema

    quiet()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
    schema.register()
    _register_resolvers()
    if {"--help", "-h"} & set(overrides):
        _leave_the_groups_out()
    if not any("hydra.mode" in word for word in overrides):
        _take_the_mode_as_said()
    original = sys.argv
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

    sys.argv = [original[0], *overrides]
    program = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)(with_argv)
    try:
        with jobs.stopped_together() if several else nullcontext():
            program()
    finally:
        sys.argv = original
    if failures:
        raise failures[0]


def composed(config_name: str, arguments: list[str]) -> DictConfig:
    """The config that a command would be run with."""
    from hydra import compose, initialize_config_dir

    from memtrain.cli import schema

    schema.register()
    _register_resolvers()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(config_name, spelled(config_name, arguments))


def _take_the_mode_as_said() -> None:
    """Hydra composes the whole config once more beforehand, only to see whether it names a mode other than -m."""
    from hydra._internal.hydra import Hydra

    Hydra.get_mode = lambda self, config_name, overrides: None


def _leave_the_groups_out() -> None:
    """Hydra lists all groups for every help, with a copy of all schemas each: seconds, for what conf/ does not show."""
    from hydra._internal.hydra import Hydra

    Hydra.list_all_config_groups = lambda self, parent="": []


def _register_resolvers() -> None:
    """What conf/ may ask for as `${memtrain.NAME:}`."""
    from omegaconf import OmegaConf

    from memtrain.cli.choices import choices
    from memtrain.cli.jobs import job_run_id
    from memtrain.demo import FLOW, PIPELINE

    for name, resolver in (
        ("run_id", job_run_id),
        ("devices", processes_per_node),
        ("nodes", nodes),
        ("choices", choices),
        ("demo_pipeline", lambda: str(PIPELINE)),
        ("demo_flow", lambda: str(FLOW)),
    ):
        OmegaConf.register_new_resolver(f"memtrain.{name}", resolver, replace=True)


if __name__ == "__main__":
    main()
