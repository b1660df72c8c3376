"""A folder or a table becomes shards that read back as what went in."""

import csv
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from memtrain.cli.shards import shards
from memtrain.data.distribute import Part
from memtrain.data.images import decode_image
from memtrain.data.pack import COLUMNS, pack
from memtrain.data.packing import Packing
from memtrain.data.samples import ShardSamples
from memtrain.data.shards import find_shards, index_shard
from memtrain.data.sources import local_shards
from tests.support.audits import check_all
from tests.support.corpora import encode, png_bomb, textured, turned


def write_pictures(folder: Path) -> dict[str, bytes]:
    """Seven pictures with captions in folders of folders, in several forms; bytes by path."""
    pictures = {
        "a.jpg": encode(textured(0)),
        "b.JPG": encode(textured(1)),
        "deep/c.jpeg": encode(textured(2)),
        "deep/d.png": encode(textured(3), "PNG"),
        "deep/er/e.webp": encode(textured(4), "WEBP"),
        "deep/f.g.jpg": turned(textured(5)),
        "z.png": encode(textured(6).convert("LA"), "PNG"),
    }
    for name, data in pictures.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"caption of {name}\n", encoding="utf-8")
    return pictures


def members(out: Path) -> dict[str, bytes]:
    found = {}
    for shard in find_shards(str(out)):
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def parquet(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def faults(out: Path) -> list[tuple[str, str]]:
    """Name and kind of all that is wrong with a packed corpus."""
    report = check_all(local_shards([str(out)]))
    return [(fault.name, fault.kind) for fault in report.faults]


def test_a_folder_reads_back_as_it_was(tmp_path):
    pictures = write_pictures(tmp_path / "in")
    report = pack(tmp_path / "in", tmp_path / "out", shard_size=3)
    assert (report.samples, report.shards, report.failures, report.ignored) == (7, 3, [], 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{shard:05d}{suffix}" for shard in range(3) for suffix in (".tar", ".parquet", "_stats.json")
    )
    found, rows = members(tmp_path / "out"), parquet(tmp_path / "out")
    assert [row["key"] for row in rows] == [f"{n // 3:05d}{n % 3:04d}" for n in range(7)]
    assert {row["url"] for row in rows} == set(pictures)
    for row in rows:
        data, extension = pictures[row["url"]], row["url"].rpartition(".")[2].lower()
        assert found[f"{row['key']}.{extension}"] == data  # byte for byte
        assert found[f"{row['key']}.txt"].decode() == row["caption"] == f"caption of {row['url']}"
        assert json.loads(found[f"{row['key']}.json"]) == row
        assert row["sha256"] == hashlib.sha256(data).hexdigest() and row["status"] == "success"
    upright = next(row for row in rows if row["url"] == "deep/f.g.jpg")
    assert (upright["width"], upright["height"]) == (80, 96)
    assert json.loads(upright["exif"]) == {"Orientation": "6"}

    samples = ShardSamples(str(tmp_path / "out"), 48, cache_dir=tmp_path / "cache")
    for index, row in enumerate(rows):
        image, caption, _ = samples.get(index)
        assert caption == row["caption"] and np.array_equal(image, decode_image(pictures[row["url"]], 48, 48))
    assert faults(tmp_path / "out") == []


def test_stats_and_schema_are_those_of_img2dataset(tmp_path):
    write_pictures(tmp_path / "in")
    (tmp_path / "in/deep/d.txt").unlink()
    (tmp_path / "in/z.png").write_bytes(b"<html>")
    pack(tmp_path / "in", tmp_path / "out", shard_size=4)
    for number, index in enumerate(map(index_shard, find_shards(str(tmp_path / "out")))):
        stats = json.loads((tmp_path / f"out/{number:05d}_stats.json").read_text())
        rows = pq.read_table(tmp_path / f"out/{number:05d}.parquet")
        assert rows.schema.remove_metadata() == COLUMNS
        assert stats["count"] == len(rows)
        assert stats["successes"] == len(index.entries) == rows["status"].to_pylist().count("success")
        assert stats["count"] == stats["successes"] + stats["failed_to_download"] + stats["failed_to_resize"]
        assert sum(stats["status_dict"].values()) == stats["count"]
        assert stats["end_time"] >= stats["start_time"]
    assert faults(tmp_path / "out") == []


def test_what_cannot_be_trained_on_is_named_and_left_out(tmp_path, capsys):
    write_pictures(tmp_path / "in")
    bad = {
        "bad/bomb.png": (png_bomb(), b"bomb"),
        "bad/cut.jpg": (encode(textured(7))[:500], b"cut"),
        "bad/empty.jpg": (b"", b"empty"),
        "bad/form.bmp": (encode(textured(8), "BMP"), b"form"),
        "bad/latin.jpg": (encode(textured(9)), "café".encode("latin-1")),
        "bad/mute.jpg": (encode(textured(9)), None),
    }
    for name, (data, caption) in bad.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption)
    (tmp_path / "in/bad/lost.jpg").symlink_to("nowhere")
    (tmp_path / "in/bad/lost.txt").write_text("lost")
    (tmp_path / "in/stray.txt").write_text("of no picture")
    (tmp_path / "in/deep/loop").symlink_to(tmp_path / "in")  # a folder within itself
    shards(["pack", str(tmp_path / "in"), str(tmp_path / "out")])
    out = capsys.readouterr().out
    rows = parquet(tmp_path / "out")
    failed = {row["url"]: (row["status"], row["error_message"]) for row in rows if row["status"] != "success"}
    assert failed == {
        "bad/bomb.png": ("failed_to_resize", "image cannot be decoded (DecompressionBombError)"),
        "bad/cut.jpg": ("failed_to_resize", "image cannot be decoded (OSError)"),
        "bad/empty.jpg": ("failed_to_resize", "image cannot be decoded (UnidentifiedImageError)"),
        "bad/form.bmp": (
            "failed_to_resize",
            "not a jpg, jpeg, png, webp by its name; --resolution re-encodes it",
        ),
        "bad/latin.jpg": ("failed_to_download", "caption is not UTF-8"),
        "bad/lost.jpg": ("failed_to_download", "no such file"),
        "bad/mute.jpg": ("failed_to_download", "no caption"),
    }
    assert "wrote 7 samples in 1 shards" in out and "left 1 files alone" in out
    assert all(f"  {name}: {why}\n" in out for name, (_, why) in failed.items())
    assert len({name.split(".")[0] for name in members(tmp_path / "out")}) == 7


@pytest.mark.parametrize(("resolution", "size"), [(40, (48, 40)), (33, (40, 33)), (200, (96, 80))])
def test_resolution_scales_the_short_side_down_and_never_up(tmp_path, resolution, size):
    (tmp_path / "in").mkdir()
    for name, data in {"a.png": encode(textured(0), "PNG"), "b.bmp": encode(textured(1), "BMP")}.items():
        (tmp_path / "in" / name).write_bytes(data)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(name)
    pack(tmp_path / "in", tmp_path / "out", resolution=resolution)
    rows, found = parquet(tmp_path / "out"), members(tmp_path / "out")
    for seed, row in enumerate(rows):
        assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (*size, 96, 80)
        with Image.open(tmp_path / "in" / row["url"]) as image:
            wanted = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=float)
        (tmp_path / "x.jpg").write_bytes(found[f"{row['key']}.jpg"])
        with Image.open(tmp_path / "x.jpg") as image:
            assert image.format == "JPEG" and image.size == size
            assert np.abs(np.asarray(image, dtype=float) - wanted).mean() < 6
        assert row["sha256"] == hashlib.sha256((tmp_path / "in" / row["url"]).read_bytes()).hexdigest(), seed
    assert faults(tmp_path / "out") == []


def test_a_turned_picture_is_upright_once_re_encoded(tmp_path):
    image = Image.new("RGB", (80, 40), "black")
    image.paste("white", (0, 0, 40, 40))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(turned(image))
    (tmp_path / "in/a.txt").write_text("white on top")
    pack(tmp_path / "in", tmp_path / "out", resolution=20)
    (row,) = parquet(tmp_path / "out")
    pixels = decode_image(members(tmp_path / "out")[f"{row['key']}.jpg"], 40, 20)
    assert (row["width"], row["height"]) == (20, 40)
    assert pixels[:, :15].mean() > 200 and pixels[:, 25:].mean() < 55


def write_table(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n", encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("form", [".parquet", ".jsonl", ".csv"])
def test_a_table_gives_captions_and_columns(tmp_path, form):
    pictures = write_pictures(tmp_path / "tables/in")
    records = [
        {
            "file": f"in/{name}",
            "TEXT": f'{name}, "quoted"\nünd two lines',
            "punsafe": number / 10,
            "LANGUAGE": "en",
        }
        for number, name in enumerate(pictures)
    ]
    records[0]["TEXT"] = ""  # an empty caption is a caption
    records[1]["file"] = str(tmp_path / "tables/in/b.JPG")  # absolute
    records[2]["file"] = "../tables/in/deep/c.jpeg"
    records.append(records[0] | {"file": "in/none.jpg"})
    table = write_table(tmp_path / f"tables/table{form}", records)
    report = pack(table, tmp_path / "out", 4, caption_column="TEXT", path_column="file")
    assert report.failures == [("in/none.jpg", "no such file")] and report.samples == 7
    rows, found = parquet(tmp_path / "out"), members(tmp_path / "out")
    convert = str if form == ".csv" else float
    for record, row in zip(records, rows, strict=True):
        assert (row["url"], row["caption"]) == (record["file"], record["TEXT"])
        assert (row["punsafe"], row["LANGUAGE"]) == (convert(record["punsafe"]), "en")
        assert "TEXT" not in row and "file" not in row
        if row["status"] == "success":
            assert json.loads(found[f"{row['key']}.json"]) == row
    samples = ShardSamples(str(tmp_path / "out"), 32, cache_dir=tmp_path / "cache")
    assert [samples.get(i)[1] for i in range(7)] == [record["TEXT"] for record in records[:7]]
    assert faults(tmp_path / "out") == [("00000.tar/000000000", "empty_caption")]
    if form != ".csv":
        chosen = ShardSamples(str(tmp_path / "out"), 32, cache_dir=tmp_path / "cache", where="punsafe < 0.25")
        assert len(chosen) == 3


def test_odd_values_of_a_table_survive(tmp_path):
    write_pictures(tmp_path)
    url, number = "https://example.org/a", "99999999999999999999"
    lines = [
        f'{{"path": "a.jpg", "caption": "nan", "score": NaN, "url": "{url}", "tags": ["x", {{"y": 1}}]}}',
        '{"path": "b.JPG", "caption": "half a pair \\ud800", "score": 1, "tags": "text", "width": "wide"}',
        f'{{"path": "deep/d.png", "caption": "big", "score": 0.5, "number": {number}, "status": "bad"}}',
        '{"path": "z.png", "caption": null}',
        '{"path": null, "caption": "nowhere"}',
        '{"path": "nul\\u0000.jpg", "caption": "nul"}',
        '{"path": "deep", "caption": "a folder"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    report = pack(tmp_path / "t.jsonl", tmp_path / "out")
    assert [why for _, why in report.failures] == ["no caption", "no path", "no such file", "no such file"]
    first, second, third, *_ = rows = parquet(tmp_path / "out")
    assert first["score"] != first["score"] and second["score"] == 1 and third["score"] == 0.5
    assert (first["url"], second["url"]) == (url, "b.JPG")
    assert json.loads(first["tags"]) == ["x", {"y": 1}] and second["tags"] == "text"
    assert second["caption"] == "half a pair ?" and second["width"] == 96 and third["status"] == "success"
    assert third["number"] == number
    assert json.loads(members(tmp_path / "out")[f"{first['key']}.json"])["tags"] == ["x", {"y": 1}]
    assert len(rows) == 7 and faults(tmp_path / "out") == []


def test_parquet_types_stay(tmp_path):
    write_pictures(tmp_path)
    columns = {
        "path": pa.array(["a.jpg"], pa.large_string()),
        "caption": pa.array(["one"], pa.large_string()),
        "small": pa.array([3], pa.int8()),
        "when": pa.array([1_700_000_000_000], pa.timestamp("ms")),
        "vector": pa.array([[0.5, 1.5]], pa.list_(pa.float32())),
        "raw": pa.array([b"\xff"], pa.binary()),
        "kind": pa.array(["x"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "out")
    found = pq.read_table(tmp_path / "out/00000.parquet")
    for name in ("small", "when", "vector", "raw", "kind"):
        assert found.schema.field(name).type == columns[name].type
        assert found[name].to_pylist() == columns[name].to_pylist()


def test_keys_grow_with_the_shard(tmp_path):
    write_pictures(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out", shard_size=100_000)
    assert {len(row["key"]) for row in parquet(tmp_path / "out")} == {10}


def test_the_same_source_gives_the_same_bytes(tmp_path):
    write_pictures(tmp_path / "in")
    for name in ("one", "two"):
        pack(tmp_path / "in", tmp_path / name, resolution=32)
    for name in ("00000.tar", "00000.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_packing_that_was_stopped_goes_on_and_leaves_nothing_beside(tmp_path):
    write_pictures(tmp_path / "in")
    (tmp_path / "out").mkdir()  # empty: it may be taken

    def stops(rows, count):
        yield next(iter(rows))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path / "in", tmp_path / "out", shard_size=1, progress=stops)
    assert not any((tmp_path / "out").iterdir())
    aside = tmp_path / ".out.packing"
    begun = (aside / "00000.tar").stat().st_ino
    (aside / "00001.tar").write_bytes(b"half of one")  # as where the power fails
    assert pack(tmp_path / "in", tmp_path / "out", shard_size=1).samples == 7
    assert (tmp_path / "out" / "00000.tar").stat().st_ino == begun
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    pack(tmp_path / "in", tmp_path / "whole", shard_size=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".parquet")}


def test_parts_of_one_are_merged_to_the_same_bytes(tmp_path, capsys):
    write_pictures(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "whole", shard_size=2)
    words = ["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-size=2"]
    shards([*words, "part=1/3"])
    with pytest.raises(ValueError, match=r"2 of \d shards are not packed yet, such as 00001.tar"):
        shards([*words, "merge"])
    with pytest.raises(ValueError, match="holds shards of another source or other options"):
        shards([*words, "part=2/3", "resolution=32"])
    packing = Packing(tmp_path / "out", json.loads((tmp_path / ".out.packing/.notes/settings.json").read_text()), True)
    with packing.alone(Part(2, 3)), pytest.raises(ValueError, match=r"another process is at work.*part=2/3"):
        shards([*words, "part=2/3"])
    shards([*words, "part=2/3"])
    shards([*words, "distributor=local", "part=3/3"])
    assert not (tmp_path / "out").exists()
    shards([*words, "merge=true"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{folder}/in", "{folder}/full"], "not an empty folder"),
        (["{folder}/in", "{folder}/full/x"], "not an empty folder"),
        (["{folder}/none", "{folder}/out"], "neither a folder nor"),
        (["{folder}/empty", "{folder}/out"], "no picture in it"),
        (["{folder}/bad", "{folder}/out"], r"nothing to pack \(x.jpg: no caption\)"),
        (["{folder}/in", "{folder}/out", "--shard-size=0"], "--shard-size must be >= 1, got 0"),
        (["{folder}/in", "{folder}/out", "--resolution=0"], "--resolution must be >= 1, got 0"),
        (["{folder}/t.csv", "{folder}/out"], "no column 'caption'.*--caption-column from file, text"),
        (["{folder}/t.csv", "{folder}/out", "--caption-column=text"], "no column 'path'.*--path-column"),
        (["{folder}/two.csv", "{folder}/out"], "two columns 'path'"),
        (["{folder}/t.jsonl", "{folder}/out"], "t.jsonl, line 2 is not json"),
        (["{folder}/list.jsonl", "{folder}/out"], "list.jsonl, line 1 is not a json object"),
        (["{folder}/t.parquet", "{folder}/out"], "t.parquet is not a whole parquet file"),
    ],
)
def test_what_the_user_can_mend_is_one_line(tmp_path, argv, says):
    write_pictures(tmp_path / "in")
    for name in ("full", "empty", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/x").write_text("x")
    (tmp_path / "bad/x.jpg").write_bytes(b"")
    (tmp_path / "t.csv").write_text("file,text\nin/a.jpg,x\n")
    (tmp_path / "two.csv").write_text("path,path,caption\nin/a.jpg,in/b.JPG,x\n")
    (tmp_path / "t.jsonl").write_text('{"path": "in/a.jpg", "caption": "x"}\n{"path": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=says) as raised:
        shards(["pack", *(part.format(folder=tmp_path) for part in argv)])
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
