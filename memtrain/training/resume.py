"""Going on with a run: which one, from which checkpoint, and whether its config is still the same."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from memtrain.core.files import written_aside

log = logging.getLogger(__name__)

LAST = "last.ckpt"  # a link to the newest
CHECKPOINTS = "checkpoints"  # in a run's folder
_STATE = "run.json"
_NAME = re.compile(r"step-(\d+)\.ckpt")
_PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "DataModule", "memtrain")
# what a run may go on with changed, without being asked: where and how fast, not what
_FREE = (
    "resume",
    "ckpt_path",
    "run_id",
    "run_dir",
    "runs_dir",
    "logger",
    "max_bad_steps",
    "callbacks.checkpoint",
    "callbacks.progress",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "data.num_workers",
    "data.cache_dir",
    "data.cache_bytes",
    "data.fetch",
)
_BATCH = ("data.batch_size", "trainer.accumulate_grad_batches")  # with the number of ranks, the global batch


# ---- files


@dataclass(frozen=True)
class RunState:
    """What `run.json` in a run's folder says, beside its checkpoints."""

    wandb_id: str | None
    finished_at: int | None  # step
    global_batch_size: int | None = None
    canaries: str | None = None  # digest of what files say of canaries, see `memtrain.data.canaries_digest`
    stopped_early: bool = False  # there, before its last step, as `stop_early` asks

    def write(self, folder: str | Path) -> None:
        path = Path(folder) / _STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> RunState:
        """The state of the run in a folder; nothing is known of one that was stopped before its first step."""
        path = folder / _STATE
        return RunState(**json.loads(path.read_text())) if path.exists() else RunState(None, None)


def checkpoint_name(step: int) -> str:
    """The name of the file that holds a step's checkpoint."""
    return f"step-{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their step, the oldest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*.ckpt")]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where every byte has its checksum and every part is there."""
    import torch  # here: a run that is not there is said before this is loaded

    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            return f"{damaged} in it does not match its checksum"
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    missing = [part for part in _PARTS if part not in checkpoint]
    return f"it lacks {', '.join(missing)}" if missing else None


def step_of(path: Path) -> int:
    """The optimizer steps that a checkpoint's run had made."""
    import torch

    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def whole_checkpoint(path: Path) -> Path:
    """This checkpoint, or the newest older one beside it that is not damaged.

    Raises:
        ValueError: there is none.
    """
    path = path.resolve() if path.is_symlink() else path  # last.ckpt
    match = _NAME.fullmatch(path.name)
    older = [p for step, p in checkpoints_in(path.parent).items() if match and step < int(match[1])]
    for candidate in (path, *reversed(older)):
        why = damage(candidate)
        if why is None:
            if candidate != path:
                log.warning("going back to %s", candidate)
            return candidate
        log.error("DAMAGED CHECKPOINT %s: %s", candidate, why)
    raise ValueError(f"{path} is damaged, and there is no older checkpoint beside it that is not")


# ---- runs


@dataclass(frozen=True)
class Past:
    """An earlier run that is to be gone on with: its folder, and what it left word of."""

    folder: Path
    state: RunState

    def is_finished(self, max_steps: int, patience: int | None) -> bool:
        """Whether there is nothing to go on with: it reached its last step, or stopped early and has no more patience.

        Args:
            max_steps, patience: `trainer.max_steps` and `stop_early.patience`, as they are now.
        """
        finished_at = self.state.finished_at
        if finished_at is None:
            return False
        return finished_at >= max_steps or (self.state.stopped_early and not self._is_more_patient(patience))

    def _is_more_patient(self, patience: int | None) -> bool:
        before = _flat(self._config()).get("stop_early.patience")
        return before is not None and (patience is None or patience > before)

    def checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; None where the run was stopped before its first."""
        there = list(checkpoints_in(self.folder / CHECKPOINTS).values())
        return whole_checkpoint(there[-1]) if there else None

    def check_config(self, config: str, allow: str | Sequence[str]) -> None:
        """Raises ValueError where the run would go on with another config (YAML) than it had, unless it may."""
        changed = differences(self._config(), yaml.safe_load(config))
        allowed = [allow] if isinstance(allow, str) else allow
        asked = [key for key in changed if "all" not in allowed and not _is_under(key, allowed)]
        told = [f"{key} {changed[key][0]} -> {changed[key][1]}" for key in (asked or changed)]
        if asked:
            raise ValueError(
                f"the config differs from that of {self.folder}: {', '.join(told)}; say "
                f"resume.allow=[{','.join(asked)}] or resume.allow=all to go on with it, or begin "
                "a new run: resume=null; for jobs of -m another MEMTRAIN_RUN_ID"
            )
        if told:
            log.warning("going on with a changed config: %s", ", ".join(told))

    def check_global_batch(self, batch_size: int, accumulate: int, ranks: int, allow: str | Sequence[str]) -> None:
        """Raises ValueError where the run would go on with another global batch than it had, unless it may.

        `resume.allow=all` is about the config: where it is the same and only the number of ranks is another, nobody
        has asked for another batch.

        Args:
            batch_size, accumulate: `data.batch_size` and `trainer.accumulate_grad_batches`, as they are now.
            ranks: of all nodes.
        """
        before, now = self.state.global_batch_size, batch_size * accumulate * ranks
        if before is None or now == before:
            return
        was = _flat(self._config())
        changed = [key for key, value in zip(_BATCH, (batch_size, accumulate), strict=True) if was.get(key) != value]
        told = f"{batch_size} rows x {accumulate} micro-batches x {ranks} ranks, and before it was {before}"
        allowed = [allow] if isinstance(allow, str) else allow
        if (changed and "all" in allowed) or any(_is_under(key, allowed) for key in _BATCH):
            log.warning("going on with a changed global batch: it is %d now, %s", now, told)
            return
        per_rank, rest = divmod(before, ranks)
        keeps = f"a number of ranks that divides {before} can keep it"
        if rest == 0:
            rows = max(rows for rows in range(1, min(batch_size, per_rank) + 1) if per_rank % rows == 0)
            kept = dict(zip(_BATCH, (rows, per_rank // rows), strict=True))
            asked = [key for key, value in kept.items() if was.get(key) != value]
            keeps = " ".join(f"{key}={value}" for key, value in kept.items())
            keeps += f" resume.allow=[{','.join(asked)}] keeps it" if asked and "all" not in allowed else " keeps it"
        raise ValueError(
            f"the global batch of {self.folder} would be {now}: {told}; {keeps}, and resume.allow=[{_BATCH[0]}] goes "
            "on with the new one"
        )

    def check_canaries(self, digest: str | None, allow: str | Sequence[str]) -> None:
        """Raises ValueError where the files that the config names for canaries say something else now, unless they may.

        Args:
            digest: of the run that goes on, see `memtrain.data.canaries_digest`.
        """
        before = self.state.canaries
        if before is None or digest in (None, before):
            return  # a file that the config did not name is told by its difference
        keys = ("canaries.file", "canaries.foreign")
        allowed = [allow] if isinstance(allow, str) else allow
        if "all" not in allowed and not any(_is_under(key, allowed) for key in keys):
            raise ValueError(
                f"what {' or '.join(keys)} names has changed since {self.folder} was started; put it back, or say "
                f"resume.allow=[{keys[0]}] to go on with it"
            )
        log.warning("going on with other canaries: what %s names has changed", " or ".join(keys))

    def _config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))


def find_run(resume: str | None, named: Path) -> Past | None:
    """`resume=auto`: the run below `named` that was started last; `resume=RUN_DIR`: that one; None: none."""
    if resume is None:
        return None
    if resume == "auto":
        runs = [path.parent for path in named.glob("*/config.yaml")]
        if not runs:
            return None
        folder = max(runs, key=lambda run: (run / "config.yaml").stat().st_mtime)
    else:
        folder = Path(resume)
        if not (folder / "config.yaml").exists():
            raise ValueError(f"resume={resume}: no run, it has no config.yaml; name a folder runs/NAME/ID, or auto")
    return Past(folder, RunState.read(folder))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configs differ and it matters, with what each was and what it is now."""
    before, now = _flat(before), _flat(now)
    keys = [key for key in dict.fromkeys([*before, *now]) if not _is_under(key, _FREE)]
    found = {key: (before.get(key, "(absent)"), now.get(key, "(absent)")) for key in keys}
    return {key: pair for key, pair in found.items() if pair[0] != pair[1]}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_under(key: str, parents: Sequence[str]) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)


@contextlib.contextmanager
def same_wandb_run(identity: str | None) -> Iterator[None]:
    """Have W&B, started while the context lasts, go on with the run of this id; None: begin a run of its own."""
    before = os.environ.get("WANDB_RUN_ID")
    if identity is not None:
        os.environ["WANDB_RUN_ID"] = identity
    try:
        yield
    finally:
        if identity is not None:
            os.environ.pop("WANDB_RUN_ID") if before is None else os.environ.update(WANDB_RUN_ID=before)
