"""Captions of a sample: its text, or a column of its json that holds one or several."""

from __future__ import annotations

import numpy as np

from memtrain.data.columns import parse_json
from memtrain.data.open_shards import OpenShard


class Captions:
    """Reads the captions that `data.caption` names.

    Args:
        column: `txt`, or a column of the json.
    """

    def __init__(self, column: str):
        self.column = column

    def all(self, shard: OpenShard, record: np.void) -> list[str]:
        """All captions of a sample; none where its json has no text in that column."""
        if self.column == "txt":
            return [shard.read(record["caption"]).decode("utf-8", errors="replace").strip()]
        found = parse_json(shard.read_json(record)).get(self.column)
        many = found if isinstance(found, list) else [found]
        return [text.strip() for text in many if isinstance(text, str)]

    def one(self, shard: OpenShard, record: np.void, share: float) -> str:
        """The caption that lies at this share, in [0, 1), of the list of them; empty where there is none."""
        texts = self.all(shard, record)
        return texts[int(share * len(texts))] if texts else ""
