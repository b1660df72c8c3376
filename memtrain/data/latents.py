"""Latents and text embeddings of a corpus, computed once by `memtrain cache`, a file a shard.

`00000.tar` gets `00000.tar.latents.safetensors`, beside it or in a folder of its own: the posterior's mean and
standard deviation of each sample, the same of its mirror image where flips are wanted, the caption and its
embedding; of some families a pooled embedding and how the picture was cut. A header says what they were made with;
a run that would compute anything else is refused.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from memtrain.data.images import BadSample
from memtrain.data.samples import ShardSamples
from memtrain.data.view import Sizes

BESIDE = "beside"  # data.cache: the files lie beside the shards
_OPEN_FILES = 32
_SUFFIX = ".latents.safetensors"
_OPTIONAL = ("pooled", "sizes")  # columns that some families have
TOKENS = "hidden_tokens"  # in a header: L, where the zeros at the end of `hidden` are not in the file
HIDDEN_BOUNDS = "hidden_bounds"  # where they are of different lengths: row n lies in hidden[bounds[n] : bounds[n + 1]]

# What a cache must have in common with the run that reads it, and what a person would call it.
MADE_WITH = {
    "family": "another model family",
    "vae": "another VAE",
    "text_encoder": "another text encoder",
    "text_encoder_2": "another text encoder",
    "text_encoder_3": "another text encoder",
    "resolution": "data.resolution",
    "crop": "data.crop",
    "caption": "data.caption",
    "where": "data.where",
    "max_sequence_length": "model.max_sequence_length",
    "t5_padding": "model.t5_padding",
}
_UNSAID = {"family": "StableDiffusion", "t5_padding": "encoded"}  # where a header says nothing of it


@dataclass(frozen=True)
class CachedSample:
    """A sample as the model takes it: its latents' distribution and its encoded caption."""

    # float32, by the field of a `Batch`: posterior (2, C, h, w), mean and standard deviation, unscaled; hidden (L, D);
    # of some families pooled (P,) and sizes (6,)
    columns: dict[str, np.ndarray]
    caption: str


def cache_path(cache: str, shard_url: str, shard_name: str) -> Path:
    """Where the latents of a shard lie: beside it, or in the folder `cache` under the name that its keys have."""
    return Path(shard_url + _SUFFIX) if cache == BESIDE else Path(cache).expanduser() / (shard_name + _SUFFIX)


def read_header(path: Path) -> dict:
    """What the file was made with. Raises ValueError where it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["memtrain"])
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
        return header
    except FileNotFoundError:
        raise ValueError(
            f"data.cache has no {path.name}; run `memtrain cache` with the same data: it goes on"
        ) from None
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"data.cache: {path} cannot be read ({error}); delete it and run `memtrain cache`") from error


def difference(found: Mapping, wanted: Mapping, ignored: tuple[str, ...] = ()) -> str | None:
    """The first thing in which a header is unlike `wanted`, in words."""
    found, wanted = _UNSAID | dict(found), _UNSAID | dict(wanted)
    for name, called in MADE_WITH.items():
        if name not in ignored and found.get(name) != wanted.get(name):
            if called.startswith("another"):
                return called
            return f"{called}={found.get(name)}, not {wanted.get(name)}"
    return None


def shard_state(samples: ShardSamples, number: int) -> dict[str, int | str | None]:
    """What a file's header says of its shard, so that none is taken for that of another state of it."""
    index = samples.indexed.indexes[number]
    return {"shard_size": index.size, "shard_mtime_ns": index.mtime_ns, "chosen": samples.rows.filtered.digest(number)}


def is_of_state(header: Mapping, state: Mapping) -> bool:
    """Whether a header is of this state of its shard. What one of the two does not know is not compared."""
    known = [name for name in state if None not in (header.get(name), state[name])]
    return "shard_size" in known and all(header[name] == state[name] for name in known)


class LatentCache:
    """Reads what `memtrain cache` wrote for the samples of a corpus, in the loader's workers.

    Args:
        cache: `beside`, or a folder.
        samples: the corpus, its filter included.
        crop: `data.crop`; a random one cannot be cached.
        flip: whether mirror images are wanted.
    """

    def __init__(self, cache: str, samples: ShardSamples, crop: str, flip: bool):
        if crop != "center" or len(samples.sizes) > 1:
            raise ValueError(
                "data.cache holds centre squares; use data.crop=center and data.max_aspect_ratio=1, or data.cache=null"
            )
        if cache == BESIDE and any(shard.is_remote for shard in samples.shards):
            raise ValueError("data.cache=beside needs shards on disk; name a folder")
        self.samples, self.flip = samples, flip
        self.paths = [str(cache_path(cache, shard.url, shard.name)) for shard in samples.shards]
        self.made_with: dict = {}  # see `check`
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._open: OrderedDict[int, safe_open] = OrderedDict()

    def check(self, made_with: Mapping, ignored: tuple[str, ...] = ()) -> None:
        """Raise ValueError where the cache was made with something else, naming it, or lacks a shard."""
        self.made_with = {**made_with}
        for number, path in enumerate(self.paths):  # all: where `memtrain cache` was stopped they are of two makes
            self._check_header(Path(path), number, ignored)
        self._shapes = self.shapes()

    def _check_header(self, path: Path, number: int, ignored: tuple[str, ...] = ()) -> None:
        header = read_header(path)
        unlike = difference(header, self.made_with, ignored)
        if unlike is None and self.flip and not header.get("flip"):
            unlike = "data.flip=0: it has no mirror images"
        if unlike is None and not is_of_state(header, shard_state(self.samples, number)):
            unlike = "another state of its shard"
        if unlike is not None:
            raise ValueError(
                f"data.cache: {path.name} was made with {unlike}; run `memtrain cache` with overwrite=true"
            )

    def _file(self, number: int) -> safe_open:
        if number not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._check_header(Path(self.paths[number]), number, ignored=tuple(MADE_WITH))
            self._open[number] = safe_open(self.paths[number], framework="numpy")
        self._open.move_to_end(number)
        return self._open[number]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each column that a `CachedSample` has."""
        if self._shapes is not None:
            return self._shapes
        file = self._file(int(self.samples.counts.argmax()))
        names = ["posterior", "hidden", *(name for name in _OPTIONAL if name in file.keys())]  # noqa: SIM118
        shapes = {name: tuple(file.get_slice(name).get_shape()[1:]) for name in names}
        *tokens, width = shapes["hidden"]  # of captions of different lengths the width alone
        shapes["hidden"] = (int(json.loads(file.metadata()["memtrain"]).get(TOKENS, *tokens)), width)
        return shapes

    def get(self, index: int, flip: bool) -> CachedSample:
        """What is cached of the sample at a position. Raises BadSample where its picture could not be decoded."""
        number, row = self.samples.rows.locate(index)
        file = self._file(number)
        if not file.get_slice("valid")[row : row + 1][0]:
            raise BadSample("image cannot be decoded (said when it was cached)")
        start, end = file.get_slice("caption_bounds")[row : row + 2]
        caption = file.get_slice("captions")[int(start) : int(end)].tobytes().decode("utf-8")
        stored = {name: "posterior_flipped" if flip and name == "posterior" else name for name in self.shapes()}
        columns = {
            name: _hidden(file, row) if name == "hidden" else file.get_slice(column)[row : row + 1][0]
            for name, column in stored.items()
        }
        tokens = self.shapes()["hidden"][0] - len(columns["hidden"])
        if tokens:  # zeros, that the file leaves out
            columns["hidden"] = np.pad(columns["hidden"], ((0, tokens), (0, 0)))
        if flip and "sizes" in columns:
            columns["sizes"] = np.array(Sizes(*columns["sizes"].tolist()).mirrored())
        return CachedSample({name: values.astype(np.float32) for name, values in columns.items()}, caption)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}


def _hidden(file: safe_open, row: int) -> np.ndarray:
    """(l, D), the tokens of a caption that are in the file."""
    if HIDDEN_BOUNDS not in file.keys():  # noqa: SIM118
        return file.get_slice("hidden")[row : row + 1][0]
    start, end = file.get_slice(HIDDEN_BOUNDS)[row : row + 2]
    return file.get_slice("hidden")[int(start) : int(end)]
