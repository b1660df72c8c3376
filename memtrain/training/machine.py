"""What is kept of every sample, once on each machine: its ranks map the same memory.

Every rank reads all of it. A step's changes are worked out by each rank, on a copy of the few rows that the step
touches, and the first rank of the machine puts them in place: so rules and memories need not know of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_IN_MEMORY = Path("/dev/shm")


class Keeper(Protocol):
    """Keeps numbers of every picture, such as an `ExclusionRule` or a `ScoreMemory`."""

    per_sample: tuple[str, ...]  # its tensors (num_samples,), looked up by a picture's position alone


class Machine:
    """The ranks of one machine. One that is alone there has memory of its own, and nothing is waited for.

    Args:
        rank, world_size: of this process among all; where there are several, all call this together.
        node: the number of its machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, node: int = 0):
        self._group: torch.distributed.ProcessGroup | None = None
        self.is_first = True
        if world_size == 1:
            return
        nodes: list[int] = [0] * world_size
        torch.distributed.all_gather_object(nodes, node)
        here = [other for other, of_other in enumerate(nodes) if of_other == node]
        if len(here) > 1:
            # gloo: tensors in memory, whatever the device that is trained on
            self._group = torch.distributed.new_group(here, backend="gloo", use_local_synchronization=True)
            self._first = here[0]
            self.is_first = rank == self._first

    def zeros(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(count,) zeros, the same memory for all ranks of the machine, which call this together.

        Raises:
            OSError: there is no room for it.
        """
        if self._group is None or count == 0:
            return torch.zeros(count, dtype=dtype)
        made: list[str | OSError | None] = [None]
        if self.is_first:
            try:
                made = [_file_of_zeros(count * dtype.itemsize)]
            except OSError as error:
                made = [error]
        try:
            torch.distributed.broadcast_object_list(made, src=self._first, group=self._group)
            [path] = made
            if isinstance(path, OSError):
                raise path
            assert path is not None
            mapped = torch.from_file(path, shared=True, size=count, dtype=dtype)
            self._wait()
        finally:
            if self.is_first and isinstance(made[0], str):
                os.unlink(made[0])  # the memory stays as long as a rank maps it, and not longer, however it ends
        return mapped

    @contextlib.contextmanager
    def changing(self, keepers: Sequence[Keeper], pictures: Tensor) -> Iterator[Tensor]:
        """Have the keepers change what they keep of these pictures, by the numbers that are given for them.

        (R,) int64 -> (R,) int64, on the CPU. All ranks of the machine do this together, with the same pictures;
        what comes of it is put in place when the block is left, once, and on all ranks no sooner than that.
        """
        whole = [(keeper, name, getattr(keeper, name)) for keeper in keepers for name in keeper.per_sample]
        if self._group is None or not whole:
            yield pictures
            return
        index, place = pictures.unique(return_inverse=True)  # (P,) sorted, (R,)
        for keeper, name, shared in whole:
            setattr(keeper, name, shared[index])  # (P,), a copy
        self._wait()  # here: every rank has read
        try:
            yield place
        finally:
            for keeper, name, shared in whole:
                if self.is_first:
                    shared[index] = getattr(keeper, name)
                setattr(keeper, name, shared)
            self._wait()  # here: what is read next is written

    def _wait(self) -> None:
        torch.distributed.barrier(group=self._group)


def _file_of_zeros(size: int) -> str:
    """The path of a new file of zeros: in memory where that has room, else on disk, from where it is mapped.

    Its room is taken at once: a mapped file that runs out of it ends the process without a word.
    """
    reason = ""
    for folder in (_IN_MEMORY, Path(tempfile.gettempdir())):
        if not folder.is_dir():
            continue
        file, path = tempfile.mkstemp(prefix="memtrain-", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, size)
            else:
                os.truncate(file, size)
            return path
        except OSError as error:
            os.unlink(path)
            reason = f"{folder}: {error.strerror}"
            log.warning("%d bytes that the ranks of this machine share do not fit into %s", size, reason)
        finally:
            os.close(file)
    raise OSError(f"no room for {size} bytes that the ranks of this machine share ({reason}); name another TMPDIR")
