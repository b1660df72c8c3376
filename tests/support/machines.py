"""What the ranks of a machine do that share what is kept of every sample; each writes to OUT/RANK.pt what it saw."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED, Observations
from memtrain.training import machine
from memtrain.training.machine import Machine
from memtrain.training.score_memory import ScoreMemory, Scoring
from tests.support.observe import observe
from tests.support.rules import quick_rules

SAMPLES, STEPS = 40, 25


def steps(rule: str) -> list[Observations]:
    """Visits in which pictures come again, within a step too; most steps show what they showed elsewhere."""
    generator = torch.Generator().manual_seed(len(rule))

    def draw(low, high, count=12):
        return torch.randint(low, high, (count,), generator=generator)

    groups = torch.tensor([TRAINED, CANARY, REFERENCE, SACRIFICED])
    seen = []
    for _ in range(STEPS):
        index = draw(0, SAMPLES)
        score = torch.rand(12, generator=generator) + 0.1
        group = torch.where(index % 4 == 2, REFERENCE, groups[index % 4])
        seen.append(
            observe(
                score, draw(0, 1000), index, group, draw(0, 4) > 0, score * 2, picture=index // 2, copies=1 + index % 3
            )
        )
    return seen


def keepers(rule: str, here: Machine):
    kept, memory = quick_rules()[rule], None
    kept.zeros = here.zeros
    kept.setup(SAMPLES, 1000)
    memory = ScoreMemory(SAMPLES, Scoring(every_visits=3), here.zeros)
    return kept, memory


def learn(rule: str, here: Machine) -> dict:
    """What a rule and a memory keep after each step, and what the rule decides before it."""
    kept, memory = keepers(rule, here)
    states = []
    for observed in steps(rule):
        decided = kept.decide(observed).keep_mask
        with here.changing([kept, memory], observed.picture) as pictures:
            memory.update(replace(observed, picture=pictures))
            kept.update(replace(observed, picture=pictures))
        state = {**kept.state_dict(), **memory.state_dict(), "decided": decided}
        states.append({name: tensor.clone() for name, tensor in state.items()})
    return states


def share(out: str, ranks: int) -> None:
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    here = Machine(rank, ranks, node=rank // 2)  # two ranks a machine, the last one alone
    found = {rule: learn(rule, here) for rule in ("evidence", "z_scores", "calibrated")}
    one = here.zeros(3, torch.int16)
    torch.distributed.barrier()
    if rank == 1:
        one[1] = 7  # seen by rank 0
    torch.distributed.barrier()
    machine._IN_MEMORY = Path("/dev/full")  # no folder: on disk then
    two = here.zeros(5, torch.bool)
    torch.save((found, one.clone(), two.clone(), here.is_first), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()
