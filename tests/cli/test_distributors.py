"""Tasks shared by the workers of a real Ray cluster, of two nodes: some are killed, then the head is.

It starts once for all tests; the one that kills its head comes last.
"""

import logging
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from memtrain.audit.detect.detection import detect
from memtrain.audit.detect.spread import Spread
from memtrain.cli.main import main
from memtrain.cli.shards import shards
from memtrain.data import crews
from memtrain.data.on_ray import OnRay
from tests.support.killed import loaded
from tests.support.tasks import do_prepared, prepare, tries

pytest.importorskip("ray", reason="ray is not installed: pip install 'memtrain[ray]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    from tests.support.ray_cluster import ray_cluster

    with ray_cluster() as made:
        yield made


def named(task: tuple[str, str]) -> str:
    return Path(task[1]).name


def test_a_worker_that_is_killed_loses_nothing_and_what_always_kills_is_named_and_left(
    cluster, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(crews, "TRIES", 2)
    given = [({1: "kill", 4: "fail once"}.get(n, "do"), str(tmp_path / f"t{n}")) for n in range(8)]
    with caplog.at_level(logging.WARNING):
        done = list(OnRay(cluster.address).run(do_prepared, given, partial(prepare, str(tmp_path)), named))
    by_index = {one.index: one for one in done}
    assert len(done) == 8 and {n for n, one in by_index.items() if one.failure} == {1}
    assert all(one.result[0] == f"t{n}" for n, one in by_index.items() if one.result)
    assert [tries(path) for _, path in given] == [1, 2, 1, 1, 2, 1, 1, 1]
    assert "t1: its worker died" in caplog.text and "t1 is left after 2 tries" in caplog.text


def test_an_index_is_the_same_bytes(cluster, corpus, tmp_path, capsys):
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
        for path in corpus.glob("*.tar"):
            (tmp_path / name / path.name).symlink_to(path)
    shards(["index", str(tmp_path / "local"), "workers=1"])
    shards(["index", str(tmp_path / "ray"), "distributor=ray", f"ray.address={cluster.address}", "workers=1"])
    written = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert len(written) == 3 * 4 and capsys.readouterr().out.count("indexed 48 samples in 3 shards") == 2
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir()}


def test_scores_are_the_same_table_whoever_dies_in_whatever_parts(cluster, pipeline_folder, tmp_path, caplog):
    """One process; two actors, one of them killed in the middle; three parts on their own, merged."""
    prompts = [f"{thing} on a {colour} background" for thing in ("fox", "cat", "pizza") for colour in ("teal", "red")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    words = ["detect", f"model={pipeline_folder}", f"prompts={tmp_path}/prompts.txt", "num_inference_steps=2",
             "num_images_per_prompt=1", "batch_size=2"]  # fmt: skip
    main([*words, f"out={tmp_path}/one"])
    with pytest.raises(SystemExit):
        main([*words, f"out={tmp_path}/parts", "merge"])
    for part in ("1/3", "2/3", "3/3"):
        main([*words, f"out={tmp_path}/parts", f"part={part}"])
    assert not (tmp_path / "parts" / "scores.parquet").exists()
    main([*words, f"out={tmp_path}/parts", "merge"])
    mark = tmp_path / "killed"
    spread = Spread(OnRay(cluster.address, 2), partial(loaded, str(pipeline_folder), mark))
    denoiser, scores = loaded(str(pipeline_folder), mark)
    with caplog.at_level(logging.WARNING):
        options = dict(num_inference_steps=2, num_images_per_prompt=1, batch_size=2, out=tmp_path / "killed_once")
        assert detect(denoiser, prompts, scores=scores, spread=spread, **options).newly_scored == 6
    assert mark.exists() and re.search(r"prompts \d to \d: its worker died .*it is tried again", caplog.text)
    tables = [pq.read_table(tmp_path / name / "scores.parquet") for name in ("one", "parts", "killed_once")]
    assert tables[0].num_rows == 6 and tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    assert (tmp_path / "one/scores.parquet").read_bytes() == (tmp_path / "parts/scores.parquet").read_bytes()


def test_nobody_answers_at_the_address():
    with pytest.raises(ValueError, match=r"ray\.address=127\.0\.0\.1:1 cannot be joined: nobody listens there"):
        next(OnRay("127.0.0.1:1").run(do_prepared, []))


def test_a_head_that_goes_away_and_comes_back_loses_nothing(cluster, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")  # after which Ray ends a program; 60 if not said
    given = [("do", str(tmp_path / f"t{n}")) for n in range(8)]
    with caplog.at_level(logging.WARNING):
        running = OnRay(cluster.address).run(do_prepared, given, partial(prepare, str(tmp_path)), named)
        done = [next(running)]
        cluster.kill()
        cluster.start_head()
        done += running
    assert Counter(one.index for one in done) == Counter(range(8)) and not any(one.failure for one in done)
    assert f"the head of the Ray cluster at {cluster.address} is gone" in caplog.text and "is back" in caplog.text
