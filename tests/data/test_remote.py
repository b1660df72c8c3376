"""Shards over http, object stores and commands: whole and once, or one line that says why not."""

import http.server
import logging
import os
import pickle
import random
import re
import shutil
import threading
import time
from collections import Counter

import pytest

from memtrain.data import stores
from memtrain.data.paths import is_remote
from memtrain.data.remote import ShardCache, ShardMissing, shown
from tests.support.remote import MORE, Source, cache_of, parts_in, shards_in


@pytest.fixture
def server():
    """(address, body, requests by path): /ok/ is there, /short/ breaks off, all else is a 404 with a page."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens http with curl, which is not installed")
    body, requests = random.Random(0).randbytes(300_000), Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests[self.path.partition("?")[0]] += 1
            there = self.path.startswith(("/ok/", "/short/"))
            content = body if there else b"<html>no such shard</html>"
            self.send_response(200 if there else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:1000] if self.path.startswith("/short/") else content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}", body, requests
        http_server.shutdown()


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("https://example.org/0.tar", True),
        ("s3://bucket/0.tar", True),
        ("gs://bucket/0.tar", True),
        ("hdfs://host/0.tar", True),
        ("pipe:cat 0.tar", True),
        ("file:///data/0.tar", False),
        ("FILE:///data/0.tar", False),
        ("/data/0.tar", False),
        ("data/pipe:0.tar", False),
        ("a:b/0.tar", False),
    ],
)
def test_what_is_remote(url, remote):
    assert is_remote(url) is remote


def test_a_shard_over_http_comes_whole_and_once(tmp_path, server):
    address, body, requests = server
    cache, url = cache_of(tmp_path), f"{address}/ok/00000.tar"
    assert not cache.path(url).exists() and not requests
    for _ in range(2):
        path = cache.fetch(url)
        assert path == cache.path(url) and path.read_bytes() == body
    assert requests == {"/ok/00000.tar": 1} and path.name.endswith("-00000.tar")


@pytest.mark.parametrize(
    ("place", "says"), [("gone", "HTTP status of 400 or above"), ("short", "the body was cut short")]
)
def test_a_page_of_404_and_a_cut_body_are_no_shards(tmp_path, server, place, says):
    address, _, requests = server
    cache, url = cache_of(tmp_path), f"{address}/{place}/00000.tar"
    with pytest.raises(ShardMissing, match=f"{re.escape(url)} was not fetched in 3 tries: curl.*{says}"):
        cache.fetch(url)
    assert requests[f"/{place}/00000.tar"] == 3 and not shards_in(cache) and not parts_in(cache)


@pytest.mark.parametrize("size", [0, 1, MORE + 1])
def test_a_command_gives_a_shard_whole_and_once(tmp_path, size):
    """An empty shard is whole, too: the index says what is wrong with it."""
    cache, source = cache_of(tmp_path, 8 << 20), Source(tmp_path, size=size)
    for _ in range(2):
        assert cache.fetch(source.url()).read_bytes() == source.data
    assert source.runs() == 1 and not parts_in(cache)


@pytest.mark.parametrize("verbose", ["0", "1"], ids=["quiet", "verbose"])
@pytest.mark.parametrize("end", ["exit 1", "exit 141", "exit 23", "kill -9 $$", "exec no-such-program 2>&-"])
def test_a_command_that_fails_after_some_bytes_leaves_no_shard(tmp_path, monkeypatch, capfd, end, verbose):
    monkeypatch.setenv("GOPEN_VERBOSE", verbose)  # under which webdataset forgets the exit status
    cache, source = cache_of(tmp_path), Source(tmp_path)
    url = f"pipe:echo run >> {source.log}; head -c 100 {source.file}; {end}"
    with pytest.raises(ShardMissing, match="the command ended with status"):
        cache.fetch(url)
    assert source.runs() == 3 and not shards_in(cache) and not parts_in(cache)


def test_a_missing_shard_is_one_line_and_a_warning_for_each_try(tmp_path, caplog):
    cache = cache_of(tmp_path, backoff_s=0.05)
    start = time.monotonic()
    with pytest.raises(ShardMissing) as caught:
        cache.fetch("pipe:false")
    assert time.monotonic() - start > 0.05 + 0.1
    assert str(caught.value) == (
        "shard pipe:false was not fetched in 3 tries: the command ended with status 1; "
        "see that it is still there and may be read, or take it out of data.shards"
    )
    assert [r.getMessage() for r in caplog.records] == [
        f"shard pipe:false: try {n} of 3 failed: the command ended with status 1" for n in (1, 2, 3)
    ]
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), ShardMissing)  # out of a loader's worker


def test_a_shard_that_comes_at_the_third_try_is_a_shard(tmp_path, caplog):
    cache, source = cache_of(tmp_path), Source(tmp_path)
    url = source.url(then=f"[ $(wc -l < {source.log}) -ge 3 ]")
    assert cache.fetch(url).read_bytes() == source.data
    assert source.runs() == 3 and len(caplog.records) == 2


def test_a_scheme_without_an_opener_says_what_would_open_it(tmp_path):
    with pytest.raises(ShardMissing, match=r"hdfs://host/0\.tar .*no gopen handler.*pipe:COMMAND opens any"):
        cache_of(tmp_path).fetch("hdfs://host/0.tar")


def test_s3_goes_through_aws_where_no_package_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    aws = tmp_path / "bin" / "aws"
    aws.parent.mkdir()
    aws.write_text('#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && printf "shard of $3"\n')
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", f"{aws.parent}:{os.environ['PATH']}")
    assert cache_of(tmp_path).fetch("s3://bucket/a b.tar").read_text() == "shard of s3://bucket/a b.tar"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ShardMissing, match=r"s3:// takes pip install 'memtrain\[s3\]', or the command aws"):
        cache_of(tmp_path).fetch("s3://bucket/b.tar")


def test_a_local_disk_that_refuses_is_the_reason(tmp_path):
    cache, url = cache_of(tmp_path, tries=2), "pipe:exec sleep 900"  # a command that is not waited for
    (cache.folder / f".{cache.path(url).name}.part").mkdir(parents=True)
    start = time.monotonic()
    with pytest.raises(ShardMissing, match="Is a directory"):
        cache.fetch(url)
    assert time.monotonic() - start < 450


def test_names_are_readable_and_never_collide(tmp_path):
    cache = cache_of(tmp_path)
    names = {
        url: cache.path(url).name
        for url in [
            "https://example.org/a/00000.tar",
            "https://example.org/b/00000.tar",
            "https://example.org/b/00000.tar?part=1",
            "https://example.org/b/00000.tar/",
            "pipe:aws s3 cp s3://bucket/00000.tar - | cat",
            "pipe:false",
            "https://example.org/" + "x" * 300 + "/../..",
            "https://example.org/%2e%2e/é:*.tar",
        ]
    }
    assert len(set(names.values())) == len(names)
    assert all(re.fullmatch(r"[0-9a-f]{16}-[A-Za-z0-9._-]{0,80}", name) for name in names.values())
    assert [name[17:] for name in names.values()][:6] == ["00000.tar"] * 5 + ["false"]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/00000.tar?X-Signature=SECRET&a='SECRET b' SECRET",
        "https://user:SECRET@example.org/00000.tar?x?SECRET",
        "pipe:curl 'https://example.org/00000.tar?X-Signature=SECRET' | cat",
        "pipe:curl https://user:SECRET@example.org/00000.tar#x?SECRET",
    ],
)
def test_secrets_are_not_shown(tmp_path, url):
    assert "SECRET" not in shown(url) and "example.org/00000.tar" in shown(url)
    assert "SECRET" not in cache_of(tmp_path).path(url).name


def test_secrets_are_neither_logged_nor_raised(tmp_path, server, caplog):
    address, body, _ = server
    cache = cache_of(tmp_path, max_bytes=1)
    with caplog.at_level(logging.DEBUG):
        for url in (
            f"{address}/gone/0.tar?sig=SECRET",
            "s4://user:SECRET@host/0.tar?sig=SECRET",
            f"pipe:echo '{address}/0.tar?sig=SECRET'; false",
        ):
            with pytest.raises(ShardMissing) as caught:
                cache.fetch(url)
            assert "SECRET" not in str(caught.value) and caught.value.__context__ is None
        assert cache.fetch(f"{address}/ok/0.tar?sig=SECRET").read_bytes() == body
    assert caplog.records and "SECRET" not in caplog.text


def test_a_long_command_is_cut_and_stays_on_one_line():
    assert shown("pipe:cat x\n | cat") == "pipe:cat x | cat"
    assert len(shown("pipe:" + "cat x | " * 50)) == 100
    assert len(shown("https://example.org/" + "x" * 200)) == 220


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(max_bytes=0), "data.cache_bytes must be > 0, got 0; "),
        (dict(max_bytes=-5), "data.cache_bytes must be > 0, got -5; "),
        (dict(max_bytes=1, tries=0), "tries must be >= 1, got 0; "),
    ],
)
def test_a_cache_that_can_hold_nothing_is_refused(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        ShardCache(tmp_path, **options)
