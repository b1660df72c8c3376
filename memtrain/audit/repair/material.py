"""What a repair works on: the pictures that are to be forgotten, and those that are to stay.

Shapes: N pictures to forget, K kept ones, C x H x W latents.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memtrain.audit.batches import ShrinkingBatches
from memtrain.audit.denoiser import Denoiser, generation_seeds
from memtrain.audit.pictures import encode_images
from memtrain.audit.repair.forget_list import Entry
from memtrain.audit.sampling import generate
from memtrain.audit.training_samples import draw_positions
from memtrain.core.copies import rmse_of_all
from memtrain.core.files import written_aside
from memtrain.core.streams import Stream, place_seed
from memtrain.data.images import BadSample, decode_image
from memtrain.data.samples import ShardSamples

log = logging.getLogger(__name__)

_MEDOID_OF = 4  # generations of a prompt whose picture is not at hand


@dataclass(frozen=True)
class CaptionedPictures:
    """Captioned pictures as a model sees them."""

    captions: list[str]
    latents: Tensor  # (N, C, H, W) scaled, on the CPU
    names: list[str]  # of each: a sample's key, a file's path, or "" where the model drew it itself

    def __len__(self) -> int:
        return len(self.captions)

    def index(self, rows: Sequence[int]) -> CaptionedPictures:
        return CaptionedPictures(
            [self.captions[row] for row in rows], self.latents[list(rows)], [self.names[r] for r in rows]
        )

    @staticmethod
    def cat(parts: Sequence[CaptionedPictures]) -> CaptionedPictures:
        return CaptionedPictures(
            [caption for part in parts for caption in part.captions],
            torch.cat([part.latents for part in parts]),
            [name for part in parts for name in part.names],
        )

    def save(self, path: Path, **about: str) -> None:
        """Write them; `about` is read back by `load`."""
        written = {"captions": json.dumps(self.captions), "names": json.dumps(self.names), **about}
        with written_aside(path) as aside:
            save_file({"latents": self.latents.contiguous()}, aside, written)

    @staticmethod
    def load(path: Path) -> tuple[CaptionedPictures, dict[str, str]] | None:
        """What was saved, and what was said about it; None where there is nothing, or a damaged file."""
        try:
            with safe_open(path, "pt") as file:
                about = dict(file.metadata())
                captions, names = json.loads(about.pop("captions")), json.loads(about.pop("names"))
                return CaptionedPictures(captions, file.get_tensor("latents"), names), about
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Drawing:
    """How a repair draws its generations, each from a seed."""

    num_inference_steps: int = 50
    guidance_scale: float | None = None  # the family's own
    num_images_per_prompt: int = 4

    def __post_init__(self):
        for name in ("num_inference_steps", "num_images_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    def draw(
        self,
        denoiser: Denoiser,
        captions: Sequence[str],
        seed: int,
        batches: ShrinkingBatches,
        count: int | None = None,
    ) -> Tensor:
        """(N, G, C, H, W) scaled latents on the CPU, G generations of each caption."""
        count = count or self.num_images_per_prompt
        prompts = [caption for caption in captions for _ in range(count)]
        seeds = [own for caption in captions for own in generation_seeds(caption, count, seed)]

        def work(rows: range) -> Tensor:
            cond = denoiser.encode([prompts[row] for row in rows])
            own = [seeds[row] for row in rows]
            return generate(denoiser, cond, own, self.num_inference_steps, self.guidance_scale).float().cpu()

        with torch.no_grad():
            return torch.cat(list(batches.over(len(prompts), work))).unflatten(0, (len(captions), count))

    def passes(self, captions: int) -> int:
        """Rows that a network predicts for the generations of so many captions."""
        return 2 * captions * self.num_images_per_prompt * self.num_inference_steps


def forgotten_pictures(
    denoiser: Denoiser,
    entries: Sequence[Entry],
    samples: ShardSamples | None,
    sampling: Drawing,
    seed: int,
    batches: ShrinkingBatches,
) -> CaptionedPictures:
    """The pictures of a forget list, encoded, each once under each of its captions. A prompt without one has that of
    its generations which is nearest to the others: what a model has learnt by heart it draws from any noise.

    Raises:
        ValueError: in one line, there are keys and no shards, a key is not in them, or a picture cannot be read.
    """
    keyed = [entry.key for entry in entries if entry.key is not None]
    if keyed and samples is None and any(entry.caption is None for entry in entries if entry.file is None):
        raise ValueError(f"forget names samples such as {keyed[0]} and no captions; say data=SHARDS, which hold them")
    positions = {} if samples is None else dict(zip(keyed, samples.find(keyed).tolist(), strict=True))
    size, found, seen = denoiser.model.own_size, [], set()
    for entry in entries:
        pixels, caption = None, entry.caption
        if entry.file is not None:
            pixels = _read_file(entry.file, size)
        elif entry.key in positions:
            try:
                image, own, _ = samples.get(positions[entry.key], size=size)  # type: ignore[union-attr]
            except BadSample as problem:
                raise ValueError(f"forget: {entry.key} cannot be read ({problem}); take it off the list") from None
            pixels, caption = image.transpose(1, 2, 0), caption or own
        if not caption:
            raise ValueError(f"forget: {entry.key or entry.file} has no caption; give it one in a column caption")
        if entry.picture is not None and (entry.picture, caption) in seen:
            continue
        seen.add((entry.picture, caption))
        found.append((caption, pixels, entry.key or str(entry.file or "")))
    drawn = [caption for caption, pixels, _ in found if pixels is None]
    own_pictures = iter(_medoids(denoiser, drawn, sampling, seed, batches))
    given = [pixels for _, pixels, _ in found if pixels is not None]
    encoded = iter(encode_images(denoiser, np.stack(given), batches) if given else ())
    latents = [next(own_pictures) if pixels is None else next(encoded) for _, pixels, _ in found]
    return CaptionedPictures([caption for caption, _, _ in found], torch.stack(latents), [name for _, _, name in found])


def shared_words(captions: Sequence[str], forgotten: Sequence[str]) -> list[int]:
    """How many words each caption has in common with that forgotten one with which it has most."""
    words = [set(caption.lower().split()) for caption in forgotten]
    return [max(len(set(caption.lower().split()) & own) for own in words) for caption in captions]


def least_like(captions: Sequence[str], forgotten: Sequence[str], count: int) -> list[str]:
    """So many of these captions, each once, that have the fewest words in common with forgotten ones; in their order
    where they have as many.
    """
    distinct = list(dict.fromkeys(captions))
    shared = shared_words(distinct, forgotten)
    return [distinct[place] for place in np.argsort(shared, kind="stable")[:count]]


def _read_file(file: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        image = decode_image(file.read_bytes(), *size)
    except (OSError, BadSample, Image.DecompressionBombError) as problem:
        raise ValueError(f"forget: {file} cannot be read ({problem}); mend its path, or take it off the list") from None
    return np.asarray(image).transpose(1, 2, 0) if len(image) == 3 else np.asarray(image)


def _medoids(
    denoiser: Denoiser, captions: list[str], sampling: Drawing, seed: int, batches: ShrinkingBatches
) -> list[Tensor]:
    """Of each prompt's generations the one with the least distance to the others, (C, H, W)."""
    if not captions:
        return []
    drawn = sampling.draw(denoiser, captions, seed, batches, max(_MEDOID_OF, sampling.num_images_per_prompt))
    return [own[rmse_of_all(own, own).sum(dim=1).argmin()] for own in drawn]


def kept_from_shards(
    denoiser: Denoiser, samples: ShardSamples, count: int, forgotten: CaptionedPictures, max_rmse: float, seed: int,
    batches: ShrinkingBatches,
) -> CaptionedPictures:  # fmt: skip
    """CaptionedPictures of shards that are to stay, drawn by seed, without those that show a picture that is to go.

    Args:
        count: so many are drawn.
        max_rmse: a picture whose latents lie within this of a forgotten one's shows it, whatever its caption.

    Raises:
        ValueError: nothing is left: the list is the whole corpus.
    """
    size, read, skipped = denoiser.model.own_size, [], 0
    for position in draw_positions(samples, count, place_seed(seed, Stream.KEPT, 0, 0)):
        try:
            image, caption, _ = samples.get(position, size=size)
        except BadSample as problem:
            log.warning("left out %s: %s", samples.key(position), problem)
            continue
        if caption:
            read.append((caption, image.transpose(1, 2, 0), samples.key(position)))
        else:
            skipped += 1
    kept = CaptionedPictures([], torch.zeros(0, *denoiser.latent_shape), [])
    if read:
        latents = encode_images(denoiser, np.stack([pixels for _, pixels, _ in read]), batches)
        kept = CaptionedPictures([caption for caption, _, _ in read], latents, [name for *_, name in read])
        kept = without(kept, forgotten, max_rmse)
    if not len(kept):
        raise ValueError(
            f"keep: each of its {len(read)} captioned pictures is to be forgotten; nothing is left that could stay. "
            "Name shards with other pictures, or a shorter list"
        )
    log.info(
        "%d kept pictures, %d left out that show what is forgotten, %d without a caption",
        len(kept), len(read) - len(kept), skipped,
    )  # fmt: skip
    return kept


def without(pictures: CaptionedPictures, forgotten: CaptionedPictures, max_rmse: float) -> CaptionedPictures:
    """Those of K pictures whose latents lie further than `max_rmse` from each forgotten one's."""
    apart = rmse_of_all(pictures.latents, forgotten.latents).amin(dim=1)  # (K,)
    return pictures.index([row for row, distance in enumerate(apart.tolist()) if distance > max_rmse])


def watched_of(
    kept: CaptionedPictures, forgotten: CaptionedPictures, count: int
) -> tuple[list[str], CaptionedPictures]:
    """Kept captions that are drawn before and after, those first that share most words with a forgotten one; and the
    other kept pictures: what is watched is not trained on."""
    distinct = [caption for caption in dict.fromkeys(kept.captions) if caption not in forgotten.captions]
    shared = dict(zip(distinct, shared_words(distinct, forgotten.captions), strict=True))
    watched = sorted(distinct, key=lambda caption: -shared[caption])[: min(count, len(distinct) // 2)]
    return watched, kept.index([row for row, caption in enumerate(kept.captions) if caption not in watched])


def kept_of_its_own(
    denoiser: Denoiser,
    captions: Sequence[str],
    count: int,
    forgotten: CaptionedPictures,
    max_rmse: float,
    sampling: Drawing,
    seed: int,
    batches: ShrinkingBatches,
    cache: Path,
) -> CaptionedPictures:
    """The model's own generations from harmless captions, as many as `count`, made once and read from `cache` then.

    Args:
        captions: harmless ones; each is drawn several times where they are fewer than `count`.

    Raises:
        ValueError: there is no caption, or all generations show what is to be forgotten.
    """
    if not captions:
        raise ValueError("without keep=SHARDS harmless captions are needed; say captions=FILE, or keep=SHARDS")
    captions = list(captions)[:count]
    each = replace(sampling, num_images_per_prompt=-(-count // len(captions)))
    said = f"{denoiser.fingerprint()} {captions} {each} {seed}"
    identity = hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()
    saved = CaptionedPictures.load(cache)
    if saved is not None and saved[1].get("identity") == identity:
        made = saved[0]
    else:
        drawn = each.draw(denoiser, captions, seed, batches)
        told = [caption for caption in captions for _ in range(each.num_images_per_prompt)]
        made = CaptionedPictures(told, drawn.flatten(0, 1), [""] * len(told))
        cache.parent.mkdir(parents=True, exist_ok=True)
        made.save(cache, identity=identity)
    kept = without(made, forgotten, max_rmse)
    if not len(kept):
        raise ValueError(
            f"all {len(made)} generations from harmless captions show what is to be forgotten; say captions=FILE with "
            "others, or keep=SHARDS"
        )
    return kept
