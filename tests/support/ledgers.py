"""Ledgers of runs over LAION that never were."""

import numpy as np

from memtrain.core.exclusion import CANARY, REFERENCE, TRAINED
from memtrain.data.ledger import About, LedgerRows, LedgerWriter


def visits(count: int, batch: int = 32, first: int = 0, seed: int = 0, samples: int = 80_000) -> LedgerRows:
    """Random ones, as a run over LAION has them: eight shards of 10,000 samples open, nothing seen twice."""
    draw = np.random.default_rng(seed)
    sample_index = draw.permutation(samples)[:count]
    return LedgerRows(
        step=first + np.arange(count) // batch,
        sample_index=sample_index,
        picture=np.where(sample_index % 100, sample_index, 0),  # one in a hundred shows the first one's
        group=draw.choice(np.array([TRAINED, CANARY, REFERENCE], np.int8), count, p=[0.8, 0.1, 0.1]),
        timestep=draw.integers(0, 1000, count).astype(np.int16),
        score=np.exp(draw.normal(0.5, 0.5, count)).astype(np.float32),
        scored=draw.random(count) < 0.9,
        loss=draw.gamma(2, 0.05, count).astype(np.float32),
        threshold=np.full(count, 2, np.float32),
        kept=draw.random(count) < 0.97,
        second_score=np.zeros(count, np.float32),
    )


def laion_key(index: int) -> str:
    shard = 17 + index // 10_000 * 4_321
    return f"{shard:05d}.tar/{shard:05d}{index % 10_000:04d}"


def write(run, *parts: LedgerRows, rank: int = 0, key=laion_key, sample: float = 1.0, **about):
    (run / "ledger").mkdir(parents=True, exist_ok=True)
    writer = LedgerWriter(run / "ledger", rank, key, About(1000, sample, **about))
    for rows in parts:
        writer.add(rows)
        writer.close_part()
    return writer
