"""`memtrain demo`"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from memtrain.demo.corpus import duplicates, is_corpus, recipe_of


def demo(cfg: DictConfig) -> None:
    doses = cfg.doses if cfg.repeated is None else duplicates(cfg.repeated, cfg.copies)
    recipe = recipe_of(cfg.num_samples, cfg.seed, cfg.shard_size, cfg.pictures, doses)
    is_corpus(Path(cfg.out), recipe)  # here: what else is there is said at once
    from memtrain.demo.shards import write_corpus

    report = write_corpus(cfg.out, recipe)
    print(
        f"{'wrote' if report.written else 'kept'} {report.num_samples} samples in {report.num_shards} shards, "
        f"{report.num_bytes / 1e6:.0f} MB: {report.folder}"
    )
