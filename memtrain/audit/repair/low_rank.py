"""A low-rank edit that is found, not trained: layers are made to answer forgotten inputs as they answer others.

Shapes: n inputs of a layer, D their width, O its output's, R the rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from memtrain.audit.repair.methods import Change, Method
from memtrain.audit.repair.work import Rows, Work
from memtrain.models.adapters import targets
from memtrain.models.conditioning import Conditioning
from memtrain.models.lora_files import ADAPTER


class LowRankEdit(Method):
    """Per linear layer W of attention, with inputs x_f at forgotten rows with their captions, x_n at the same rows with
    the empty one, and x_k at kept rows:

        dW = W E[(x_n - x_f) x_f^T] (E[x_f x_f^T] + keep E[x_k x_k^T] + ridge)^-1,  cut to its first R singular values

    the closed form of min E || (W + dW) x_f - W x_n ||^2 + keep E || dW x_k ||^2 (Gandikota et al., WACV 2024, *Unified
    Concept Editing*, there of the cross-attention's keys and values alone). Its steps are strengths, of which the
    first that is enough is kept.

    Args:
        rank: of dW.
        keep: weight of the kept inputs.
        strengths: dW is multiplied by these, one after another.
    """

    trains = False

    def __init__(self, rank: int = 16, keep: float = 1.0, strengths: Sequence[float] = (0.5, 1.0, 1.5, 2.0)):
        if rank < 1:
            raise ValueError(f"method.low_rank.rank must be >= 1, got {rank}")
        if not strengths:
            raise ValueError("method.low_rank.strengths must name at least one")
        self.rank, self.keep, self.strengths = rank, keep, tuple(strengths)

    def changes(self, work: Work) -> Iterator[Change]:
        layers, edits = _layers(work), {}
        with torch.no_grad():
            moments = _moments(work)
            for name, layer in layers.items():
                if name in moments:
                    edits[name] = edit(_weight(layer), moments[name], self.keep, self.rank)
        start = {name: _weight(layer).clone() for name, layer in layers.items()}
        for strength in self.strengths:
            with torch.no_grad():
                for name, (left, right) in edits.items():
                    _apply(layers[name], start[name], strength * left, right)
            yield Change(float("nan"), work.kept_moved(0))


class Moments:
    """What an edit needs of a layer's inputs, (D, D) each, whatever many there are."""

    def __init__(self):
        self.forgotten = self.moved = self.kept = 0.0  # x_f x_f^T, (x_n - x_f) x_f^T, x_k x_k^T, sums
        self.counts = [0, 0]  # of x_f and of x_k

    def add(self, x_f: Tensor, x_n: Tensor) -> None:
        """(n, D) each, of the same places."""
        x_f, x_n = x_f.double(), x_n.double()
        self.forgotten, self.moved = self.forgotten + x_f.T @ x_f, self.moved + (x_n - x_f).T @ x_f
        self.counts[0] += len(x_f)

    def add_kept(self, x_k: Tensor) -> None:
        """(m, D)"""
        self.kept = self.kept + x_k.double().T @ x_k.double()
        self.counts[1] += len(x_k)


def edit(weight: Tensor, moments: Moments, keep: float, rank: int) -> tuple[Tensor, Tensor]:
    """dW as (O, R) and (R, D), see `LowRankEdit`.

    Args:
        weight: (O, D).
    """
    weight, (forgotten, kept) = weight.double(), moments.counts
    second = moments.forgotten / forgotten + keep * moments.kept / kept  # (D, D)
    second += 1e-3 * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype, device=second.device)
    moved = moments.moved / forgotten  # (D, D)
    change = weight @ torch.linalg.solve(second, moved.T).T  # moved second^-1: second is symmetric
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()


def _layers(work: Work) -> dict[str, nn.Module]:
    """The linear layers that are edited: those with an adapter, or those of attention."""
    network = work.model.network
    adapted = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear)
    }
    names = [] if adapted else targets({"network": network}, ["attention"])["network"]
    return adapted or {name: network.get_submodule(name) for name in names}


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_base_layer().weight if isinstance(layer, LoraLayer) else layer.weight


def _apply(layer: nn.Module, start: Tensor, left: Tensor, right: Tensor) -> None:
    """Make the layer's weights those of the start, and left @ right."""
    if not isinstance(layer, LoraLayer):
        layer.weight.copy_((start.float() + left @ right).to(start.dtype))
        return
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    rank = min(len(a), len(right))
    a.zero_()
    b.zero_()
    a[:rank] = right[:rank]
    b[:, :rank] = left[:, :rank] / layer.scaling[ADAPTER]


def _moments(work: Work) -> dict[str, Moments]:
    """Of each layer that has as many inputs with a caption as without."""
    rows, kept = work.forgotten_rows(0, 4 * len(work.forgotten)), work.kept_rows(0, 32)
    found: dict[str, Moments] = defaultdict(Moments)

    def of_forgotten(some: range) -> None:
        part = rows.part(some)
        x_f, x_n = _inputs(work, part, part.cond), _inputs(work, part, work.null(part))
        for name in x_f:
            if len(x_f[name]) == len(x_n[name]):
                found[name].add(x_f[name], x_n[name])

    def of_kept(some: range) -> None:
        part = kept.part(some)
        for name, inputs in _inputs(work, part, part.cond).items():
            if name in found:
                found[name].add_kept(inputs)

    for over in (work.batches.over(len(rows), of_forgotten), work.batches.over(len(kept), of_kept)):
        for _ in over:
            pass
    return found


def _inputs(work: Work, rows: Rows, cond: Conditioning) -> dict[str, Tensor]:
    """(n, D) float32 of each layer, at these rows by the weights that the repair began with."""
    found: dict[str, list[Tensor]] = defaultdict(list)

    def listen(name: str) -> Callable[..., None]:
        return lambda module, args: found[name].append(args[0].detach().flatten(0, -2).float())

    with work.anchor.in_place(work.model):  # its network may be another one
        hooks = [layer.register_forward_pre_hook(listen(name)) for name, layer in _layers(work).items()]
        try:
            work.predict_at_start(rows, cond)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}
