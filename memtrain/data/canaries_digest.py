"""What tells the canaries that files name from others, where the config is the same: for runs that go on."""

from __future__ import annotations

import hashlib

import numpy as np

from memtrain.data.batches import Samples
from memtrain.data.groups import Groups
from memtrain.data.view import STRAIGHT


def canaries_digest(groups: Groups, samples: Samples) -> str | None:
    """A hash of listed canaries and foreign pictures; None: there are none.

    Of a list it is who shows which canary of which kind, as far as they are in the corpus, and who is held out; of
    pictures how they look, and their captions.

    Args:
        samples: the corpus, and behind it the foreign pictures.
    """
    listed = [canary for canary in groups.canaries if canary.is_listed]
    foreign = np.arange(groups.num_samples - groups.num_foreign, groups.num_samples)
    if not listed and not len(foreign):
        return None
    digest = hashlib.sha256(str(groups.reference.tolist()).encode())
    for canary in listed:
        digest.update(f"{canary.number} {canary.kind} {canary.positions.tolist()}\n".encode())
    for position in foreign.tolist():
        seen = samples.get(position, STRAIGHT, samples.sizes[0])
        digest.update(seen.image.tobytes() + seen.caption.encode("utf-8", "replace"))
    return digest.hexdigest()
