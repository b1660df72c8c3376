"""Do generations copy a training picture, and since when?"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch

from memtrain.callbacks.generation import Compared, compare
from memtrain.callbacks.guard import on_first_rank
from memtrain.callbacks.logging import log_metrics, log_picture
from memtrain.callbacks.looks import Looks, first_samples
from memtrain.callbacks.search import Searched, search
from memtrain.callbacks.steps import AfterEachStep
from memtrain.core.copies import Cut, checked_false_copies, checked_max_rmse, copy_cut, is_copy
from memtrain.core.dose import DoseCurve
from memtrain.core.exclusion import CANARY, GROUP_NAMES, REFERENCE, SACRIFICED
from memtrain.data.canaries import DUPLICATES
from memtrain.data.copies_file import CopyRow, write_copies
from memtrain.data.escaping import as_text
from memtrain.data.groups import Groups
from memtrain.report.copies import counted, doses_by_kind, draw_doses, rates_by_group, rates_by_kind
from memtrain.report.curves import Curve
from memtrain.report.pictures import draw_samples, samples_of_picture
from memtrain.training.encoded import EncodedSamples

log = logging.getLogger(__name__)

Part = tuple[int, EncodedSamples, list[Compared]]  # a group's number, samples, and generations from their captions


class Copies(AfterEachStep):
    """Generates from the captions of canaries and reference samples with the averaged weights, and counts copies.

    A generation is a copy when its latents lie within a cut of the mean latents of the caption's own picture. The run
    sets the cut itself, at its end: the largest distance within which at most `false_copies` of the generations from
    reference captions, which were never trained on, come to any training picture; see `core.copies.copy_cut`. Looks
    in the middle keep their distances, so that who was memorized when is told by that cut; until it is known, what
    they log counts within `max_rmse`. Of a picture with duplicates, its first sample stands for all.

    Logs `copy_rate/<group>` and `copy_rmse/<group>` of each generation and its own picture, `copy_rate_nearest/<group>`
    of it and the nearest training picture, `copy_rate/<kind>` where canaries are of several kinds, and
    `memorized_canaries`, the share of the canaries looked at so far of which at least half of the generations were
    copies at some look. At the end it writes `copies.csv`, a row a generation, `doses.png`, copies by repeats, and
    `samples.png`: some canaries' images beside four generations each.

    Args:
        every: optimizer steps between two looks at some canaries; 0 looks at the end alone.
        watched: so many canaries at each look.
        watched_images_per_prompt: of each of them.
        num_images_per_prompt: of each canary at the end; reference captions get half as many, at least one.
        reference: so many reference captions, at the end.
        num_inference_steps, guidance_scale: of the stock pipeline's sampler.
        max_rmse: no generation beyond this distance is a copy.
        false_copies: the share of the reference captions' generations that may count as copies.
        nearest: training pictures that are searched; of more, so many drawn by seed, and all canaries.
        min_repeats: canaries with fewer are not counted in the rates, only in `copies.csv` and `doses.png`. Where no
            canary has so many, all are counted.
        batch_size: generations at a time.
        shown: canaries in the picture; 0 draws none.
    """

    def __init__(
        self,
        every: int,
        watched: int,
        watched_images_per_prompt: int,
        num_images_per_prompt: int,
        reference: int,
        num_inference_steps: int,
        guidance_scale: float,
        max_rmse: float,
        false_copies: float,
        nearest: int,
        min_repeats: int,
        batch_size: int,
        shown: int,
    ):
        for name, value, least in (
            ("every", every, 0),
            ("watched", watched, 1),
            ("watched_images_per_prompt", watched_images_per_prompt, 1),
            ("num_images_per_prompt", num_images_per_prompt, 1),
            ("reference", reference, 0),
            ("num_inference_steps", num_inference_steps, 1),
            ("nearest", nearest, 1),
            ("min_repeats", min_repeats, 1),
            ("batch_size", batch_size, 1),
            ("shown", shown, 0),
        ):
            if value < least:
                raise ValueError(f"callbacks.copies.{name} must be >= {least}, got {value}")
        self.every, self.watched, self.watched_images_per_prompt = every, watched, watched_images_per_prompt
        self.num_images_per_prompt, self.reference = num_images_per_prompt, reference
        self.options = (num_inference_steps, guidance_scale, batch_size)
        self.max_rmse = checked_max_rmse(max_rmse, "callbacks.copies.max_rmse")
        self.false_copies = checked_false_copies(false_copies, "callbacks.copies.false_copies")
        self.nearest, self.min_repeats, self.shown = nearest, min_repeats, shown
        self.looks = Looks()
        self.cut: Cut | None = None  # known at the end, and so are these three
        self.searched: Searched | None = None
        self.rows: list[CopyRow] = []
        self.doses: dict[str, DoseCurve] = {}
        self._watched: list[tuple[EncodedSamples, np.ndarray]] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        groups = trainer.datamodule.groups
        most = max((canary.repeats for canary in groups.canaries[groups.num_sacrificed :]), default=0)
        if 0 < most < self.min_repeats:  # a rate of no canary would say nothing
            log.info(
                "no canary comes callbacks.copies.min_repeats=%d times, the most frequent one %d: all are counted",
                self.min_repeats,
                most,
            )
            self.min_repeats = 1

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if self.every and step % self.every == 0 and step != trainer.max_steps:
            self._watch(trainer, pl_module)

    @torch.no_grad()
    def _watch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at some canaries that rates count, the same ones each time."""
        groups = trainer.datamodule.groups
        if self._watched is None:
            # evenly spread over both groups, one after the other, and sorted into them again
            both = np.concatenate([groups.one_each(groups.sacrificed), groups.one_each(groups.canary)])
            both = both[groups.repeats_of(both) >= self.min_repeats]
            chosen = both[:: max(1, -(-len(both) // self.watched))]
            self._watched = [
                (pl_module.encode_samples(list(dict.fromkeys(looked.flat))), looked)
                for number in (SACRIFICED, CANARY)
                for looked in [groups.looked_at(chosen[groups.of(chosen) == number], self.watched_images_per_prompt)]
            ]
        with pl_module.averaged_weights():
            for samples, looked in self._watched:
                found = compare(
                    trainer, pl_module, samples, _wanted(samples, looked), *self.options, with_latents=False
                )
                self._note(trainer, samples, found)
        curves = self.looks.curves(groups, self.max_rmse, self.min_repeats)
        now = {name: values[-1] for name, (steps, values) in curves.items() if steps[-1] == trainer.global_step}
        log_metrics(trainer, now | self.looks.medians(groups, trainer.global_step))

    def _note(self, trainer: pl.Trainer, samples: EncodedSamples, found: list[Compared]) -> None:
        """Keep the distances of these generations from captions of canaries."""
        numbers = trainer.datamodule.groups.canary_of(samples.positions.cpu().numpy()).tolist()
        for one in found:
            self.looks.add(trainer.global_step, numbers[one.sample], one.rmse)

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups: Groups = trainer.datamodule.groups
        fewer, parts = max(1, self.num_images_per_prompt // 2), []
        self.looks.forget(
            trainer.global_step
        )  # a run that was stopped early has looked there, at other weights perhaps
        with pl_module.averaged_weights():
            for number, looked in (
                (SACRIFICED, groups.looked_at(groups.sacrificed, self.num_images_per_prompt)),
                (CANARY, groups.looked_at(groups.canary, self.num_images_per_prompt)),
                (REFERENCE, groups.reference[: self.reference, None].repeat(fewer, axis=1)),
            ):
                samples = pl_module.encode_samples(list(dict.fromkeys(looked.flat)))
                wanted = _wanted(samples, looked)
                found = compare(trainer, pl_module, samples, wanted, *self.options, with_latents=True)
                if number != REFERENCE:
                    self._note(trainer, samples, found)
                parts.append((number, samples, found))
        generated = [one.latents for _, _, found in parts for one in found if one.latents is not None]
        self.searched = search(trainer, pl_module, generated, self.nearest)
        self._judge(trainer, parts, self.searched)
        self.doses = doses_by_kind(self.rows)
        if self.rows:
            self._log(trainer)
            self._write(trainer)
            _, samples, found = parts[1]
            if self.shown and found:  # when all is measured
                self._draw(trainer, pl_module, samples, found)

    def _judge(self, trainer: pl.Trainer, parts: list[Part], searched: Searched) -> None:
        """Set the cut by the reference captions' generations, and note of each generation what it came to."""
        data, groups = trainer.datamodule, trainer.datamodule.groups
        distances, positions = searched.rmse, searched.positions
        numbers = [number for number, _, found in parts for _ in found]
        of = [int(samples.positions[one.sample]) for _, samples, found in parts for one in found]
        captions = [samples.captions[one.sample] for _, samples, found in parts for one in found]
        generations = [one for _, _, found in parts for one in found]
        chance = distances[torch.tensor(numbers) == REFERENCE]
        self.cut = copy_cut(chance[chance.isfinite()], self.max_rmse, self.false_copies)
        log.info("a copy lies within %.3f: %s", self.cut.distance, self.cut.why)
        keys = {p: as_text(data.samples.key(p)) for p in sorted({*of, *positions.tolist()} - {-1})} | {-1: ""}
        who = np.array(of, dtype=np.int64)
        canary, kinds, repeats = groups.canary_of(who).tolist(), groups.kind_of(who), groups.repeats_of(who).tolist()
        self.rows = [
            CopyRow(
                group=GROUP_NAMES[numbers[n]],
                canary=None if numbers[n] == REFERENCE else canary[n],
                kind=kinds[n],
                repeats=repeats[n],
                key=keys[of[n]],
                caption=as_text(captions[n]),
                generation=one.generation,
                rmse=one.rmse,
                nearest_rmse=distances[n].item(),
                nearest_key=keys[int(positions[n])],
                is_copy=is_copy(one.rmse, self.cut.distance),
            )
            for n, one in enumerate(generations)
        ]

    def _log(self, trainer: pl.Trainer) -> None:
        rows = self.counted()
        metrics = {f"copy_rate/{group}": found.rate for group, found in rates_by_group(rows).items()}
        for group, found in rates_by_group(rows, self.cut.distance).items():
            metrics[f"copy_rate_nearest/{group}"] = found.rate
            metrics[f"copy_rmse/{group}"] = float(np.median([row.rmse for row in rows if row.group == group]))
        kinds = rates_by_kind(rows)
        if len(kinds) > 1:  # a kind that is called as a group is has no column of its own
            metrics = {f"copy_rate/{kind}": found.rate for kind, found in kinds.items()} | metrics
        curves = self.curves(trainer)  # none without canaries
        metrics |= {name: values[-1] for name, (_, values) in curves.items() if name == "memorized_canaries"}
        log_metrics(trainer, metrics)

    def counted(self) -> list[CopyRow]:
        """The last look's generations that rates are of."""
        return counted(self.rows, self.min_repeats)

    def curves(self, trainer: pl.Trainer) -> dict[str, Curve]:
        """`copy_rate/<group>` and `memorized_canaries` of all looks, by the cut."""
        return self.looks.curves(trainer.datamodule.groups, cut_of(trainer, self.max_rmse), self.min_repeats)

    def memorized_at(self, trainer: pl.Trainer) -> dict[str, int | None]:
        """The step of the first look at which each canary looked at was memorized, by its key; None: not yet."""
        found = self.looks.memorized_at(cut_of(trainer, self.max_rmse))
        firsts = first_samples(trainer.datamodule.groups)
        key, order = trainer.datamodule.samples.key, sorted(found, key=firsts.__getitem__)
        return {as_text(key(firsts[number])): found[number] for number in order}

    @on_first_rank
    def _write(self, trainer: pl.Trainer) -> None:
        """Write `copies.csv`, and `doses.png` where canaries have several doses."""
        folder = Path(trainer.default_root_dir)
        write_copies(folder / "copies.csv", self.rows)
        if any(len(curve.repeats) > 1 for curve in self.doses.values()):
            chance = rates_by_group(self.rows).get(GROUP_NAMES[REFERENCE])
            draw_doses(folder / "doses.png", self.doses, chance and chance.rate)
            log_picture(trainer, "copies_by_repeats", folder / "doses.png")

    @on_first_rank
    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, samples, found: list[Compared]) -> None:
        """Write `samples.png`: a row a canary, the most repeated first, its image and its first four generations."""
        data, groups = trainer.datamodule, trainer.datamodule.groups
        positions = samples.positions.cpu().numpy()
        canary = groups.canary_of(positions)
        repeats = dict(zip(canary.tolist(), groups.repeats_of(positions).tolist(), strict=True))  # in order of the rows
        shown = sorted(repeats, key=repeats.__getitem__, reverse=True)[: self.shown]  # stable
        first = np.array([int(np.argmax(canary == number)) for number in shown])  # rows of the samples
        originals = data.decode(positions[first].tolist()).images.permute(0, 2, 3, 1).numpy()
        sizes, kinds = groups.pictures.copies(positions), groups.kind_of(positions)
        rows = []
        for number, original, row in zip(shown, originals, first.tolist(), strict=True):
            of = [one for one in found if canary[one.sample] == number][:4]
            images = pl_module.model.decode(torch.stack([one.latents for one in of]))
            said = f"{kinds[row]}, {repeats[number]} repeat{'s' * (repeats[number] > 1)}"
            if kinds[row] == DUPLICATES:
                said = samples_of_picture(sizes[row])
            rows.append((f"{said}: {samples.captions[row]}", original, images, [one.rmse for one in of]))
        path = Path(trainer.default_root_dir) / "samples.png"
        draw_samples(path, rows, self.cut.distance)
        log_picture(trainer, "samples", path)

    def state_dict(self) -> dict:
        return {"looks": self.looks.distances}

    def load_state_dict(self, state_dict: dict) -> None:
        self.looks.distances = {step: dict(look) for step, look in state_dict.get("looks", {}).items()}


def _wanted(samples: EncodedSamples, looked: np.ndarray) -> list[tuple[int, int]]:
    """(row of the samples, number of the generation) of each that is wanted and can be read. looked (canaries, G)"""
    rows = {position: row for row, position in enumerate(samples.positions.tolist())}
    return [(rows[p], g) for line in looked.tolist() for g, p in enumerate(line) if p in rows]


def cut_of(trainer: pl.Trainer, bound: float) -> float:
    """The run's cut where it is known by now, but never above `bound`."""
    cuts = [look.cut.distance for look in trainer.callbacks if isinstance(look, Copies) and look.cut is not None]
    return min([bound, *cuts])
