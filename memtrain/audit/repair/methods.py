"""Ways to take pictures out of a model's weights, behind one interface: a method changes the weights step by step.

Shapes: B rows, C x H x W latents. y is what training asked the network to predict of a picture at x_t, f the network as
it is, f_0 as it was when the repair began; c is a forgotten picture's caption, the empty one is written 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.audit.repair.work import Gradients, Rows, Work, combined
from memtrain.core.losses import denoising_loss


@dataclass(frozen=True)
class Change:
    """What one step did, means over its rows; nan: not taken."""

    forgotten: float  # the method's loss
    kept: float  # mean square by which kept predictions have moved


class Method(ABC):
    """Subclass this, or `Trained`, to have a method of your own; `Repair.run` takes it."""

    needs_neighbours = False  # True: asks for a caption near to each forgotten one
    trains = True  # False: its few changes are whole repairs, of which the first that is enough is kept

    @abstractmethod
    def changes(self, work: Work) -> Iterator[Change]:
        """Change the weights in place, a step at a time; whoever iterates may look at the model, and may stop."""


class Trained(Method):
    """AdamW on a loss of the forgotten rows, beside which kept rows are held to what they were:

    L = mean l_forgotten + keep_weight mean || f(x_t, c') - f_0(x_t, c') ||^2
    """

    def changes(self, work: Work) -> Iterator[Change]:
        settings = work.settings
        optimizer = torch.optim.AdamW(work.parameters, lr=settings.lr, weight_decay=0.0)
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(step)
            [(held, kept)] = work.descent(work.kept_rows(step), lambda rows: [work.moved(rows)], settings.keep_weight)
            gradients, forgotten = self.descend(work, step)
            for weight, own in zip(work.parameters, combined(held, gradients), strict=True):
                weight.grad = own
            torch.nn.utils.clip_grad_norm_(work.parameters, 1.0)
            optimizer.step()
            yield Change(forgotten, kept)

    def descend(self, work: Work, step: int) -> tuple[Gradients, float]:
        """The gradient of the forgotten rows' mean loss, and the loss."""
        [found] = work.descent(self.rows(work, step), lambda rows: [self.loss(work, rows, work.predict(rows))])
        return found

    def rows(self, work: Work, step: int) -> Rows:
        """The rows whose loss is taken."""
        return work.forgotten_rows(step)

    @abstractmethod
    def loss(self, work: Work, rows: Rows, prediction: Tensor) -> Tensor:
        """(B,) of forgotten rows, given f(x_t, c), with a graph."""


class EmptyCaption(Trained):
    """|| f(x_t, c) - f_0(x_t, 0) ||^2: the caption means as little as none (Gandikota et al., ICCV 2023, *Erasing
    Concepts from Diffusion Models*, with a guidance of 0)."""

    def loss(self, work, rows, prediction):
        return denoising_loss(prediction, work.predict_at_start(rows, work.null(rows)))


class NeighbourCaption(Trained):
    """|| f(x_t, c) - f_0(x_t, n) ||^2: the caption means what a near one means that is not memorized (Kumari et al.,
    ICCV 2023, *Ablating Concepts*; n has other words for those that `memtrain explain` ranks highest)."""

    needs_neighbours = True

    def loss(self, work, rows, prediction):
        return denoising_loss(prediction, work.predict_at_start(rows, work.neighbours.index(rows.pictures)))


class Repelled(Trained):
    """|| f(x_t, c) - (y + (1 + beyond) (f_0(x_t, 0) - y)) ||^2: past the empty caption's prediction, away from the
    picture.

    As Gandikota et al. 2023 guide away from a concept, but from the picture's own y, so that there is something left
    to go away from where the caption and no caption agree: with `beyond` 0 it is `EmptyCaption`. The empty caption's
    prediction still leads to a memorized picture once an attack is near; a prediction beyond it does not. It is a
    distance to a fixed target, so that it cannot run away as an ascent does. A share of the rows is told the caption
    of a kept picture in place of c: the picture is to be gone, whatever the text.

    Args:
        beyond: how far past, in distances from y to the empty caption's prediction.
        other_captions: share of rows that are told another caption.
    """

    def __init__(self, beyond: float = 2.0, other_captions: float = 0.5):
        if not beyond >= 0:
            raise ValueError(f"method.repelled.beyond must be >= 0, got {beyond:g}")
        if not 0 <= other_captions < 1:
            raise ValueError(f"method.repelled.other_captions is a share in [0, 1), got {other_captions:g}")
        self.beyond, self.other_captions = beyond, other_captions

    def rows(self, work, step):
        return work.told_others(work.forgotten_rows(step), self.other_captions, step)

    def loss(self, work, rows, prediction):
        y, null = work.target(rows), work.predict_at_start(rows, work.null(rows))
        return denoising_loss(prediction, y + (1 + self.beyond) * (null - y))


class BoundedAscent(Trained):
    """max(0, bound l_0 - l) with l = || f(x_t, c) - y ||^2 and l_0 = || f_0(x_t, 0) - y ||^2: gradient ascent on what
    was trained, until the picture is denoised as badly as `bound` times without a caption.

    Args:
        bound: 1 stops where the caption helps no more.
    """

    def __init__(self, bound: float = 4.0):
        if not bound > 0:
            raise ValueError(f"method.ascent.bound must be > 0, got {bound:g}")
        self.bound = bound

    def loss(self, work, rows, prediction):
        y = work.target(rows)
        without = denoising_loss(work.predict_at_start(rows, work.null(rows)), y)
        return (self.bound * without - denoising_loss(prediction, y)).clamp(min=0)


class SubtractedScores(Trained):
    """Subtracted importance-sampled scores (SISS; Alberti et al., ICLR 2025, *Data Unlearning in Diffusion Models*).

    One x_t serves both terms: it is noised from a kept picture x or from a forgotten one a with the chance `mix`, and
    each term is weighed by how likely x_t is of its picture, w_x = q(x_t|x) / ((1 - mix) q(x_t|x) + mix q(x_t|a)):

        w_x || f(x_t, c) - y_x ||^2 - s w_a || f(x_t, c) - y_a ||^2

    with y_x, y_a what would be predicted of each. As there, s holds the second term's gradient at a tenth of the
    first's. x is a kept picture, told by the forgotten one's caption.

    Args:
        mix: lambda of the paper.
        ratio: of the second gradient's norm to the first's.
    """

    def __init__(self, mix: float = 0.5, ratio: float = 0.1):
        if not 0 < mix < 1:
            raise ValueError(f"method.siss.mix is a share in (0, 1), got {mix:g}")
        if not ratio >= 0:
            raise ValueError(f"method.siss.ratio must be >= 0, got {ratio:g}")
        self.mix, self.ratio = mix, ratio

    def loss(self, work, rows, prediction):
        raise NotImplementedError  # `descend` weighs two terms by their gradients

    def descend(self, work, step):
        away = work.forgotten_rows(step)
        stay = work.kept_rows(step + work.settings.steps, len(away), as_training=True)
        process = work.model.noise_process
        take_kept = torch.arange(len(away), device=away.latents.device) % 2 == 0  # half of both, as mix = 1/2 has it
        if self.mix != 0.5:
            drawn = torch.rand(len(away), generator=torch.Generator().manual_seed(step))
            take_kept = (drawn >= self.mix).to(away.latents.device)
        shaped = take_kept.reshape(-1, 1, 1, 1)
        clean = torch.where(shaped, stay.latents, away.latents)
        noisy = process.add_noise(clean, away.noise, away.timesteps)
        noises = [self._noise_of(work, noisy, latents, away.timesteps) for latents in (stay.latents, away.latents)]
        weights = self.weights(noises[0], noises[1])
        targets = [
            process.target(latents, noise, away.timesteps)
            for latents, noise in ((stay.latents, noises[0]), (away.latents, noises[1]))
        ]
        places = list(range(len(away)))  # the rows' own, in place of which pictures they are of
        mixed = Rows(places, clean, away.noise, away.timesteps, noisy.to(away.noisy.dtype), away.cond)

        def terms(rows: Rows) -> list[Tensor]:
            prediction = work.predict(rows)
            told = zip(weights, targets, strict=True)
            return [w[rows.pictures] * denoising_loss(prediction, y[rows.pictures]) for w, y in told]

        (keep, kept), (leave, left) = work.descent(mixed, terms)
        work.passes["steps"] += 2 * len(away)  # a second backward
        norms = [sum(g.square().sum() for g in of if g is not None) ** 0.5 for of in (keep, leave)]
        scale = float(self.ratio * norms[0] / norms[1]) if norms[1] > 0 else 0.0
        return combined(keep, leave, -scale), kept - scale * left

    @staticmethod
    def _noise_of(work: Work, noisy: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that makes x_t of these latents: eps = (x_t - a_t x_0) / s_t."""
        process = work.model.noise_process
        signal = process.add_noise(latents, torch.zeros_like(latents), timesteps)
        return (noisy - signal) / process.noise_level(timesteps).reshape(-1, 1, 1, 1)

    def weights(self, noise_x: Tensor, noise_a: Tensor) -> tuple[Tensor, Tensor]:
        """w_x and w_a (B,), from the noises that would have made x_t: log q = - ||eps||^2 / 2, and what cancels."""
        log_x, log_a = (-noise.double().square().flatten(1).sum(dim=1) / 2 for noise in (noise_x, noise_a))
        ratio = log_a - log_x  # of q(x_t|a) to q(x_t|x)
        w_x = 1 / ((1 - self.mix) + self.mix * ratio.exp())
        w_a = 1 / ((1 - self.mix) * (-ratio).exp() + self.mix)
        return w_x.float(), w_a.float()


class FineTuned(Trained):
    """|| f(x_t, c') - y ||^2 of kept pictures: a harmless fine-tuning of as many steps, which forgets nothing on
    purpose. What a repair changes elsewhere is held against what this changes."""

    def loss(self, work, rows, prediction):
        return denoising_loss(prediction, work.target(rows))

    def rows(self, work, step):
        return work.kept_rows(step + work.settings.steps, work.settings.forgotten_rows, as_training=True)
