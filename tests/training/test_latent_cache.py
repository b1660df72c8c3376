"""Training from cached latents is training from pictures."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memtrain.cli.main import main
from memtrain.data.datamodule import from_shards
from memtrain.data.images import BadSample
from memtrain.data.latents import HIDDEN_BOUNDS
from memtrain.data.remote import ShardMissing
from memtrain.data.samples import ShardSamples
from memtrain.models.t5 import set_t5_padding
from memtrain.training.latent_cache import (
    check_captions,
    check_room,
    made_with,
    missing_shards,
    sample_bytes,
    write_latents,
)
from memtrain.training.score_memory import Scoring
from tests.conftest import build_module, fit, weights
from tests.support.families import stable_diffusion, stable_diffusion_3
from tests.support.program import fails
from tests.support.tars import picture, sample, write_tar
from tests.support.training import Record


def write(pipeline, corpus, out, flip=False, numbers=None, **options):
    samples, model = ShardSamples(str(corpus), 64, **options), build_module(pipeline).model
    numbers = range(len(samples.shards)) if numbers is None else numbers
    write_latents(
        model, samples, numbers, str(out), dtype="float32", flip=flip, batch_size=7, num_workers=0,
        device=torch.device("cpu"), progress=False,
    )  # fmt: skip
    return samples, model


def test_parts_of_the_command_are_merged_to_the_same_bytes(pipeline_folder, corpus, tmp_path, capsys):
    write(pipeline_folder, corpus, tmp_path / "whole")
    words = ["cache", f"model.pretrained={pipeline_folder}", f"data.shards={corpus}", "data.resolution=64",
             "data.num_workers=0", "data.batch_size=7", "dtype=float32", f"out={tmp_path}/parts"]  # fmt: skip
    main([*words, "part=2/2"])
    assert "2 of 3 shards are not encoded yet, such as 00000.tar" in fails(capsys, *words, "merge")
    main([*words, "part=1/2"])
    main([*words, "merge"])
    assert "3 shards, 0 to encode" in capsys.readouterr().out
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "parts")]
    assert len(files[0]) == 3 and files[0] == files[1]


def data(corpus, **options):
    groups = dict(seed=7, canaries=3, repeats=4, reference=8)
    return from_shards(str(corpus), 64, 4, 0, **(groups | options))


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_cached_training_equals_training_from_pictures(pipeline_folder, corpus, tmp_path, flip):
    write(pipeline_folder, corpus, tmp_path, flip=flip > 0)
    runs = []
    for cache in (None, str(tmp_path)):
        module, record = build_module(pipeline_folder), Record()
        batches = data(corpus, flip=flip, cache=cache)
        batches.check_cache(module.model.fingerprint, False)
        fit(module, batches, tmp_path / "run", 6, callbacks=[record])
        latents, read = module.encode_pictures(range(0, 48, 7))  # as generations are held against
        assert read.tolist() == list(range(0, 48, 7))
        runs.append((weights(module), record, latents))
    (plain, plain_record, straight), (cached, cached_record, stored) = runs
    torch.testing.assert_close(stored, straight, atol=1e-5, rtol=0)
    assert plain_record.keys == cached_record.keys
    torch.testing.assert_close(cached, plain, atol=1e-6, rtol=0)
    for one, other in zip(plain_record.observed, cached_record.observed, strict=True):
        torch.testing.assert_close(one.score, other.score, atol=1e-4, rtol=1e-4)
        assert torch.equal(one.scored, other.scored)


def test_a_text_encoder_that_is_trained_reads_the_captions(pipeline_folder, corpus, tmp_path):
    write(pipeline_folder, corpus, tmp_path)
    found = []
    for cache in (None, str(tmp_path)):
        module = build_module(pipeline_folder, model={"train_text_encoder": True})
        batches = data(corpus, cache=cache)
        batches.check_cache(module.model.fingerprint, True)
        fit(module, batches, tmp_path / "run", 3)
        found.append(weights(module))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)


def test_a_stopped_cache_goes_on_and_a_foreign_one_is_refused(pipelines, corpus, tmp_path):
    samples, model = write(pipelines["epsilon"], corpus, tmp_path, numbers=[0, 2])
    header = made_with(model, samples)
    assert missing_shards(samples, str(tmp_path), header, False, False) == [1]
    assert missing_shards(samples, str(tmp_path), header, False, True) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"no mirror images.*overwrite=true"):
        missing_shards(samples, str(tmp_path), header, True, False)
    with pytest.raises(ValueError, match=r"data\.cache has no 00001\.tar.*run `memtrain cache`"):
        data(corpus, cache=str(tmp_path)).check_cache(model.fingerprint, False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resolution": 32}, "data.resolution=64, not 32"),
        ({"caption": "glyph"}, "data.caption=txt, not glyph"),
        ({"where": "size > 0"}, "data.where=None, not size > 0"),
        ({"flip": 0.5}, "no mirror images"),
        ({"vae": True}, "another VAE"),
        ({"text_encoder": True}, "another text encoder"),
    ],
)
def test_a_cache_made_otherwise_is_refused_by_name(pipeline_folder, corpus, tmp_path, options, says):
    _, model = write(pipeline_folder, corpus, tmp_path)
    for part in ("vae", "text_encoder"):
        if options.pop(part, False):
            next(getattr(model, part).parameters()).data.add_(1e-3)
    resolution = options.pop("resolution", 64)
    groups = dict(seed=7, canaries=3, repeats=4, reference=8)
    batches = from_shards(str(corpus), resolution, 4, 0, cache=str(tmp_path), **groups, **options)
    with pytest.raises(ValueError, match=says):
        batches.check_cache(model.fingerprint, False)


@pytest.mark.parametrize("options", [{"crop": "random"}, {"max_aspect_ratio": 2.0, "bucket_multiple": 16}])
def test_what_cannot_be_cached_is_refused(corpus, tmp_path, options):
    with pytest.raises(ValueError, match=r"data\.cache holds centre squares"):
        data(corpus, cache=str(tmp_path), **options)


def test_a_bad_sample_stays_bad_and_an_empty_shard_empty(pipeline_folder, tmp_path, caplog):
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "0.tar", [("a.jpg", picture())])  # no caption: no sample
    write_tar(shards / "1.tar", sample("a", "good é") + sample("b", "bad", b"<html>") + sample("c", ""))
    write(pipeline_folder, shards, "beside")
    assert "bad sample 1.tar/b: " in caplog.text and "0.tar/" not in caplog.text
    assert sorted(path.name for path in shards.glob("*.latents.safetensors")) == [
        "0.tar.latents.safetensors",
        "1.tar.latents.safetensors",
    ]
    module = build_module(pipeline_folder)
    batches = from_shards(str(shards), 64, 3, 0, seed=0, canaries=0, repeats=1, reference=0, cache="beside")
    batches.check_cache(module.model.fingerprint, False)
    record = Record()
    fit(module, batches, tmp_path / "run", 2, callbacks=[record])
    for batch in record.window:
        by_sample = dict(
            zip(batch.sample_index.tolist(), zip(batch.valid.tolist(), batch.captions, strict=True), strict=True)
        )
        assert by_sample == {0: (True, "good é"), 1: (False, ""), 2: (True, "")}
    assert module.accumulation.samples_seen == 4 and list(batches.problems) == ["1.tar/b"]


class Gone:
    """Shards none of which can be opened."""

    def __getitem__(self, number):
        raise ShardMissing("it is gone")

    def read_ahead(self, wanted):
        pass


def lost(monkeypatch, name: str) -> None:
    """The shard of this name is gone when it is to be decoded."""

    def get(self, index, *more, get=ShardSamples.get):
        opened = self._open
        try:
            self._open = Gone() if self.key(index).startswith(name) else opened
            return get(self, index, *more)
        finally:
            self._open = opened

    monkeypatch.setattr(ShardSamples, "get", get)


@pytest.mark.parametrize("missing", ["stop", "skip"])
def test_a_shard_that_is_lost_on_the_way_has_no_file_and_is_told(
    pipeline_folder, corpus, tmp_path, capsys, monkeypatch, missing
):
    """Its samples are not bad: the same command makes its file when it is back, and nobody trains without them."""
    words = ["cache", f"model.pretrained={pipeline_folder}", f"data.shards={corpus}", "data.resolution=64",
             "data.num_workers=0", f"out={tmp_path}", f"data.missing_shards={missing}"]  # fmt: skip
    with monkeypatch.context() as patch:
        lost(patch, "00001.tar")
        assert "1 shards could not be encoded, the same command tries them again: 00001.tar" in fails(capsys, *words)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["00000.tar.latents.safetensors", "00002.tar.latents.safetensors"]
    main(words)
    assert "3 shards, 1 to encode" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 3


def test_a_file_holds_what_its_header_says(pipeline_folder, corpus, tmp_path):
    samples, model = write(pipeline_folder, corpus, tmp_path)
    with safe_open(tmp_path / "00000.tar.latents.safetensors", framework="numpy") as file:
        assert file.get_tensor("posterior").shape == (16, 2, 4, 8, 8)
        images = torch.from_numpy(np.stack([samples.get(row)[0] for row in range(16)]))
        mean, std = model.encode_posterior(images)
        expected = torch.stack([mean, std], 1)  # another batch size: convolutions sum in another order
        torch.testing.assert_close(torch.from_numpy(file.get_tensor("posterior")), expected, atol=2e-4, rtol=0)


def test_a_list_of_captions_is_refused(tmp_path):
    metadata = b'{"one": "fox", "many": ["fox", "a fox"], "single": ["fox"]}'
    write_tar(tmp_path / "00000.tar", [("0.jpg", picture()), ("0.txt", b"fox"), ("0.json", metadata)])
    for column in ("txt", "one", "single"):
        check_captions(ShardSamples(str(tmp_path), 64, column), [0])
    with pytest.raises(ValueError, match=r"data\.caption=many is a list of captions in 00000\.tar"):
        check_captions(ShardSamples(str(tmp_path), 64, "many"), [0])


def batches_of(corpus, cache, model, **options):
    batches = data(corpus, cache=str(cache), **options)
    batches.check_cache(model.fingerprint, False)
    return batches


def test_a_cache_of_two_makes_is_refused(pipeline_folder, corpus, tmp_path):
    """`memtrain cache overwrite=true` for another VAE was stopped after the first shards."""
    write(pipeline_folder, corpus, tmp_path)
    _, model = write(pipeline_folder, corpus, tmp_path, numbers=[])
    batches_of(corpus, tmp_path, model)
    next(model.vae.parameters()).data.add_(1e-3)
    samples = ShardSamples(str(corpus), 64)
    write_latents(
        model, samples, [0, 1], str(tmp_path), dtype="float32", flip=False, batch_size=7, num_workers=0,
        device=torch.device("cpu"), progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"00002\.tar\.latents\.safetensors was made with another VAE.*overwrite=true"):
        batches_of(corpus, tmp_path, model)


def test_a_rewritten_tar_of_the_same_size_makes_its_latents_outdated(pipeline_folder, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in "01":
        write_tar(shards / f"{name}.tar", sample("a", "red", picture((200, 30, 30), form="PNG")))
    size = (shards / "1.tar").stat().st_size
    samples, model = write(pipeline_folder, shards, "beside")
    groups = dict(seed=0, canaries=0, repeats=1, reference=0)
    batches_of(shards, "beside", model, **groups)
    write_tar(shards / "1.tar", sample("a", "tan", picture((30, 30, 200), form="PNG")))
    assert (shards / "1.tar").stat().st_size == size
    with pytest.raises(ValueError, match=r"1\.tar\.latents\.safetensors was made with another state of its shard"):
        batches_of(shards, "beside", model, **groups)
    samples = ShardSamples(str(shards), 64)
    with pytest.raises(ValueError, match=r"1\.tar\.latents\.safetensors was made with another state of its shard"):
        missing_shards(samples, "beside", made_with(model, samples), False, False)


def test_latents_of_other_rows_are_refused(pipeline_folder, tmp_path):
    """The filter reads the parquet beside the shard: as many samples pass, but others."""
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "0.tar", [part for key in "abc" for part in sample(key, key, picture((9, 9, ord(key))))])

    def score(*values):
        pq.write_table(pa.table({"key": ["a", "b", "c"], "score": values}), shards / "0.parquet")

    groups = dict(seed=0, canaries=0, repeats=1, reference=0, where="score > 0")
    score(1, 1, 0)
    _, model = write(pipeline_folder, shards, tmp_path, where="score > 0")
    assert len(batches_of(shards, tmp_path, model, **groups).samples) == 2
    score(0, 1, 1)
    with pytest.raises(ValueError, match="another state of its shard"):
        batches_of(shards, tmp_path, model, **groups)


@pytest.mark.parametrize("header", ["[1]", "{}", "no json"])
def test_a_header_that_says_nothing_is_refused(pipeline_folder, corpus, tmp_path, header):
    _, model = write(pipeline_folder, corpus, tmp_path)
    path = tmp_path / "00001.tar.latents.safetensors"
    save_file(load_file(path), path, metadata={"memtrain": header})
    with pytest.raises(ValueError, match=r"00001\.tar\.latents\.safetensors"):
        batches_of(corpus, tmp_path, model)


@pytest.fixture(scope="module")
def t5_folder(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5") / "pipeline"
    stable_diffusion_3(stable_diffusion(pipeline_folder), t5=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "length", "padding", "stored"),
    [
        ("flow", None, "encoded", {24}),
        ("t5", None, "encoded", {24 + 256}),
        ("t5", 9, "encoded", {24 + 9}),
        ("t5", None, "zero", {24 + 6, 24 + 7, 24 + 8, 24 + 10}),
        ("t5", 5, "zero", {24 + 5}),
    ],
)
def test_a_flow_is_trained_from_a_cache_as_without(request, corpus, tmp_path, name, length, padding, stored):
    """Without T5 its zeros are not stored; with one all its tokens are, of which `max_sequence_length` says the count;
    where zeros stand for padding, each caption's own.

    And the corpus' cache is as large as was said."""
    pipeline, runs = request.getfixturevalue(f"{name}_folder"), []
    samples = ShardSamples(str(corpus), 64)
    for cache in (None, str(tmp_path)):
        module = build_module(pipeline, scoring=Scoring(every=0))
        if length:
            module.model.cut_captions(length)
        set_t5_padding(module.model, padding)
        if cache:
            write_latents(
                module.model, samples, range(len(samples.shards)), cache, dtype="float32", flip=False, batch_size=16,
                num_workers=0, device=torch.device("cpu"), progress=False,
            )  # fmt: skip
        batches = data(corpus, cache=cache)
        batches.check_cache(module.model.fingerprint, False)
        fit(module, batches, tmp_path / "run", 1)
        runs.append(weights(module))
    torch.testing.assert_close(runs[1], runs[0], atol=1e-6, rtol=0)
    files = sorted(tmp_path.glob("*.latents.safetensors"))
    assert set().union(*(lengths_in(file) for file in files)) == stored
    said = len(samples) * sample_bytes(module.model, samples, range(len(samples.shards)), "float32", False)
    assert sum(file.stat().st_size for file in files) == pytest.approx(said, rel=0.02)
    if length or padding == "zero":
        other = build_module(pipeline).model
        unlike = f"max_sequence_length={length}, not 256" if length else "t5_padding=zero, not encoded"
        with pytest.raises(ValueError, match=f"made with model.{unlike}"):
            data(corpus, cache=str(tmp_path)).check_cache(other.fingerprint, False)


def lengths_in(file):
    """Of how many tokens the captions in a cache's file are."""
    tensors = load_file(file)
    if HIDDEN_BOUNDS in tensors:
        return set(tensors[HIDDEN_BOUNDS].diff().tolist())
    return {tensors["hidden"].shape[1]}


def test_a_cache_that_the_disk_cannot_hold_is_refused_before_it_is_written(corpus, tmp_path, monkeypatch):
    samples, free = ShardSamples(str(corpus), 64), 1000 * 16
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 * free, 0, free))
    assert check_room(samples, [0], str(tmp_path / "new"), 1000) == "16 samples of 1.0 kB, 0.00 GB in all"
    with pytest.raises(OSError, match=r"too full for the cache: 32 samples of 1.0 kB.* free; free some space, or name"):
        check_room(samples, [0, 1], str(tmp_path / "new"), 1000)
    for number in (0, 1):  # to be overwritten
        (tmp_path / f"0000{number}.tar.latents.safetensors").write_bytes(bytes(free))
    check_room(samples, [0, 1], str(tmp_path), 1000)


def test_the_size_is_told_by_the_shards_that_are_encoded_whatever_cannot_be_read(pipeline_folder, corpus, monkeypatch):
    samples, model, asked = ShardSamples(str(corpus), 64), build_module(pipeline_folder).model, []
    captions = samples.captions

    def read(row):
        asked.append(row)
        if row == 20:
            raise BadSample("gone")
        return captions(row)

    monkeypatch.setattr(samples, "captions", read)
    whole = sample_bytes(model, samples, [1], "float32", False)
    assert asked == list(range(16, 32))
    assert sample_bytes(model, samples, [], "float32", False) == whole and len(asked) == 16
    sample_bytes(model, samples, [0, 2], "float32", False)
    assert set(asked[16:]) == {*range(16), *range(32, 48)}
