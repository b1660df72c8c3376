"""The plainest tars: members as they are given, samples of one colour."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

Members = list[tuple[str, bytes]]


def picture(colour=(200, 30, 30), size=(40, 30), form="JPEG", mode="RGB", **save) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(out, form, **save)
    return out.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, caption: str = "a caption", image: bytes | None = None, ext="jpg") -> Members:
    return [
        (f"{key}.{ext}", picture() if image is None else image),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps({"key": key}).encode()),
    ]
