"""Observations made by hand."""

import torch

from memtrain.core.exclusion import TRAINED, Observations


def observe(
    score,
    timesteps=900,
    index=None,
    group=TRAINED,
    scored=True,
    loss=1.0,
    captioned=True,
    latent_numel=16,
    picture=None,
    copies=1,
) -> Observations:
    """Scores of fresh visits; a number stands for all of them."""
    score = torch.as_tensor(score, dtype=torch.float32)
    n = len(score)

    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(n).clone()

    index = torch.arange(n) if index is None else torch.as_tensor(index)
    return Observations.of_visit(
        sample_index=index,
        picture=index if picture is None else torch.as_tensor(picture),
        copies=column(copies, torch.long),
        timesteps=column(timesteps, torch.long),
        score=score,
        loss=column(loss, torch.float32),
        group=column(group, torch.long),
        captioned=column(captioned, torch.bool),
        scored=column(scored, torch.bool),
        latent_numel=column(latent_numel, torch.long),
    )
