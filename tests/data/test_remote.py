import contextlib
import http.server
import logging
import multiprocessing
import os
import pickle
import random
import re
import resource
import selectors
import shutil
import signal
import threading
import time
from collections import Counter, OrderedDict
from pathlib import Path

import pytest

from memtrain.data.paths import is_remote
from memtrain.data.remote import ShardCache, ShardMissing, shown

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
fork = multiprocessing.get_context("fork")  # as a loader makes its workers
MORE = 3 << 20  # bytes; a command that has written them has been read from, so that a part of them is on disk


class Source:
    """A shard behind a shell command that writes a line to a log each time it runs."""

    def __init__(self, folder: Path, name: str = "00000.tar", size: int = 1000):
        self.file, self.log = folder / name, folder / f"{name}.log"
        self.data = random.Random(name).randbytes(size)
        self.file.write_bytes(self.data)

    def url(self, then: str = "") -> str:
        return f"pipe:echo run >> {self.log}; cat {self.file}; {then}"

    def runs(self) -> int:
        return self.log.read_text().count("run") if self.log.exists() else 0


def cache_of(tmp_path: Path, max_bytes: int = 1 << 20, **options) -> ShardCache:
    return ShardCache(tmp_path / "cache", max_bytes, **(dict(backoff_s=0.001) | options))


def shards_in(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if not path.name.startswith(".")}


def parts_in(cache: ShardCache) -> list[Path]:
    return list(cache.folder.glob(".*.part"))


def started(work, *args) -> multiprocessing.Process:
    process = fork.Process(target=work, args=args, daemon=True)
    process.start()
    return process


def ended(process) -> int | None:
    process.join(20)
    return process.exitcode


def fifo_in(folder: Path, name: str = "fifo") -> Path:
    os.mkfifo(folder / name)
    return folder / name


def hear(fifo: Path) -> None:
    """Wait until a command writes to it."""
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with selectors.DefaultSelector() as selector:  # unlike select.select not bound to descriptors below 1024
        selector.register(reader, selectors.EVENT_READ)
        heard = selector.select(20)
    os.close(reader)
    assert heard


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


def test_s3_goes_through_aws(tmp_path, monkeypatch):
    aws = tmp_path / "bin" / "aws"
    aws.parent.mkdir()
    aws.write_text('#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && printf "shard of $3"\n')
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", f"{aws.parent}:{os.environ['PATH']}")
    assert cache_of(tmp_path).fetch("s3://bucket/a b.tar").read_text() == "shard of s3://bucket/a b.tar"


def test_a_local_disk_that_refuses_is_the_reason(tmp_path):
    cache, url = cache_of(tmp_path, tries=2), "pipe:exec sleep 900"  # a command that is not waited for
    (cache.folder / f".{cache.path(url).name}.part").mkdir(parents=True)
    start = time.monotonic()
    with pytest.raises(ShardMissing, match="Is a directory"):
        cache.fetch(url)
    assert time.monotonic() - start < 450


def test_processes_at_once_fetch_once(tmp_path):
    cache, source = cache_of(tmp_path), Source(tmp_path)
    barrier = fork.Barrier(4)

    def work():
        barrier.wait()
        assert cache.fetch(source.url(then="sleep 0.2")).read_bytes() == source.data

    processes = [started(work) for _ in range(4)]
    assert [ended(process) for process in processes] == [0] * 4 and source.runs() == 1


def test_threads_at_once_fetch_once(tmp_path):
    cache, source = cache_of(tmp_path), Source(tmp_path)
    threads = [threading.Thread(target=cache.fetch, args=(source.url(then="sleep 0.1"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert source.runs() == 1 and cache.path(source.url(then="sleep 0.1")).exists()


@pytest.mark.parametrize("same", [True, False], ids=["same shard", "another shard"])
def test_a_process_killed_while_fetching_leaves_nothing_to_be_taken_for_whole(tmp_path, same):
    cache, source, other = cache_of(tmp_path, 8 << 20), Source(tmp_path, size=MORE), Source(tmp_path, "1.tar")
    fifo, hold = fifo_in(tmp_path), tmp_path / "hold"
    hold.touch()
    url = source.url(then=f"[ -e {hold} ] && {{ echo > {fifo}; exec sleep 30; }}; true")

    def work():
        os.setsid()
        cache.fetch(url)

    process = started(work)
    hear(fifo)  # the command hangs after its last byte
    process.kill()
    try:
        assert ended(process) == -signal.SIGKILL
        assert not cache.path(url).exists() and len(parts_in(cache)) == 1
        hold.unlink()
        # its command lives on, and holds nothing up
        assert cache.fetch(url if same else other.url()).read_bytes() == (source if same else other).data
        assert not parts_in(cache) and len(shards_in(cache)) == 1
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_what_another_process_is_fetching_is_not_cleared_away(tmp_path):
    cache, source, other = cache_of(tmp_path, 8 << 20), Source(tmp_path, size=MORE), Source(tmp_path, "1.tar")
    began, go_on = fifo_in(tmp_path, "began"), fifo_in(tmp_path, "go_on")
    url = source.url(then=f"echo > {began}; cat {go_on}")
    process = started(cache.fetch, url)
    hear(began)
    cache.fetch(other.url())
    assert len(parts_in(cache)) == 1
    go_on.write_bytes(b"the end")
    assert ended(process) == 0 and cache.path(url).read_bytes() == source.data + b"the end"


def test_the_least_recently_used_goes_first_and_its_readers_read_on(tmp_path):
    a, b, c = (Source(tmp_path, name) for name in "abc")
    cache = cache_of(tmp_path, max_bytes=2999)
    cache.fetch(a.url())
    with cache.fetch(b.url()).open("rb") as reader:
        cache.fetch(a.url())
        (cache.folder / "not ours.tar").write_bytes(bytes(5000))
        (cache.folder / ".not ours.part").touch()
        cache.fetch(c.url())
        assert shards_in(cache) == {cache.path(a.url()).name, cache.path(c.url()).name, "not ours.tar"}
        assert (cache.folder / ".not ours.part").exists()
        assert reader.read() == b.data
    assert cache.fetch(b.url()).read_bytes() == b.data
    assert (a.runs(), b.runs(), c.runs()) == (1, 2, 1)


def test_the_folder_is_a_least_recently_used_cache(tmp_path):
    """Against a plain model of one, for shards of many sizes in any sequence."""
    draw = random.Random(1)
    sources = [Source(tmp_path, f"{n}.tar", size) for n, size in enumerate([0, 100, 200, 300, 400, 500, 900])]
    cache, model = cache_of(tmp_path, max_bytes=1000), OrderedDict()
    for _ in range(60):
        source = draw.choice(sources)
        assert cache.fetch(source.url()).read_bytes() == source.data
        hit = source in model
        model[source] = len(source.data)
        model.move_to_end(source)
        while not hit and sum(model.values()) > 1000:
            model.popitem(last=False)
        assert shards_in(cache) == {cache.path(source.url()).name for source in model}


def test_a_shard_beyond_the_bound_is_kept_alone_and_told_once(tmp_path, caplog):
    small, large, larger = Source(tmp_path, "a", 10), Source(tmp_path, "b", 1001), Source(tmp_path, "c", 1002)
    cache = cache_of(tmp_path, max_bytes=1000)
    for source in (small, large, larger):
        assert cache.fetch(source.url()).read_bytes() == source.data
        assert shards_in(cache) == {cache.path(source.url()).name}
    (record,) = caplog.records
    assert "takes 1001 bytes, more than data.cache_bytes=1000" in record.getMessage()


@pytest.fixture
def many_open_files():
    """More than a set of select's can name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"no process may have more than {hard} files open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with open(os.devnull, "rb") as file:
            for _ in range(1100):
                stack.callback(os.close, os.dup(file.fileno()))
            yield


@pytest.fixture
def signalled(tmp_path):
    """(a shard whose fetch writes to a fifo, wait for that)."""
    fifo = fifo_in(tmp_path, "signal")
    return Source(tmp_path, "signal.tar").url(then=f"echo > {fifo}"), lambda: hear(fifo)


def test_what_was_fetched_ahead_is_there_at_once(tmp_path, signalled):
    url, wait = signalled
    cache, slow, gate = cache_of(tmp_path), Source(tmp_path), fifo_in(tmp_path, "gate")
    slow_url = slow.url(then=f"timeout 900 cat {gate}")
    start = time.monotonic()
    cache.prefetch([slow_url, url])
    assert time.monotonic() - start < 450  # it does not wait for what waits for this
    Path(gate).write_text("")
    wait()
    assert cache.fetch(slow_url).read_bytes() == slow.data and slow.runs() == 1


def test_fetch_joins_what_is_just_fetched_ahead(tmp_path):
    cache, source, fifo = cache_of(tmp_path), Source(tmp_path), fifo_in(tmp_path)
    url = source.url(then=f"echo > {fifo}; sleep 0.2")
    cache.prefetch([url])
    hear(fifo)
    assert cache.fetch(url).read_bytes() == source.data and source.runs() == 1


def test_a_process_with_many_open_files_fetches_all_the_same(tmp_path, many_open_files, signalled):
    url, wait = signalled
    cache, source = cache_of(tmp_path), Source(tmp_path)
    with source.file.open("rb") as file:
        assert file.fileno() >= 1024
    cache.prefetch([url])
    wait()
    assert cache.fetch(source.url()).read_bytes() == source.data


def test_a_failure_ahead_of_need_is_left_to_fetch(tmp_path, signalled):
    url, wait = signalled
    cache, source = cache_of(tmp_path), Source(tmp_path)
    cache.prefetch([source.url(then="false"), "pipe:\ud800", url])  # the second has no name
    wait()
    assert source.runs() == 1
    with pytest.raises(ShardMissing, match="3 tries"):
        cache.fetch(source.url(then="false"))


def test_a_forked_worker_fetches_ahead_by_itself(tmp_path, signalled):
    url, wait = signalled
    cache, source, first = cache_of(tmp_path), Source(tmp_path), Source(tmp_path, "first.tar")
    cache.prefetch([first.url()])

    def work():
        cache.prefetch([source.url(), url])
        wait()
        assert cache.path(source.url()).read_bytes() == source.data

    assert ended(started(work)) == 0
    assert cache.fetch(first.url()).read_bytes() == first.data


def test_a_worker_forked_amid_a_fetch_ahead_holds_no_lock(tmp_path):
    cache, source, fifo = cache_of(tmp_path), Source(tmp_path), fifo_in(tmp_path)
    url = source.url(then=f"echo > {fifo}; cat {fifo}")
    cache.prefetch([url])
    hear(fifo)
    child = started(time.sleep, 20)  # with the lock file open
    fifo.write_bytes(b"")
    cache.fetch(url)
    cache.path(url).unlink()
    late = started(cache.fetch, url)
    hear(fifo)  # its command runs: it has the lock
    fifo.write_bytes(b"")
    assert ended(late) == 0 and source.runs() == 2 and child.is_alive()
    child.kill()
    ended(child)


def test_a_cache_can_be_sent_to_a_spawned_worker(tmp_path):
    cache, source = cache_of(tmp_path), Source(tmp_path)
    cache.prefetch([source.url()])
    clone = pickle.loads(pickle.dumps(cache))
    assert clone.fetch(source.url()) == cache.fetch(source.url())
    clone.prefetch([source.url()])
    assert source.runs() == 1


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
