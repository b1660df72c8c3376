"""A small corpus is drawn from a large one."""

import io

import pytest

from memtrain.cli.main import main
from memtrain.data.draw import draw
from memtrain.data.samples import ShardSamples
from tests.support.corpora import sample, textured, write_tar
from tests.support.program import fails


def test_a_draw_is_a_function_of_the_seed_and_keeps_every_byte(corpus, tmp_path, capsys):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(["shards", "draw", str(corpus), str(tmp_path / out), "--count=20", f"--seed={seed}", "--shard-size=8"])
    files = {out: [path.read_bytes() for path in sorted((tmp_path / out).glob("*.tar"))] for out in "abc"}
    assert len(files["a"]) == 3 and files["a"] == files["b"] != files["c"]
    whole, drawn = ShardSamples(str(corpus), 64), ShardSamples(str(tmp_path / "a"), 64)
    there = {whole.members(position)[:2] for position in range(len(whole))}
    mine = [drawn.members(position)[:2] for position in range(len(drawn))]
    assert len(drawn) == 20 == len(set(mine)) and set(mine) <= there
    assert "wrote 20 samples" in capsys.readouterr().out


def test_a_picture_of_another_format_than_its_name_says_stays_a_sample(tmp_path):
    encoded = io.BytesIO()
    textured(1).save(encoded, "GIF")
    write_tar(tmp_path / "many/0.tar", sample("a", encoded.getvalue(), "a caption"))
    assert draw(ShardSamples(str(tmp_path / "many"), 64), tmp_path / "few", 1, seed=0) == 0
    assert ShardSamples(str(tmp_path / "few"), 64).members(0)[:2] == (encoded.getvalue(), b"a caption")


@pytest.mark.parametrize(("words", "said"), [("--count=49", "has 48 samples"), ("--count=0", "--count must be >= 1")])
def test_a_draw_that_cannot_be_made_is_named(words, said, corpus, tmp_path, capsys):
    assert said in fails(capsys, "shards", "draw", str(corpus), str(tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()
