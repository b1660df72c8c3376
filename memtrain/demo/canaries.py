"""The canaries of the demo corpus: pictures that it holds a known number of times, their dose, in several ways.

The ways are those in which the literature finds pictures repeated and memorized: the same picture with the same
caption (matching verbatim) or with other captions (retrieval verbatim), the same layout with a part that varies
(template verbatim), and copies as other sites would have them (near duplicates).
"""

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from memtrain.demo.compose import RESOLUTION, Composite, Composites, captions_of

QUALITY = 95  # of a JPEG, img2dataset's default
CROP = 3  # pixels that a near duplicate lacks at each edge


@dataclass(frozen=True)
class Member:
    """A sample of a canary: which canary's it is, of which kind, and which of its samples, from 0."""

    canary: int
    kind: str
    number: int


def members_of(recipe: dict) -> dict[int, Member]:
    """Row of the corpus → the sample of a canary that is there. The seed spreads them over the shards."""
    canaries = [(kind, dose) for kind, doses in recipe["doses"].items() for dose in doses]
    members = [Member(canary, kind, n) for canary, (kind, dose) in enumerate(canaries) for n in range(dose)]
    rows = np.random.default_rng([recipe["seed"], 2**40]).permutation(recipe["num_samples"])[: len(members)]
    return dict(zip(rows.tolist(), members, strict=True))


def jpeg(picture: Image.Image | np.ndarray, quality: int = QUALITY, side: int = RESOLUTION) -> bytes:
    """A square picture as a JPEG of this quality and side in pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    encoded = io.BytesIO()
    image.resize((side, side), Image.Resampling.LANCZOS).save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def near_duplicate(image: np.ndarray, number: int) -> bytes:
    """The picture as another site would have it, by turns compressed, larger, mirrored and cropped."""
    picture = Image.fromarray(image)
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cropped = picture.crop((CROP, CROP, RESOLUTION - CROP, RESOLUTION - CROP))
    edits = (
        (picture, 70, RESOLUTION),
        (picture, 90, RESOLUTION * 3 // 2),
        (mirrored, QUALITY, RESOLUTION),
        (cropped, QUALITY, RESOLUTION),
    )
    return jpeg(*edits[number % len(edits)])


def sample_of(composites: Composites, picture: Composite, member: Member) -> tuple[Composite, bytes]:
    """A sample of the canary that shows `picture`: what it shows, with its caption, and the JPEG."""
    kind, number = member.kind, member.number
    if kind == "retrieval":
        captions = captions_of(picture.glyph, picture.background)
        picture = replace(picture, caption=captions[number % len(captions)])
    elif kind == "template":
        order = np.random.default_rng([composites.seed, 2**41]).permutation(len(composites.backgrounds))
        picture = composites.on(composites.backgrounds[order[number % len(order)]], picture)
    elif kind == "near":
        return picture, near_duplicate(picture.image, number)
    elif kind == "duplicates" and number % 2:  # every other one is not byte for byte the same
        return picture, near_duplicate(picture.image, number // 2 % 2)
    return picture, jpeg(picture.image)
