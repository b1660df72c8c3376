"""Real tars, with the faults that are found in the wild."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from memtrain.data.datamodule import from_shards
from memtrain.data.samples import ShardSamples
from memtrain.data.shards import find_shards, index_shard


def picture(colour=(200, 30, 30), size=(40, 30), form="JPEG", mode="RGB", **save) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(out, form, **save)
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, caption: str = "a caption", image: bytes | None = None, ext="jpg") -> list[tuple[str, bytes]]:
    return [
        (f"{key}.{ext}", picture() if image is None else image),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps({"key": key}).encode()),
    ]


def test_shards_are_found_by_folder_pattern_and_list(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number:05d}.tar", sample("000000000"))
    all_three = [tmp_path / f"{n:05d}.tar" for n in range(3)]
    assert find_shards(str(tmp_path)) == all_three
    assert find_shards(f"{tmp_path}/{{00000..00002}}.tar") == all_three
    assert find_shards([str(all_three[2]), str(all_three[0])]) == [all_three[2], all_three[0]]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{folder}/nothing", "no such shard"),
        ("{folder}/{{00000..00004}}.tar", "no such shard.*00001.tar.*3 more"),
        ("{folder}/empty", "no .tar in it"),
        (["{folder}/00000.tar", "{folder}"], "twice"),
        ([], "is empty"),
    ],
)
def test_shards_that_cannot_be_used_are_named(tmp_path, spec, says):
    write_tar(tmp_path / "00000.tar", sample("000000000"))
    (tmp_path / "empty").mkdir()
    spec = [s.format(folder=tmp_path) for s in spec] if isinstance(spec, list) else spec.format(folder=tmp_path)
    with pytest.raises(ValueError, match=says):
        find_shards(spec)


def test_an_image_meets_its_own_caption_whatever_lies_between(tmp_path):
    colours = {"a": (250, 0, 0), "b": (0, 250, 0), "d": (0, 0, 250)}
    write_tar(
        tmp_path / "x.tar",
        [
            *sample("a", "red", picture(colours["a"])),
            ("c.jpg", picture()),  # no caption
            *sample("b", "green", picture(colours["b"])),
            ("e.txt", b"no image"),
            *sample("d", "blue", picture(colours["d"])),
            *sample("a", "again", picture()),
        ],
    )
    samples = ShardSamples(str(tmp_path), 16)
    assert [samples.key(i) for i in range(len(samples))] == ["x.tar/a", "x.tar/b", "x.tar/d"]
    for index, (channel, caption) in enumerate([(0, "red"), (1, "green"), (2, "blue")]):
        image, text = samples.get(index)
        assert text == caption and image.reshape(3, -1).mean(1).argmax() == channel
    assert dict(samples.skipped()) == {
        "x.tar/c": "no caption",
        "x.tar/e": "no image",
        "x.tar/a": "key occurs twice in the shard",
    }


@pytest.mark.parametrize("cut", ["header", "member", "padding"])
def test_a_cut_tar_keeps_its_whole_samples_and_never_borrows(tmp_path, cut):
    """docs/shards.md: a cut shard followed by one with the same key must not give a chimera."""
    path = write_tar(tmp_path / "00000.tar", sample("000000000", "first") + sample("000000001", "second"))
    write_tar(tmp_path / "00001.tar", sample("000000001", "other shard") + sample("000000002", "third"))
    with tarfile.open(path) as tar:
        second, text = tar.getmember("000000001.jpg"), tar.getmember("000000001.txt")
    end = {
        "header": second.offset + 300,
        "member": second.offset_data + second.size // 2,
        "padding": text.offset,
    }[cut]
    with path.open("r+b") as file:
        file.truncate(end)
    samples = ShardSamples(str(tmp_path), 16)
    assert [(samples.key(i), samples.get(i)[1]) for i in range(len(samples))] == [
        ("00000.tar/000000000", "first"),
        ("00001.tar/000000001", "other shard"),
        ("00001.tar/000000002", "third"),
    ]
    assert any(name.startswith("00000.tar/") for name, _ in samples.skipped())


def test_empty_and_foreign_tars_are_named_and_cost_their_neighbours_nothing(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    (tmp_path / "1.tar").write_bytes(b"<html>not found</html>" * 100)
    write_tar(tmp_path / "2.tar", sample("000000000"))
    samples = ShardSamples(str(tmp_path), 16)
    assert len(samples) == 1
    assert {name.split("/")[0] for name, _ in samples.skipped()} == {"0.tar", "1.tar"}
    with pytest.raises(ValueError, match=r"no sample with an image and a caption.*empty"):
        ShardSamples(str(tmp_path / "0.tar"), 16)


def test_names_in_the_wild(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [("a.b.JPG", picture()), ("a.b.txt", b"dotted"), *sample("sub/c", "nested", ext="webp")],
    )
    index = index_shard(tmp_path / "x.tar")
    assert [entry.key for entry in index.entries] == ["a.b", "sub/c"]


def test_captions_in_any_encoding_and_none(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", picture()), ("a.txt", b"caf\xe9 "), ("b.jpg", picture()), ("b.txt", b"")])
    samples = ShardSamples(str(tmp_path), 16)
    assert samples.get(0)[1] == "caf\ufffd" and samples.get(1)[1] == ""


def test_a_bad_sample_keeps_its_row_and_is_named_once(tmp_path, caplog):
    write_tar(tmp_path / "x.tar", sample("a", "good") + sample("b", "bad", b"<html>") + sample("c", "good too"))
    data = from_shards(str(tmp_path), 16, 1, 0, seed=0, canaries=0, repeats=1, reference=0)
    for _ in range(2):
        batch = data.decode([0, 1, 2])
        assert batch.valid.tolist() == [True, False, True] and batch.captions == ["good", "", "good too"]
        assert batch.images[1].eq(0).all()
    assert [r.message for r in caplog.records if "bad sample" in r.message] == [
        "bad sample x.tar/b: image cannot be decoded (UnidentifiedImageError)"
    ]
    assert data.problems_by_cause() == {"image cannot be decoded (UnidentifiedImageError)": 1}


def test_keys_tell_folders_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000.tar", sample("000000000", name))
    samples = ShardSamples([str(tmp_path / "one"), str(tmp_path / "two")], 16)
    assert {samples.key(i): samples.get(i)[1] for i in range(2)} == {
        "one/00000.tar/000000000": "one",
        "two/00000.tar/000000000": "two",
    }
