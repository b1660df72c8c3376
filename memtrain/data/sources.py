"""What `data.shards` names: shards on disk or behind a URL, in one or several sources with weights."""

from __future__ import annotations

import math
import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from memtrain.data import stores
from memtrain.data.paths import expand, is_remote, scheme_of
from memtrain.data.shards import find_shards

_STORE_FOLDER = "name a folder of shards that may be read, a tar or a brace pattern"


@dataclass(frozen=True)
class Shard:
    """A tar: where it is, what its samples' keys begin with, and how often an epoch sees each of them."""

    url: str
    name: str
    weight: float

    @property
    def is_remote(self) -> bool:
        return is_remote(self.url)


@dataclass(frozen=True)
class LocalShard:
    """A tar that a command looks at as a whole, and its name, with which its samples' keys begin.

    Args:
        path: where it lies on disk; of one behind a URL, what tells it apart.
        url: where it is fetched from, see `memtrain.data.staged.on_disk`; empty: it is on disk.
    """

    path: Path
    name: str
    url: str = ""


def find_sources(spec: str | Mapping | Sequence[str | Mapping]) -> list[Shard]:
    """The shards of `data.shards`, in order.

    Args:
        spec: a folder, a tar, a brace pattern, a URL (`https://…/{00000..00041}.tar`, `s3://…`, `pipe:…`), a folder of
            an object store, a mapping `{shards: …, weight: 2}`, or a list of these.

    Raises:
        ValueError: nothing is there, a shard is named twice, a weight is not a number above 0.
    """
    urls: list[tuple[str, float]] = []
    for source in [spec] if isinstance(spec, (str, Mapping)) else spec:
        named, weight = _parse(source)
        for part in [named] if isinstance(named, str) else named:
            if is_remote(part):
                found = [url for expanded in expand(part) for url in _tars_of(expanded)]
            else:
                found = [os.path.abspath(path) for path in find_shards(part.removeprefix("file://"))]
            urls += [(url, weight) for url in found]
    if not urls:
        raise ValueError("data.shards is empty; name a folder, a tar, a brace pattern or a URL")
    names = _names([url for url, _ in urls])
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"data.shards names {repeated[0]} twice; name each shard once, and give it a weight")
    return [Shard(url, name, weight) for (url, weight), name in zip(urls, names, strict=True)]


def check_fetch(fetch: str, shards: Sequence[Shard]) -> None:
    """Raises ValueError where `data.fetch` is no such word, or asks for ranges of what has none."""
    if fetch not in ("shards", "samples"):
        raise ValueError(f"data.fetch must be shards or samples, got {fetch}")
    without = [shard for shard in shards if shard.is_remote and not stores.has_ranges(shard.url)]
    if fetch == "samples" and without:
        raise ValueError(
            f"data.fetch=samples reads ranges of bytes, and {without[0].name} has none "
            f"({stores.remedy(without[0].url)}); or use data.fetch=shards"
        )


def local_shards(spec: Sequence[str]) -> list[LocalShard]:
    """The shards that these folders, tars, brace patterns and URLs of object stores name.

    Raises:
        ValueError: nothing is there, or it is neither on a local disk nor in a store that can be read.
    """
    shards = find_sources(list(spec))
    for shard in shards:
        if shard.is_remote and not stores.is_store(shard.url):
            remedy = stores.remedy(shard.url) if scheme_of(shard.url) in stores.STORES else "copy the shards first"
            raise ValueError(f"{shard.name} is neither on a local disk nor in an object store; {remedy}")
    return [LocalShard(Path(shard.url), shard.name, shard.url if shard.is_remote else "") for shard in shards]


def _tars_of(url: str) -> list[str]:
    """A URL itself, or the tars in it where it is a folder of a store.

    Raises:
        ValueError: there is none, or the store does not say.
    """
    if scheme_of(url) not in stores.STORES or url.endswith(".tar"):
        return [url]
    if not stores.is_store(url):
        raise ValueError(f"data.shards={url}: to list a folder of a store, {stores.remedy(url)}; or name its tars")
    try:
        found = stores.tars_in(url)
    except OSError as error:
        raise ValueError(
            f"data.shards={url} cannot be listed ({' '.join(str(error).split())}); {_STORE_FOLDER}"
        ) from error
    if not found:
        raise ValueError(f"data.shards={url}: the folder has no .tar in it; {_STORE_FOLDER}")
    return found


def _parse(source: str | Mapping) -> tuple[str | Sequence[str], float]:
    if isinstance(source, str):
        return source, 1.0
    unknown = set(source) - {"shards", "weight"}
    if unknown or "shards" not in source:
        raise ValueError(f"data.shards: a source has the keys shards and weight, got {', '.join(source)}")
    weight = source.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"data.shards: weight must be a number above 0, got {weight}")
    return source["shards"], float(weight)


def _names(urls: Sequence[str]) -> list[str]:
    """Each shard's path below the folder that all have in common."""
    paths = [_path(url) for url in urls]
    common = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    return [path[len(common) :].lstrip("/") for path in paths]


def _path(url: str) -> str:
    """A path that tells shards apart and holds no secret of a URL."""
    if not is_remote(url):
        return url.replace(os.sep, "/")
    if url.startswith("pipe:"):
        last = url.removeprefix("pipe:").split()[-1]
        return _path(last) if "://" in last else f"/{last.lstrip('/')}"
    parts = urlsplit(url)
    return f"/{parts.hostname or ''}{parts.path}"
