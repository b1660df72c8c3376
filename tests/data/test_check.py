"""Every fault by its name; what loses something, and what does not."""

import json
import re
from pathlib import Path

import pytest

from memtrain.cli.listing import shown
from memtrain.cli.shards import shards
from memtrain.data.check import KINDS
from memtrain.data.images import BadSample
from memtrain.data.samples import ShardSamples
from memtrain.data.shards import DAMAGED
from memtrain.data.sources import local_shards
from tests.support.audits import check_all
from tests.support.corpora import (
    FaultyCorpus,
    corpus_with_every_fault,
    cut,
    encode,
    sample,
    textured,
    write_stats,
    write_tar,
)


def check_folder(*folders: Path, decode: bool = True, workers: int = 1):
    return check_all(local_shards([str(folder) for folder in folders]), decode, workers)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Partial results are kept there."""
    monkeypatch.setenv("MEMTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit code and what is on stdout."""
    code = 0
    try:
        shards(["check", "--workers=1", *argv])
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().out


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> FaultyCorpus:
    return corpus_with_every_fault(tmp_path_factory.mktemp("faulty"))


@pytest.fixture
def healthy(tmp_path) -> Path:
    folder = tmp_path / "healthy"
    for shard in range(2):
        keys = [f"{shard * 10_000 + row:09d}" for row in range(3)]
        members = [m for key in keys for m in sample(key, encode(textured(int(key))), f"picture {key}")]
        write_stats(write_tar(folder / f"{shard:05d}.tar", members), 3)
    return folder


def test_every_fault_is_reported_by_name_and_nothing_else_is(faulty):
    report = check_folder(faulty.folder)
    found = {(fault.name, fault.kind): fault for fault in report.faults}
    assert sorted(found) == sorted((planted.name, planted.kind) for planted in faulty.faults)
    for planted in faulty.faults:
        fault = found[planted.name, planted.kind]
        assert re.search(planted.cause, fault.cause) and fault.lost == planted.lost, fault
    assert {fault.kind for fault in report.faults} == set(KINDS)
    assert sum(shard.complete for shard in report.shards) == len(faulty.captions)
    assert report.loses


def test_the_reader_agrees_on_what_is_lost(faulty, tmp_path):
    samples = ShardSamples(str(faulty.folder), 16, cache_dir=tmp_path)
    seen, bad = {}, set()
    for index in range(len(samples)):
        try:
            seen[samples.key(index)] = samples.get(index)[1]
        except BadSample:
            bad.add(samples.key(index))
    assert seen == faulty.captions
    assert bad == {planted.name for planted in faulty.faults if planted.kind == "unreadable_image"}
    reported = {(fault.name, fault.cause) for fault in check_folder(faulty.folder).faults}
    assert {(name.removesuffix("/"), why) for name, why in samples.skipped()} <= reported


def test_without_decoding_only_headers_and_texts_are_looked_at(faulty):
    report = check_folder(faulty.folder, decode=False)
    unreadable = [fault.name for fault in report.faults if fault.kind == "unreadable_image"]
    assert unreadable == ["00002.tar/000020002"]  # it has no bytes
    others = {(p.name, p.kind) for p in faulty.faults if p.kind != "unreadable_image"}
    assert {(f.name, f.kind) for f in report.faults if f.kind != "unreadable_image"} == others


def test_json_lists_everything_and_the_exit_code_is_one(faulty, capsys):
    code, out = run(capsys, str(faulty.folder), "--json")
    said = json.loads(out)
    assert code == 1 and said["loses"] and said["decoded"]
    assert len(said["faults"]) == len(faulty.faults) and len(said["shards"]) == 9
    assert said["total"]["complete"] == len(faulty.captions)
    for kind in KINDS:
        planted = sum(planted.kind == kind for planted in faulty.faults)
        assert said["total"]["faults"][kind] == planted
        assert sum(shard["faults"][kind] for shard in said["shards"]) == planted
    first = [said["shards"][0][name] for name in ("name", "samples", "complete", "successes")]
    assert first == ["00000.tar", 10, 9, 10]


def test_the_terminal_shows_a_table_and_the_worst_faults_first(faulty, capsys):
    code, out = run(capsys, str(faulty.folder))
    lines = out.splitlines()
    assert code == 1
    assert [line.split()[:3] for line in lines if line.startswith((" 00000.tar", " total"))] == [
        ["00000.tar", "10", "9"],
        ["total", "38", "29"],
    ]
    for planted in faulty.faults:
        if planted.lost:
            assert any(line.startswith(f"  lost  {planted.name}: ") for line in lines), planted
    assert f"… and {len(faulty.faults) - 20} more, --json lists all" in out
    assert max(map(len, lines)) < 160


def test_a_healthy_corpus_ends_with_zero(healthy, capsys):
    code, out = run(capsys, str(healthy))
    assert code == 0 and "0 faults that lose something, 0 that do not" in out
    assert "caption" not in out  # no column without a count
    assert run(capsys, f"{healthy}/{{00000..00001}}.tar", "--json")[0] == 0


def test_what_loses_nothing_does_not_fail(healthy, capsys):
    image = encode(textured(0))  # again
    write_tar(healthy / "00002.tar", [*sample("a", image, ""), *sample("b", image, b"\xff")])
    code, out = run(capsys, str(healthy), "--json")
    said = json.loads(out)
    assert code == 0
    assert {kind for kind, count in said["total"]["faults"].items() if count} == {
        "empty_caption",
        "caption_not_utf8",
        "duplicate_within",
        "duplicate_across",
        "stats_missing",
    }


def test_the_sha256_of_the_json_is_of_the_bytes_before_resizing(tmp_path):
    """Two encodings of one download are exact duplicates; a sha256 that is none is not believed."""
    same = json.dumps({"sha256": "ab" * 32}).encode()
    small, large = encode(textured(1)), encode(textured(1, (192, 160)))
    odd = [json.dumps({"sha256": value}).encode() for value in ("", "none", 5, None, "ab" * 31)]
    members = [*sample("a", small, json_bytes=same), *sample("b", large, json_bytes=same)]
    for number, metadata in enumerate(odd):
        members += sample(f"c{number}", encode(textured(10 + number)), json_bytes=metadata)
    write_stats(write_tar(tmp_path / "x.tar", members), 7)
    (fault,) = check_folder(tmp_path).faults
    assert (fault.name, fault.cause) == ("x.tar/b", "same image as a")


def test_folders_whose_keys_collide_are_told_apart(tmp_path):
    for seed, name in enumerate(("one", "two")):
        members = [m for n in range(3) for m in sample(f"{n:09d}", encode(textured(10 * seed + n)))]
        write_stats(write_tar(tmp_path / name / "00000.tar", members), 3)
    report = check_folder(tmp_path / "one", tmp_path / "two")
    (fault,) = report.faults
    assert (fault.name, fault.kind, fault.lost) == ("two/00000.tar/000000000", "key_across", False)
    assert "one/00000.tar" in fault.cause and "2 more" in fault.cause


def test_a_shard_that_vanishes_is_named_and_its_neighbours_are_read(healthy):
    found = local_shards([str(healthy)])
    found[0].path.unlink()
    report = check_all(found)
    assert [(fault.name, fault.kind) for fault in report.faults if fault.lost] == [
        ("00000.tar", "damage"),
        ("00000.tar", "stats_disagree"),
    ]
    assert [shard.complete for shard in report.shards] == [0, 3]


def test_a_sample_on_the_break_between_joined_tars_is_damage_and_is_named(healthy):
    one, two = healthy / "00000.tar", healthy / "00001.tar"
    cut(one, "000000002.txt", "bytes")
    one.write_bytes(one.read_bytes() + two.read_bytes())
    report = check_folder(healthy)
    lost = [(fault.name, fault.kind, fault.cause) for fault in report.faults if fault.lost]
    assert lost[0][:2] == ("00000.tar", "damage") and "neither a header nor its end-of-archive mark" in lost[0][2]
    assert lost[1:] == [("00000.tar/000000002", "damage", DAMAGED)]
    assert [(shard.samples, shard.complete) for shard in report.shards] == [(3, 2), (3, 3)]


@pytest.mark.parametrize("stats", [b"", b"{", b"[]", b'{"count": 3}', b'{"successes": "3"}', b'{"successes": NaN}'])
def test_stats_that_say_nothing_are_as_good_as_none(healthy, stats):
    (healthy / "00001_stats.json").write_bytes(stats)
    (fault,) = check_folder(healthy).faults
    assert (fault.name, fault.kind, fault.lost) == ("00001.tar", "stats_missing", False)


def test_more_samples_than_successes_lose_nothing(healthy):
    write_stats(healthy / "00001.tar", 2)
    (fault,) = check_folder(healthy).faults
    assert (fault.kind, fault.lost) == ("stats_disagree", False)


@pytest.mark.usefixtures("spawned_by_forks")
def test_processes_find_what_one_finds(faulty):
    assert check_folder(faulty.folder, workers=2).as_dict() == check_folder(faulty.folder).as_dict()


def test_names_and_captions_cannot_reach_the_terminal(tmp_path, capsys):
    evil = "a\x1b[31m\r[red]b\u202e[/red]\udcff"
    write_tar(tmp_path / "[bold]x.tar", [m for m in sample(evil, encode(textured(0))) if "txt" not in m[0]])
    code, out = run(capsys, str(tmp_path))
    assert code == 1 and "[bold]x.tar/a\\x1b[31m\\r[red]b\\u202e[/red]\\udcff: no caption" in out
    assert "\x1b" not in out and "\u202e" not in out
    assert json.loads(run(capsys, str(tmp_path), "--json")[1])["faults"][0]["key"] == evil
    assert len(shown("x" * 10_000)) == 200


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{folder}/nothing"], "no such shard"),
        (["{folder}", "--workers=0"], "workers must be >= 1, got 0"),
        (["https://example.org/x.tar"], "neither on a local disk nor"),
        ([], "required: PATH"),
        (["{folder}", "--nonsense"], "--nonsense"),
    ],
)
def test_what_the_user_can_mend_is_one_line(healthy, argv, says):
    with pytest.raises(ValueError, match=says) as raised:
        shards(["check", *(part.format(folder=healthy) for part in argv)])
    assert "\n" not in str(raised.value)


def test_index_and_hashes_are_written_beside_the_shards(healthy, capsys):
    """By this process, and by two others."""
    shards(["index", str(healthy), "--no-hashes", "--workers", "1"])
    assert "indexed 6 samples in 2 shards, 0 skipped" in capsys.readouterr().out
    assert len(list(healthy.glob("*.tar.index.*"))) == 4
    shards(["index", str(healthy), "--workers", "2"])
    assert len(list(healthy.glob("*.tar.index.hashes.npy"))) == 2
