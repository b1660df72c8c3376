"""`memtrain demo`"""

from __future__ import annotations

import re

from omegaconf import DictConfig


def demo(cfg: DictConfig) -> None:
    from memtrain.demo.compose import write_corpus

    report = write_corpus(
        cfg.out,
        num_samples=cfg.num_samples,
        seed=cfg.seed,
        shard_size=cfg.shard_size,
        repeated=cfg.repeated,
        copies=cfg.copies,
    )
    print(
        f"{'wrote' if report.written else 'kept'} {report.num_samples} samples in {report.num_shards} shards, "
        f"{report.num_bytes / 1e6:.0f} MB: {report.folder}"
    )


def spelled(arguments: list[str]) -> list[str]:
    """`memtrain demo OUT` is `memtrain demo out=OUT`."""
    if arguments and not re.match(r"-|\w+=", arguments[0]):
        return [f"out={arguments[0]}", *arguments[1:]]
    return arguments
