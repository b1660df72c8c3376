"""Many samples found by their names, `SHARD.tar/KEY`, at once: no loop over what a corpus has 400 million of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def as_names(texts: Sequence[str]) -> pa.Array:
    """Names as an array of their bytes; those of a file that are not UTF-8 are kept."""
    return pa.array([text.encode("utf-8", "surrogateescape") for text in texts], pa.large_binary())


def by_shard(names: pa.Array | pa.ChunkedArray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """For each shard that names begin with: its name, which of the names do, and the keys that follow.

    Args:
        names: (n,) text, or the bytes of `as_names`.

    Yields:
        A name, (m,) int64 sorted, (m,) bytes; names that begin with no shard are passed over.
    """
    names = names.cast(pa.large_binary())
    names = names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names
    parts = pc.extract_regex(names, r"(?s)^(?P<home>.*\.tar)/(?P<key>.*)$")
    homes, keys = pc.struct_field(parts, "home").dictionary_encode(), pc.struct_field(parts, "key")
    codes = pc.fill_null(homes.indices, -1).to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(homes.dictionary) + 1))
    for code, home in enumerate(homes.dictionary.to_pylist()):
        which = order[bounds[code] : bounds[code + 1]]
        if len(which):
            found = np.array(keys.take(pa.array(which)).to_pylist(), dtype=np.bytes_)
            yield home.decode("utf-8", "surrogateescape"), which, found


def places(wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each wanted key stands among a shard's; -1 where it does not. (n,), (m,) bytes -> (n,) int64"""
    if len(keys) == 0:
        return np.full(len(wanted), -1, dtype=np.int64)
    sorter = np.argsort(keys, kind="stable")
    place = sorter[np.searchsorted(keys, wanted, sorter=sorter).clip(max=len(keys) - 1)]
    return np.where(keys[place] == wanted, place, -1)
