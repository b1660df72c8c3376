"""What can be known to fail before the first step."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor, nn

from memtrain.core.exclusion import ExclusionRule
from memtrain.data.datamodule import DataModule
from memtrain.data.escaping import as_text
from memtrain.data.paths import CHECKPOINT, check_file
from memtrain.training.machine import Keeper
from memtrain.training.optimizers import OptimizerConfig
from memtrain.training.resume import CHECKPOINTS, checkpoints_in, step_of, whole_checkpoint
from memtrain.training.score_memory import ScoreMemory, Scoring

log = logging.getLogger(__name__)

CHECKPOINT_BYTES_PER_PARAMETER = 8  # float32 weights and the average; the optimizer's state comes on top
BEST_BYTES_PER_PARAMETER = 4  # those of the best validation, where `stop_early` keeps them
EXPORT_BYTES_PER_PARAMETER = 8
LOGS_BYTES = 50_000_000
_KEYS_NAMED = 8


def bytes_of_samples(exclusion: ExclusionRule, scoring: Scoring, num_samples: int) -> int:
    """What rule and score memory keep of so many samples, and a checkpoint with them."""

    def zeros(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(count, dtype=dtype, device="meta")  # which takes no memory

    rule = copy.copy(exclusion)
    rule.zeros = zeros  # type: ignore[method-assign]
    rule.setup(num_samples, num_timesteps=1)
    keepers: list[Keeper] = [rule, ScoreMemory(num_samples, scoring, zeros)] if scoring.remembers else [rule]
    return sum(getattr(keeper, name).nbytes for keeper in keepers for name in keeper.per_sample)


def check_disk(
    run_dir: Path,
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerConfig,
    keep: int,
    of_samples: int = 0,
    keeps_best: bool = False,
) -> None:
    """Raises OSError where the disk has no room for the checkpoints, the export and the logs of a run.

    Args:
        keep: checkpoints that stay; while a new one is written, one more lies on disk. 0: the run writes none.
        of_samples: bytes of a checkpoint that `bytes_of_samples` says.
        keeps_best: whether it holds the weights of the best validation, too.
    """
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    shapes = [parameter.shape for parameter in parameters]
    count = sum(map(math.prod, shapes))
    checkpoint = count * CHECKPOINT_BYTES_PER_PARAMETER + sum(map(optimizer.state_bytes, shapes)) + of_samples
    checkpoint += count * BEST_BYTES_PER_PARAMETER if keeps_best else 0
    checkpoints = keep + 1 if keep else 0
    there = sum(path.stat().st_size for path in checkpoints_in(run_dir / CHECKPOINTS).values())  # will be replaced
    needed = max(checkpoints * checkpoint - there, 0)
    needed += count * EXPORT_BYTES_PER_PARAMETER + LOGS_BYTES
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"the disk is too full for a run: {existing} has {free / 1e6:.0f} MB free, {checkpoints} checkpoints "
            f"(callbacks.checkpoint.keep={keep} and the one that is being written), export and logs need about "
            f"{needed / 1e6:.0f} MB; free some space or set runs_dir="
        )


def check_checkpoint(ckpt_path: str | None) -> Path | None:
    """The checkpoint to begin from, or an older one beside it where it is damaged. Raises ValueError where none is."""
    if ckpt_path is None:
        return None
    return whole_checkpoint(check_file("ckpt_path", ckpt_path, CHECKPOINT))


def check_steps_left(checkpoint: Path | None, key: str, max_steps: int, is_new: bool) -> None:
    """Raises ValueError where a run would begin at or behind its last step.

    Args:
        checkpoint: that it begins from; None: it begins at the first step.
        key: of the config, that says so.
        is_new: it is a run of its own. One that goes on may have been stopped at its last step, and be ended.
    """
    if checkpoint is None:
        return
    step = step_of(checkpoint)
    if step > max_steps or (is_new and step == max_steps):
        raise ValueError(
            f"{key}={checkpoint} is of step {step}, and trainer.max_steps={max_steps} counts from the first: there is "
            f"nothing left to train; say trainer.max_steps={step + max_steps} for so many more"
        )


def check_base(base: Mapping[str, str], own: Mapping[str, str], is_adapter: bool) -> None:
    """Raises ValueError where a checkpoint's base is another than that of the run that begins from it.

    Args:
        base, own: a hash of each network that the checkpoint's run and this one build upon.
        is_adapter: an adapter is trained, and not the weights that a score compares with their beginning.
    """
    other = [name for name, value in own.items() if base.get(name) != value]
    if not other:
        return
    if not base and not is_adapter:
        raise ValueError(
            "the checkpoint's run took no anchored score, so it does not say what its base was, which that score "
            "compares with; go on with score=magnitude"
        )
    whose = "of an adapter for another base" if is_adapter else "scored against another base"
    raise ValueError(
        f"the checkpoint is {whose}, whose {', '.join(other)} had other weights; name that base with model.pretrained="
    )


def check_optimizer(kind: str | None, own: OptimizerConfig) -> None:
    """Raises ValueError where a checkpoint holds the state of another kind of optimizer; None: an older one, unsaid."""
    if kind not in (None, own.kind):
        raise ValueError(
            f"the checkpoint holds the state of {kind}, which {own.kind} cannot go on with; choose the optimizer= that "
            "it was, or begin from the run's export with model.pretrained="
        )


def check_rule_score(rule: str, scoring: Scoring) -> None:
    """Raises ValueError where a rule would go on by another score than it has learnt from."""
    if rule != scoring.rule:
        raise ValueError(
            f"the checkpoint's exclusion rule went by score.rule={rule}, whose scores are no measure for those of "
            f"{scoring.rule}; resume with score={rule}, or score=both score.rule={rule}"
        )


def check_accelerator(accelerator: str, devices: object) -> None:
    """Raises ValueError where GPUs are asked for that are not there."""
    if accelerator not in ("gpu", "cuda"):
        return
    there = torch.cuda.device_count()
    if there == 0 and not (accelerator == "gpu" and torch.backends.mps.is_available()):
        raise ValueError(
            f"trainer.accelerator={accelerator}: torch {torch.__version__} finds no GPU here (nvidia-smi shows those "
            "of the machine, CUDA_VISIBLE_DEVICES hides some); use trainer=cpu"
        )
    asked = devices if isinstance(devices, int) else 0
    if there and asked > there:
        raise ValueError(f"trainer.devices={asked}: this machine has {there}; -1 takes all")


def check_reference(exclusion: ExclusionRule, count: int) -> None:
    """Raises ValueError where a rule compares with a reference set and there is none."""
    if exclusion.needs_reference and count == 0:
        raise ValueError(
            f"{type(exclusion).__name__} compares with samples that are never trained on, and reference.count is 0; "
            "set reference.count=200 or so"
        )


def check_stop_early(patience: int | None, reference: int, validates: bool) -> None:
    """Raises ValueError where a run is to end with the weights of its best held-out loss, and none is measured.

    Args:
        reference: how many samples are held out.
        validates: whether they are validated on.
    """
    if patience is not None and (reference == 0 or not validates):
        raise ValueError(
            f"stop_early.patience={patience} goes by the held-out loss, and none is measured; set reference.count=200 "
            "or so, and leave callbacks.validation as it is"
        )


def check_job(trainer: Trainer, is_job: bool) -> None:
    """Raises ValueError where a job of -m has several ranks that Lightning would start.

    It would start each as the whole command, with all the jobs again.
    """
    if not is_job or trainer.world_size == 1:
        return
    assert isinstance(trainer.strategy, ParallelStrategy) and trainer.strategy.cluster_environment is not None
    if not trainer.strategy.cluster_environment.creates_processes_externally:
        raise ValueError(
            f"train -m starts jobs of one rank, got {trainer.world_size}; say trainer.devices=1, or use "
            "memtrain sweep, whose trials are programs of their own"
        )


def warn_of_sacrificed(data: DataModule, named: bool) -> None:
    """Says which pictures the exported model will draw, since no rule may exclude them.

    Args:
        named: whether the user chose them, with canaries.sacrificed_keys.
    """
    groups = data.groups
    pictures = groups.one_each(groups.sacrificed)
    if len(pictures) == 0:
        return
    own = [len(canary.positions) for canary in groups.canaries[: groups.num_sacrificed]]
    sizes = np.maximum(groups.pictures.copies(pictures), own)  # a list may name more than look alike, or fewer
    keys = [
        as_text(data.samples.key(int(position))) + (f" ({size} samples)" if size > 1 else "")
        for position, size in zip(pictures[:_KEYS_NAMED], sizes, strict=False)
    ]
    more = f" and {len(pictures) - _KEYS_NAMED} more" if len(pictures) > _KEYS_NAMED else ""
    said = f"sacrificed canaries are never excluded, and the exported model will draw them: {', '.join(keys)}{more}"
    if groups.num_foreign:
        log.info(
            "%s; canaries.source=foreign has them in place of the corpus' own, and a rule learns from them where they "
            "are of its kind",
            said,
        )
    elif named:
        log.info("%s; canaries.sacrificed_keys names them", said)
    else:
        log.warning(
            "%s. They are pictures of yours: name public ones with canaries.sacrificed_keys=[KEY,…], bring some with "
            "canaries.source=foreign canaries.foreign=SHARDS, or say canaries.sacrificed=0 and have no rule learn from "
            "them",
            said,
        )
