"""The folder of fetched shards: many processes, a bound on its size, and what is fetched ahead of need."""

import contextlib
import os
import pickle
import random
import resource
import signal
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest

from memtrain.data.remote import ShardMissing
from tests.support.forks import PATIENCE
from tests.support.remote import MORE, Source, cache_of, ended, fifo_in, fork, hear, parts_in, shards_in, started

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


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
        thread.join(PATIENCE)
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
