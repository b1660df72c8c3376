"""Files and folders that appear under their name when they are whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_aside(path: Path, shared: bool = False) -> Iterator[Path]:
    """A hidden path beside `path` to write a file or a folder at; it takes the name `path` once the block is left.

    Nobody ever sees half a file: until then an older file stays, and where the block raises, what it wrote is removed.

    Args:
        path: in a folder that is there. A file is replaced, and so is an empty folder by a folder.
        shared: others may write the same file at the same time, each aside; the last one's stays. Otherwise the name
            aside is always the same, so that the next writer replaces what a killed one left.
    """
    aside = path.with_name(f".{secrets.token_hex(4)}.{path.name}" if shared else f".{path.name}")
    aside.unlink(missing_ok=True)
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        _remove(aside)
        raise


def json_of(content: Any) -> str:
    """JSON text, with null in the place of nan and infinity, which JSON does not know."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
