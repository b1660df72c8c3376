"""Canaries that a list names: ground truth for measuring, of which no rule learns."""

import numpy as np
import pytest

from memtrain.core.exclusion import CANARY, REFERENCE, SACRIFICED, TRAINED
from memtrain.data.canaries_digest import canaries_digest
from memtrain.data.datamodule import from_shards
from memtrain.training.resume import Past, RunState
from tests.support.corpora import encode, sample, textured, write_tar

# two shards of 7 samples each; 0 and 9 show the same picture, and no list says so
COPIES = {9: 0}
ROWS = [("b", 4, "near"), ("c", 4, "near"), ("i", 7, "matching"), ("e", 4, "near"), ("k", 2, "template")]
POSITIONS = {name: number for number, name in enumerate("abcdefghijklmn")}


def key(name: str) -> str:
    return f"{POSITIONS[name] // 7:05d}.tar/{name}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listed") / "shards"
    for shard in range(2):
        members = []
        for name, number in POSITIONS.items():
            if number // 7 == shard:
                members += sample(name, encode(textured(COPIES.get(number, number))), f"caption {name}")
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def listing(folder, rows=ROWS, header="key,canary,kind"):
    file = folder / "canaries.csv"
    lines = [",".join((key(name) if name in POSITIONS else name, *map(str, rest))) for name, *rest in rows]
    file.write_text("\n".join([header, *lines]) + "\n")
    return str(file)


def data(shards, file, **options):
    given = dict(seed=0, canaries=None, repeats=None, reference=4, canaries_file=file) | options
    return from_shards(str(shards), 64, 2, 0, **given)


def named(positions) -> str:
    return "".join(list(POSITIONS)[position] for position in positions.tolist())


@pytest.mark.parametrize("duplicates", ["near", "none"])
def test_every_row_is_a_canary_and_its_dose_are_the_rows(shards, tmp_path, duplicates):
    for seed in range(6):
        batches = data(shards, listing(tmp_path), seed=seed, duplicates=duplicates, sacrificed=1)
        groups = batches.groups
        assert named(groups.sacrificed) == "bce" and named(groups.canary) == "ik"  # the most frequent one
        assert groups.canary_of(groups.canary).tolist() == [7, 2] and groups.kind_of(groups.sacrificed) == ["near"] * 3
        assert groups.repeats_of(np.array([1, 2, 4, 8, 10])).tolist() == [3, 3, 3, 1, 1]
        assert named(groups.looked_at(groups.sacrificed, 6)[0]) == "bbccee"
        held = named(groups.reference)
        assert len(held) == 4 and not set(held) & set("bceik") and (duplicates == "none" or not set(held) & set("aj"))
        expected = [REFERENCE if name in held else TRAINED for name in POSITIONS]
        for name, group in zip("bceik", [SACRIFICED] * 3 + [CANARY] * 2, strict=True):
            expected[POSITIONS[name]] = group
        assert groups.of(np.arange(14)).tolist() == expected
        # nothing is planted, and who shows the same picture is what the hashes say
        seen = np.concatenate([batches.order.positions(window) for window in batches.order.windows(0)])
        assert sorted(seen.tolist()) == sorted(set(range(14)) - set(groups.reference.tolist()))
        assert groups.pictures.positions.tolist() == ([0, 9] if duplicates == "near" else [])


@pytest.mark.parametrize(
    ("options", "sacrificed", "canary"),
    [
        (dict(canaries=0), "", "bceik"),
        (dict(canaries=2), "", "bcei"),  # the first two of the list
        (dict(canaries=2, sacrificed_keys=["00001.tar/k"]), "k", "bce"),
        (dict(canaries=2, sacrificed=2), "bcei", ""),
        (dict(canaries=9, sacrificed_keys=["00000.tar/c", "00000.tar/e"]), "bce", "ik"),
    ],
)
def test_so_many_of_the_list_and_those_that_are_sacrificed(shards, tmp_path, options, sacrificed, canary):
    groups = data(shards, listing(tmp_path), **options).groups
    assert (named(groups.sacrificed), named(groups.canary)) == (sacrificed, canary)
    assert not set(named(groups.reference)) & set("bceik")  # nobody of the list is held out, a canary or not


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([], {}, r"canaries\.csv lists nothing; give a csv with the columns key, canary, kind"),
        ([("a", "x", "near")], {}, r"line 2: canary must be a whole number, got x"),
        ([("", "1", "near")], {}, r"line 2 has no key"),
        ([*ROWS, ("i", 4, "near")], {}, r"lists 00001\.tar/i twice, under canary 7 and 4; list it once"),
        ([*ROWS, ("a", 4, "matching")], {}, r"calls canary 4 both near and matching"),
        ([("9.tar/x", 1, "near")], {}, r"none of its 1 keys, such as 9\.tar/x, is in data\.shards; was it made from"),
        (ROWS, dict(repeats=100), r"canaries\.repeats=100 would plant others; say canaries\.repeats=null"),
        (ROWS, dict(sacrificed_keys=["00000.tar/a"]), r"names 1 sample that canaries\.file does not list"),
        (ROWS, dict(sacrificed=4), r"canaries\.sacrificed must be in \[0, 3\]"),
        (ROWS, dict(reference=8), r"leave nothing of the 14 samples .*\(7 of them are duplicates or listed\)"),
        (ROWS, dict(canaries=1, sacrificed_keys=["00000.tar/b", "00001.tar/k"]), r"names 2 canaries, more than"),
    ],
)
def test_what_a_list_cannot_say_is_one_line(shards, tmp_path, rows, options, says):
    with pytest.raises(ValueError, match=says):
        data(shards, listing(tmp_path, rows), **options)


def test_a_list_without_a_column_or_a_file_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"has no column kind, but key, canary; give a csv"):
        data(shards, listing(tmp_path, [("a", 1)], header="key,canary"))
    with pytest.raises(ValueError, match=r"canaries\.file=/nowhere/x\.csv: no such file"):
        data(shards, "/nowhere/x.csv")


def test_rows_of_other_corpora_are_warned_of(shards, tmp_path, caplog):
    groups = data(shards, listing(tmp_path, [*ROWS, ("9.tar/x", 4, "near")])).groups
    assert named(groups.canary) == "bceik" and groups.repeats_of(groups.canary[:1]).tolist() == [3]
    assert "1 of its 6 keys are not in data.shards, such as 9.tar/x: the doses of their canaries" in caplog.text


def digest(module):
    return canaries_digest(module.groups, module.samples)


def test_a_list_that_has_changed_is_not_gone_on_with(shards, tmp_path):
    before = digest(data(shards, listing(tmp_path)))
    RunState(None, None, 2, before).write(tmp_path)
    past = Past(tmp_path, RunState.read(tmp_path))
    again = data(shards, listing(tmp_path, [(*row, "no column of ours") for row in ROWS], "key,canary,kind,note"))
    past.check_canaries(digest(again), [])
    others = ([*ROWS[:-1], ("k", 2, "crop")], [*ROWS, ("l", 2, "template")], [*ROWS[:-1], ("l", 2, "template")])
    for rows in others:
        changed = digest(data(shards, listing(tmp_path, rows)))
        with pytest.raises(ValueError, match=r"names has changed since .*resume\.allow=\[canaries\.file\]"):
            past.check_canaries(changed, ["data"])
        past.check_canaries(changed, ["canaries"])
        past.check_canaries(changed, "all")
    assert digest(from_shards(str(shards), 64, 2, 0, seed=0, canaries=1, repeats=2, reference=2)) is None
