"""Tasks shared by the workers of a real Ray cluster, of two nodes: some are killed, then the head is.

It starts once for all tests; the one that kills its head comes last.
"""

import logging
import os
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
from memtrain.data.recall import plant
from memtrain.data.samples import ShardSamples
from tests.support.killed import loaded
from tests.support.tars import picture, sample, write_tar
from tests.support.tasks import do_prepared, prepare, tries

pytest.importorskip("ray", reason="ray is not installed: pip install 'memtrain[ray]'")
pytestmark = pytest.mark.slow
EVERY = "MEMTRAIN_EVERY_COMMAND" in os.environ


@pytest.fixture(scope="module")
def cluster():
    from tests.support.ray_cluster import ray_cluster

    with ray_cluster() as made:
        yield made


def named(task: tuple[str, str]) -> str:
    return Path(task[1]).name


def test_a_worker_that_is_killed_loses_nothing_and_what_never_can_be_done_is_named_and_left(
    cluster, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(crews, "TRIES", 2)
    given = [({1: "kill", 4: "fail once", 6: "starve"}.get(n, "do"), str(tmp_path / f"t{n}")) for n in range(8)]
    with caplog.at_level(logging.WARNING):
        done = list(OnRay(cluster.address).run(do_prepared, given, partial(prepare, str(tmp_path)), named))
    by_index = {one.index: one for one in done}
    assert len(done) == 8 and {n for n, one in by_index.items() if one.failure} == {1, 6}
    assert all(one.result[0] == f"t{n}" for n, one in by_index.items() if one.result)
    assert [tries(path) for _, path in given] == [1, 2, 1, 1, 2, 1, 2, 1]
    assert "t1: its worker died" in caplog.text and "t1 is left after 2 tries" in caplog.text
    assert "t6 is left after 2 tries: out of memory" in caplog.text


def on(where: str, cluster) -> list[str]:
    return ["workers=1"] if where == "local" else ["distributor=ray", f"ray.address={cluster.address}", "workers=1"]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tools_of_shards_write_the_same_files(cluster, tmp_path, capsys):
    """Of shards with duplicates and a picture that cannot be read."""
    (tmp_path / "shards").mkdir()
    plant(tmp_path / "shards", 21, [])
    write_tar(tmp_path / "shards/00001.tar", [*sample("a", image=b"none"), *sample("b")])
    for number in range(5):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / f"pictures/{number}.jpg").write_bytes(picture((50 * number, 9, 9)))
        (tmp_path / f"pictures/{number}.txt").write_text(f"picture {number}")
    found, said = [], []
    for where in ("local", "ray"):
        out, words = tmp_path / where, [str(tmp_path / "shards"), *on(where, cluster)]
        out.mkdir()
        shards(["duplicates", *words, f"out={out}/groups.parquet"])
        if EVERY:
            with pytest.raises(SystemExit):
                shards(["check", *words, f"manifest={out}/check", "json=true"])
            shards(["pack", f"{tmp_path}/pictures", f"{out}/packed", "shard-size=2", *on(where, cluster)])
            for path in (tmp_path / "shards").glob("*.tar"):
                (out / path.name).symlink_to(path)
            shards(["index", str(out), *on(where, cluster)])
        said.append(capsys.readouterr().out.replace(str(out), "OUT"))
        named_or_timed = ("manifest.json", "_stats.json")
        found.append({name: data for name, data in files_in(out).items() if not name.endswith(named_or_timed)})
    assert pq.read_table(tmp_path / "ray/groups.parquet").num_rows == 6 and said[0] == said[1]
    assert found[0] == found[1]


@pytest.mark.skipif(not EVERY, reason="MEMTRAIN_EVERY_COMMAND=1: every command on Ray, half a minute of processors")
def test_a_model_at_work_writes_the_same_files(cluster, pipeline_folder, corpus, tmp_path):
    """Latents of shards, and what a model copies."""
    samples = ["key,caption,group", *(f"{ShardSamples(str(corpus), 64).key(n)},picture {n},canary" for n in (1, 40))]
    (tmp_path / "samples.csv").write_text("\n".join(samples))
    for where in ("local", "ray"):
        words = [word.replace("workers", "processes") for word in on(where, cluster)]
        main(["cache", f"model.pretrained={pipeline_folder}", f"data.shards={corpus}", "data.resolution=64",
              "data.num_workers=0", f"out={tmp_path}/{where}/cache", *words])  # fmt: skip
        main(["evaluate", f"model={pipeline_folder}", f"data={corpus}", f"samples={tmp_path}/samples.csv",
              "num_images_per_prompt=1", "num_inference_steps=1", "timesteps_per_sample=1", "batch_size=1",
              "nearest=4", "fid_samples=4", f"out={tmp_path}/{where}/evaluated", *on(where, cluster)])  # fmt: skip
    local, ray = (files_in(tmp_path / where) for where in ("local", "ray"))
    assert len(local) > 6 and local == ray


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
