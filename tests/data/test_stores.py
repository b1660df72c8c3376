"""Shards in an object store, behind a real S3 server on this machine: moto's, in a thread of the tests."""

import json
import logging
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from torch.utils.data import DataLoader

from memtrain.cli.shards import shards
from memtrain.data import stores
from memtrain.data.batches import BatchDecoder
from memtrain.data.datamodule import _Positions
from memtrain.data.images import BadSample
from memtrain.data.index import write_index
from memtrain.data.order import GlobalBatchSampler
from memtrain.data.remote import ShardMissing
from memtrain.data.samples import ShardSamples
from memtrain.data.sources import find_sources, local_shards
from memtrain.data.stores import Range, read_ranges
from tests.conftest import build_data


@pytest.fixture(scope="module")
def requests():
    """(method, path, range) of each request that the server answered."""
    return []


@pytest.fixture(scope="module")
def bucket(corpus, tmp_path_factory, requests):
    """s3://corpus/laion, with the shards of the corpus, index files and parquets beside them."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    app = server._server.app

    def noted(environ, start_response):
        requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")))
        return app(environ, start_response)

    server._server.app = noted
    host, port = server.get_host_and_port()
    local = tmp_path_factory.mktemp("indexed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        system = fsspec.filesystem("s3")
        system.mkdir("corpus")
        for path in sorted(corpus.iterdir()):
            shutil.copy(path, local)
            if path.suffix == ".tar":
                write_index(local / path.name, hashed=True)
        for path in local.iterdir():
            stores.upload(path, f"s3://corpus/laion/{path.name}")
        yield "s3://corpus/laion"
        server.stop()


def tars_fetched_whole(requests):
    return [path for method, path, part in requests if method == "GET" and path.endswith(".tar") and part is None]


def first_batches(data, workers, count=6):
    sampler = GlobalBatchSampler(data.order, 8, 1, 0, 1, num_steps=count, upcoming=data.samples.prefetch)
    decoder = BatchDecoder(data.samples, data.groups, data.views)
    loader = DataLoader(_Positions(), batch_sampler=sampler, num_workers=workers, collate_fn=decoder)
    return list(islice(loader, count))


def test_a_folder_of_a_bucket_is_its_tars(bucket, corpus):
    names = sorted(path.name for path in corpus.glob("*.tar"))
    assert [shard.url for shard in find_sources(bucket)] == [f"{bucket}/{name}" for name in names]
    assert find_sources(f"{bucket}/{{00000..00002}}.tar") == find_sources(f"{bucket}/")


@pytest.mark.parametrize("fetch", ["shards", "samples"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_training_sees_what_it_would_see_on_disk(bucket, corpus, requests, tmp_path, fetch, workers):
    """Also in a forked worker, whose parent has talked to the store before."""
    options = dict(crop="random", flip=0.5, where="width >= 10", max_visits_per_group=2)
    here = build_data(corpus, cache_dir=str(tmp_path / "here"), **options)
    requests.clear()
    there = build_data(bucket, cache_dir=str(tmp_path / "there"), fetch=fetch, **options)
    assert not tars_fetched_whole(requests)  # indexes, hashes and columns lie beside them
    for one, other in zip(first_batches(here, 0), first_batches(there, workers), strict=True):
        assert (one.images == other.images).all() and one.captions == other.captions and other.valid.all()
        assert (one.sample_index == other.sample_index).all() and (one.picture == other.picture).all()
    fetched = tars_fetched_whole(requests)
    assert len(fetched) == (0 if fetch == "samples" else 3) and len(set(fetched)) == len(fetched)
    kept = list((tmp_path / "there" / "shards").glob("*.tar"))
    assert len(kept) == len(fetched)


def test_a_sample_is_one_request(bucket, requests, tmp_path):
    samples = ShardSamples(bucket, 64, "txt", cache_dir=tmp_path, fetch="samples")
    samples.get(0)  # opens the first shard
    requests.clear()
    samples.read_ahead([1, 2, 3])
    for position in (1, 2, 3):
        samples.get(position)
    assert len(requests) == 3 and all(part is not None for _, _, part in requests)


def test_a_shard_without_an_index_is_fetched_once_to_be_indexed(bucket, corpus, requests, tmp_path):
    stores.upload(next(iter(sorted(corpus.glob("*.tar")))), "s3://corpus/bare/00000.tar")
    requests.clear()
    for _ in range(2):
        samples = ShardSamples("s3://corpus/bare", 64, cache_dir=tmp_path, fetch="samples")
        assert len(samples) == 16 and samples.get(3).caption
    assert tars_fetched_whole(requests) == ["/corpus/bare/00000.tar"]


def test_a_shard_that_has_changed_gives_no_samples(bucket, corpus, tmp_path):
    first = sorted(corpus.glob("*.tar"))[0]
    stores.upload(first, "s3://corpus/changes/0.tar")
    samples = ShardSamples("s3://corpus/changes", 64, cache_dir=tmp_path / "cache", fetch="samples")
    (tmp_path / "longer.tar").write_bytes(first.read_bytes() + bytes(512))
    stores.upload(tmp_path / "longer.tar", "s3://corpus/changes/0.tar")
    with pytest.raises(BadSample, match="has changed"):
        samples.get(0)


def test_a_shard_that_is_gone_stops_or_is_passed_over(bucket, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("memtrain.data.open_shards._BACKOFF_S", 0)
    stores.upload(sorted(corpus.glob("*.tar"))[0], "s3://corpus/gone/0.tar")
    made = {
        skip: ShardSamples("s3://corpus/gone", 64, cache_dir=tmp_path, missing_shards=skip, fetch="samples")
        for skip in ("stop", "skip")
    }
    made["stop"].get(0)
    fsspec.filesystem("s3").rm("corpus/gone/0.tar")
    with pytest.raises(ShardMissing, match=r"s3://corpus/gone/0.tar cannot be read any more .*put it back"):
        made["stop"].get(1)
    with pytest.raises(BadSample, match="shard is missing"):
        made["skip"].get(1)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://no-such-bucket/laion", r"s3://no-such-bucket/laion cannot be listed \(.*bucket does not exist"),
        ("s3://corpus/empty", r"s3://corpus/empty .*(cannot be listed|has no \.tar)"),
        (
            "pipe:cat 0.tar",
            r"data\.fetch=samples reads ranges of bytes, and .*0\.tar has none .*use data\.fetch=shards",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(bucket, tmp_path, source, said):
    with pytest.raises(ValueError, match=said) as caught:
        ShardSamples(source, 64, cache_dir=tmp_path, fetch="samples")
    assert "\n" not in str(caught.value) and "a-secret" not in str(caught.value)


def test_ranges_of_many_files_and_what_cannot_be_had(bucket, corpus):
    first = sorted(corpus.glob("*.tar"))[0]
    data, url = first.read_bytes(), f"{bucket}/{first.name}"
    wanted = [
        Range(url, 0, 10),
        Range(url, 500, 600),
        Range(f"{bucket}/no.tar", 0, 1),
        Range(url, len(data) - 1, len(data) + 9),
    ]
    one, two, gone, short = read_ranges(wanted)
    assert (one, two) == (data[:10], data[500:600]) and isinstance(gone, FileNotFoundError)
    assert isinstance(short, OSError) and "1 bytes came where 10" in str(short)


def test_a_store_whose_package_is_not_there_says_which(monkeypatch):
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'memtrain\[gs\]'"):
        find_sources("gs://bucket/laion")
    assert [shard.url for shard in find_sources("gs://bucket/{0..1}.tar")] == ["gs://bucket/0.tar", "gs://bucket/1.tar"]


# ---- commands that look at whole shards


def test_commands_over_a_bucket_find_what_they_find_on_disk(bucket, corpus, requests, tmp_path, capsys):
    tables = {}
    requests.clear()
    for name, source in {"here": str(corpus), "there": "s3://corpus/laion"}.items():
        out = tmp_path / f"{name}.parquet"
        shards(["duplicates", source, "--out", str(out), "workers=1"])
        tables[name] = pq.read_table(out)
        capsys.readouterr()
        shards(["check", source, "--json", "--manifest", str(tmp_path / f"{name}-check"), "workers=1"])
        tables[f"{name}-check"] = json.loads(capsys.readouterr().out)
    assert tables["there"] == tables["here"] and tables["there-check"] == tables["here-check"]
    assert len(tars_fetched_whole(requests)) == 6
    shards(["duplicates", "s3://corpus/laion", "--out", str(tmp_path / "again.parquet"), "--manifest",
            str(tmp_path / "there.partials"), "workers=1"])  # fmt: skip
    assert len(tars_fetched_whole(requests)) == 6  # what was looked at is not fetched again
    assert not list(Path(tempfile.gettempdir()).glob("memtrain-shard-*"))


def test_an_index_is_written_beside_a_shard_in_a_bucket(bucket, corpus, requests, tmp_path, capsys):
    first = sorted(corpus.glob("*.tar"))[0]
    stores.upload(first, "s3://corpus/unindexed/0.tar")
    for said in ("indexed 16 samples in 1 shards", "1 were indexed already"):
        shards(["index", "s3://corpus/unindexed", "workers=1"])
        assert said in capsys.readouterr().out
    requests.clear()
    samples = ShardSamples("s3://corpus/unindexed", 64, cache_dir=tmp_path, fetch="samples")
    assert len(samples) == 16 and samples.indexed.indexes[0].is_hashed and not tars_fetched_whole(requests)


def test_a_small_corpus_is_drawn_from_a_bucket(bucket, corpus, tmp_path):
    for name, source in {"here": str(corpus), "there": bucket}.items():
        shards(["draw", source, str(tmp_path / name), "--count", "5"])
    here, there = (next((tmp_path / name).glob("*.tar")).read_bytes() for name in ("here", "there"))
    assert here == there


def test_what_is_neither_on_disk_nor_in_a_store_is_refused():
    with pytest.raises(ValueError, match=r"neither on a local disk nor in an object store; copy the shards first"):
        local_shards(["https://host/0.tar"])
