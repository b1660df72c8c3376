"""Real tars, with the faults that are found in the wild."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from memtrain.data.check import LocalShard, check_shard
from memtrain.data.datamodule import from_shards
from memtrain.data.images import BadSample
from memtrain.data.samples import ShardSamples
from memtrain.data.shards import DAMAGED, find_shards, index_shard
from tests.support.corpora import encode, textured
from tests.support.tars import picture, sample, write_tar


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
        image, text, _ = samples.get(index)
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


def seen_in(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Caption by name of each sample that can be used; why not by name of all else, said by the scan or by reading."""
    samples = ShardSamples(str(folder), 16, cache_dir=folder / "cache")
    captions, bad = {}, dict(samples.skipped())
    for index in range(len(samples)):
        try:
            captions[samples.key(index)] = samples.get(index)[1]
        except BadSample as problem:
            bad[samples.key(index)] = str(problem)
    samples.close()
    return captions, bad


def place_of(tar: Path, member: str) -> int:
    with tarfile.open(tar) as file:
        return file.getmember(member).offset_data


@pytest.fixture
def two(tmp_path) -> tuple[Path, Path]:
    """Two tars of the same three keys: other pictures, which take several blocks, and captions of a length."""
    paths = []
    for name, seed in (("one", 0), ("two", 10)):
        jpegs = [encode(textured(seed + n), quality=95) for n in range(3)]
        members = [part for n, jpeg in enumerate(jpegs) for part in sample(f"{n:09d}", f"{name} {n}", jpeg)]
        paths.append(write_tar(tmp_path / f"{name}.bytes", members))
    return paths[0], paths[1]


@pytest.mark.parametrize(
    ("member", "past"),
    [
        ("000000001.txt", 3),  # the caption would end in the name of the first member of the other
        ("000000001.txt", 0),
        ("000000001.jpg", 1000),
        ("000000001.jpg", 1024),  # on a block: the picture would hold whole members of the other
        ("000000001.json", 5),
    ],
)
def test_a_shard_cut_inside_a_member_and_joined_to_another_lends_it_nothing(tmp_path, two, member, past):
    one, other = two
    joined = one.read_bytes()[: place_of(one, member) + past] + other.read_bytes()
    (tmp_path / "x.tar").write_bytes(joined)
    captions, bad = seen_in(tmp_path)
    assert captions.pop("x.tar/000000000") == "one 0"
    assert "x.tar/000000001" not in captions and "x.tar/000000001" in bad
    assert set(captions.items()) <= {("x.tar/000000002", "two 2")}


def test_a_picture_that_swallowed_one_of_another_tar_does_not_get_its_caption(tmp_path):
    """All headers behind the picture are right: of the other tar, from its caption of the same key on."""
    mine, other = encode(textured(0), quality=95), encode(textured(1, (16, 16)), quality=50)
    mine += b" " * (511 - len(mine) % 512)  # so that its last block ends in zeros, wherever the other picture ends
    one = write_tar(tmp_path / "one.bytes", sample("000000000", "one", mine))
    two = write_tar(tmp_path / "two.bytes", sample("000000000", "two 0", other) + sample("000000001", "two 1"))
    swallowed = place_of(two, "000000000.txt") - 512
    end = place_of(one, "000000000.txt") - 512  # of the picture's last block
    (tmp_path / "x.tar").write_bytes(one.read_bytes()[: end - swallowed] + two.read_bytes())
    assert [entry.key for entry in index_shard(tmp_path / "x.tar").entries] == ["000000000", "000000001"]
    captions, bad = seen_in(tmp_path)
    assert captions == {"x.tar/000000001": "two 1"}
    assert bad == {"x.tar/000000000": "image holds a tar header: the shard was cut inside it and joined to another"}
    report, _ = check_shard(LocalShard(tmp_path / "x.tar", "x.tar"), decode=False)
    assert [(fault.key, fault.kind) for fault in report.faults if fault.lost] == [("000000000", "unreadable_image")]


@pytest.mark.parametrize("member", ["000000001.txt", "000000001.jpg", "000000002.json"])
def test_a_download_that_broke_off_and_was_filled_up_with_zeros_is_not_whole(tmp_path, two, member):
    data, at = two[0].read_bytes(), place_of(two[0], member) + 2
    (tmp_path / "x.tar").write_bytes(data[:at] + bytes(len(data) - at))
    captions, bad = seen_in(tmp_path)
    broken = f"x.tar/{member.split('.')[0]}"
    assert captions == {f"x.tar/{n:09d}": f"one {n}" for n in range(int(member[8]))}
    assert bad[broken] == DAMAGED


def test_what_borders_on_a_break_is_lost_and_its_neighbours_are_not(tmp_path, two):
    data = bytearray(two[0].read_bytes())
    data[place_of(two[0], "000000002.jpg") - 512] ^= 1  # the name in a header: its checksum is wrong now
    (tmp_path / "x.tar").write_bytes(data)
    captions, bad = seen_in(tmp_path)
    assert captions == {"x.tar/000000000": "one 0"}
    assert bad.pop("x.tar/000000001") == DAMAGED
    assert list(bad) == ["x.tar/"] and "neither a header nor its end-of-archive mark" in bad["x.tar/"]


@pytest.mark.parametrize("end", ["no mark", "one block", "two blocks", "half a header"])
def test_a_tar_may_end_as_it_likes(tmp_path, two, end):
    """Where the file ends behind a member, what is there is whole."""
    data = two[0].read_bytes().rstrip(b"\0")
    data += (
        bytes(-len(data) % 512)
        + {
            "no mark": b"",
            "one block": bytes(512),
            "two blocks": bytes(1024),
            "half a header": data[:300],
        }[end]
    )
    (tmp_path / "x.tar").write_bytes(data)
    assert seen_in(tmp_path)[0] == {f"x.tar/{n:09d}": f"one {n}" for n in range(3)}


def test_a_json_that_holds_the_word_ustar_is_no_header(tmp_path):
    text = json.dumps({"caption": "ustar " * 200}).encode()
    write_tar(tmp_path / "x.tar", [("a.jpg", picture()), ("a.json", text), ("a.txt", b"ustar" * 100)])
    assert seen_in(tmp_path) == ({"x.tar/a": "ustar" * 100}, {})


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


def test_samples_that_are_closed_have_no_file_open_and_can_be_read_again(tmp_path):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list a process's open files")
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, sample("a", name))
    samples = ShardSamples(str(tmp_path), 16, cache_dir=tmp_path / "cache")

    def open_files() -> list[str]:
        names = [os.readlink(link) for link in map(str, Path("/proc/self/fd").iterdir()) if os.path.islink(link)]
        return [name for name in names if name.startswith(str(tmp_path))]

    for _ in range(2):
        assert [(samples.key(index), samples.get(index)[1]) for index in range(2)] == [
            ("0.tar/a", "0.tar"),
            ("1.tar/a", "1.tar"),
        ]
        assert open_files()
        held = samples._open[0]
        samples.close()
        assert not [name for name in open_files() if name.endswith(".tar")]
        with pytest.raises(ValueError, match="closed"):  # never the file that has its number now
            held.read(held.record(0)["image"])
        del held
        assert not open_files()


def test_keys_tell_folders_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000.tar", sample("000000000", name))
    samples = ShardSamples([str(tmp_path / "one"), str(tmp_path / "two")], 16)
    assert {samples.key(i): samples.get(i)[1] for i in range(2)} == {
        "one/00000.tar/000000000": "one",
        "two/00000.tar/000000000": "two",
    }
