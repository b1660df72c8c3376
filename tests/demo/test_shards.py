import csv
import hashlib
import io
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image, features

from memtrain.data.hashes import MIN_QUALITY, perceptual_hash
from memtrain.data.samples import ShardSamples
from memtrain.demo.compose import RESOLUTION, Composites, captions_of, compose
from memtrain.demo.corpus import duplicates, recipe_of
from memtrain.demo.shards import write_corpus
from tests.support.conf import CONF, load

NUM_SAMPLES = 80
DOSES = {"matching": [1, 6], "retrieval": [5], "template": [4, 8], "near": [8]}
RECIPE = recipe_of(NUM_SAMPLES, seed=3, shard_size=30, doses=DOSES)
# of the corpus of `memtrain demo OUT pictures=noto num_samples=60 repeated=2 copies=5 shard_size=30`, by the encoder
NOTO_TARS = {
    "00000.tar": "f3094cce13ec403b4e65b880df1b9f274bc76dd02df9781e285154d0e16f4efa",
    "00001.tar": "bff685e589668d2d6e3ef10618009c8afe67f56dd930be88b162c192f8e5031d",
}
ENCODER = "3.2.0"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    write_corpus(folder, RECIPE, progress=False)
    return folder


@pytest.fixture(scope="module")
def canaries(corpus):
    """Of each canary in canaries.csv, its kind and its samples, rows of the parquets with the pixels of the JPEG."""
    rows = {}
    for tar in sorted(corpus.glob("*.tar")):
        table = {row["key"]: row for row in pq.read_table(tar.with_suffix(".parquet")).to_pylist()}
        for sample in wds.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            pixels = np.array(Image.open(io.BytesIO(sample["jpg"])))
            rows[f"{tar.name}/{sample['__key__']}"] = table[sample["__key__"]] | {"pixels": pixels}
    found = {}
    with (corpus / "canaries.csv").open(newline="", encoding="utf-8") as file:
        for listed in csv.DictReader(file):
            kind, members = found.setdefault(int(listed["canary"]), (listed["kind"], []))
            assert kind == listed["kind"]
            members.append(rows.pop(listed["key"]))
    ordinary = list(rows.values())
    identities = {tuple(row[key] for key in ("glyph", "background", "size", "x", "y")) for row in ordinary}
    assert len(identities) == len(ordinary)
    return found


def of_kind(canaries, kind: str) -> list[dict]:
    """The samples of the last canary of a kind."""
    return [members for found, members in canaries.values() if found == kind][-1]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two pictures' pixels."""
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


def contents(folder, pattern):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the tars open


def test_every_canary_has_its_kind_and_dose(corpus, canaries):
    assert [(kind, len(members)) for kind, members in canaries.values()] == [
        (kind, dose) for kind, doses in DOSES.items() for dose in doses
    ]
    with (corpus / "canaries.csv").open(newline="", encoding="utf-8") as file:
        keys = [row["key"] for row in csv.DictReader(file)]
    samples = ShardSamples(str(corpus), RESOLUTION)
    assert [samples.key(int(position)) for position in samples.look_up(keys)] == keys
    assert len({key.split("/")[0] for key in keys}) == 3, "spread over the shards"


def test_matching_ones_are_the_same_file(canaries):
    members = of_kind(canaries, "matching")
    assert len({(row["sha256"], row["caption"]) for row in members}) == 1


def test_retrieval_ones_are_the_same_file_with_other_captions(canaries):
    members = of_kind(canaries, "retrieval")
    assert len({row["sha256"] for row in members}) == 1
    said = Counter(row["caption"] for row in members)
    assert said.keys() == set(captions_of(members[0]["glyph"], members[0]["background"])) and max(said.values()) == 2


def test_template_ones_differ_in_the_ground_alone(canaries):
    members = of_kind(canaries, "template")
    assert len({tuple(row[key] for key in ("glyph", "size", "x", "y")) for row in members}) == 1
    assert len({row["background"] for row in members}) == len(members)
    assert all(row["caption"] == f"{row['glyph']} on {row['background']}" for row in members)
    composites = Composites(RECIPE["seed"], "fluent")
    opaque = composites.glyphs.images[composites.glyphs.names.index(members[0]["glyph"])][..., 3] == 255
    size, x, y = (members[0][key] for key in ("size", "x", "y"))
    inside = np.zeros((RESOLUTION, RESOLUTION), bool)
    shrunk = Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)).resize((size, size))
    inside[y : y + size, x : x + size] = np.array(shrunk) == 255
    one, other = members[0]["pixels"].astype(float), members[1]["pixels"]
    assert abs(one - other)[inside].mean() < 8 < 20 < abs(one - other)[~inside].mean()


def test_near_ones_are_compressed_enlarged_mirrored_and_cropped(canaries):
    members = of_kind(canaries, "near")
    assert len({row["caption"] for row in members}) == 1
    composites = Composites(RECIPE["seed"], "fluent")
    first = members[0]
    glyph = composites.glyphs.images[composites.glyphs.names.index(first["glyph"])]
    image = Image.fromarray(compose(glyph, first["size"], first["x"], first["y"], first["background"]))
    side = RESOLUTION * 3 // 2
    wanted = {
        "compressed": image,
        "enlarged": image.resize((side, side)),
        "mirrored": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "cropped": image.crop((3, 3, 61, 61)).resize((64, 64)),
    }
    seen = Counter()
    for row in members:
        fits = {name: np.array(one) for name, one in wanted.items() if one.size == row["pixels"].shape[:2]}
        seen[min(fits, key=lambda name: distance(fits[name], row["pixels"]))] += 1
        assert min(distance(one, row["pixels"]) for one in fits.values()) < 16
    assert seen == dict.fromkeys(wanted, 2)


def test_canaries_have_features_to_compare(canaries):
    for kind, members in canaries.values():
        encoded = io.BytesIO()
        Image.fromarray(members[0]["pixels"]).save(encoded, "PNG")
        assert kind not in ("matching", "retrieval") or perceptual_hash(encoded.getvalue())[1] >= MIN_QUALITY


@pytest.mark.skipif(features.version("libjpeg_turbo") != ENCODER, reason="another JPEG encoder")
def test_the_corpus_of_before_is_the_same(tmp_path):
    recipe = recipe_of(60, shard_size=30, pictures="noto", doses=duplicates(2, 5))
    write_corpus(tmp_path / "noto", recipe, progress=False)
    tars = contents(tmp_path / "noto", "*.tar")
    assert {name: hashlib.sha256(tar).hexdigest() for name, tar in tars.items()} == NOTO_TARS


def test_python_has_the_defaults_of_the_command():
    given = load(CONF / "demo.yaml")
    recipe = recipe_of(*(given[key] for key in ("num_samples", "seed", "shard_size", "pictures", "doses")))
    assert recipe == recipe_of(given["num_samples"], doses=given["doses"])


@pytest.mark.parametrize(
    ("doses", "says"),
    [
        ({"matching": [0]}, "doses.matching must be at least 1, got 0"),
        ({"matching": [15], "near": [6]}, "the canaries are 21 samples, more than num_samples=20"),
        ({"mirror": [1]}, "doses has no kind mirror; it has matching"),
    ],
)
def test_doses_out_of_range(doses, says):
    with pytest.raises(ValueError, match=says):
        recipe_of(20, doses=doses)


def test_webdataset_reads_what_parquet_and_stats_say(corpus):
    assert sorted(path.name for path in corpus.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    total = 0
    for shard, tar in enumerate(sorted(corpus.glob("*.tar"))):
        rows = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
        stats = json.loads((corpus / f"{tar.stem}_stats.json").read_text())
        samples = list(wds.WebDataset(str(tar), shardshuffle=False, empty_check=False))
        assert stats["count"] == stats["successes"] == len(rows) == len(samples)
        for place, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            assert {"jpg", "txt", "json"} <= sample.keys()
            assert json.loads(sample["json"]) == row
            assert sample["__key__"] == row["key"] == f"{shard * 10_000 + place:09d}"
            assert sample["txt"].decode() == row["caption"] == row["all_captions"][0]
            assert sorted(row["all_captions"]) == sorted(captions_of(row["glyph"], row["background"]))
            assert hashlib.sha256(sample["jpg"]).hexdigest() == row["sha256"]
            assert Image.open(io.BytesIO(sample["jpg"])).size == (row["width"], row["height"])
        total += len(samples)
    assert total == NUM_SAMPLES


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    write_corpus(same, RECIPE, progress=False)
    write_corpus(other, RECIPE | {"seed": 4}, progress=False)
    for pattern in ("*.tar", "*.parquet", "canaries.csv"):
        assert contents(corpus, pattern) == contents(same, pattern) != contents(other, pattern)


def test_a_second_write_changes_nothing(corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    report = write_corpus(corpus, RECIPE, progress=False)
    assert not report.written and report.num_samples == NUM_SAMPLES
    assert before == {path: path.stat().st_mtime_ns for path in corpus.iterdir()}


def test_another_corpus_or_folder_is_refused_and_kept(corpus, tmp_path):
    with pytest.raises(ValueError, match=f"{corpus}.*delete it or choose another"):
        write_corpus(corpus, RECIPE | {"seed": 4}, progress=False)
    for changed, said in (({"seed": 4}, "of other seed, such"), ({"doses": {}, "pictures": "noto"}, "pictures, doses")):
        with pytest.raises(ValueError, match=said):
            write_corpus(corpus, RECIPE | changed, progress=False)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=f"{tmp_path}.*delete it or choose another"):
        write_corpus(tmp_path, RECIPE, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_write_is_not_a_corpus(tmp_path, monkeypatch):
    recipe = recipe_of(4, pictures="noto")
    monkeypatch.setattr("memtrain.demo.shards.pq.write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_corpus(tmp_path / "corpus", recipe, progress=False)
    assert not (tmp_path / "corpus").exists()
    monkeypatch.undo()
    assert write_corpus(tmp_path / "corpus", recipe, progress=False).written
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def full_disk(*_):
    raise OSError(28, "No space left on device")
