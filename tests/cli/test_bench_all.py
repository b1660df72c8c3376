"""`memtrain bench all`: ratios, and those of before beside them."""

import argparse
import sys

from memtrain.cli import bench_all
from memtrain.cli.bench_all import Ratio, committed, cpu_seconds, table
from memtrain.cli.main import main
from tests.support.program import fails


def test_a_table_is_written_read_and_compared_with(monkeypatch, capsys, tmp_path):
    (text := tmp_path / "results.md").write_text(f"before\n{bench_all.BEGIN}\n{bench_all.END}\nafter\n")
    found = [Ratio("decode a picture", 4.0, True), Ratio("a step", 2.0, False)]

    def bench(rounds):
        assert rounds == 2
        return found

    monkeypatch.setattr(bench_all, "BENCHES", (bench,))
    main(["bench", "all", "--quick", "--against", str(text), "--into", str(text)])
    assert "| decode a picture | 4.00x | more | – |" in capsys.readouterr().out
    assert text.read_text().startswith("before\n") and text.read_text().endswith("\nafter\n")
    assert committed(text) == {"decode a picture": 4.0, "a step": 2.0}
    found[:] = [Ratio("decode a picture", 3.0, True), Ratio("a step", 1.0, False)]
    main(["bench", "all", "--quick", "--against", str(text)])
    said = capsys.readouterr().out
    assert "3.00x | more | 4.00x (-25%, WORSE) |" in said and "1.00x | less | 2.00x (-50%) |" in said
    assert "--into" in fails(capsys, "bench", "all", "--into", str(tmp_path / "nothing.md"))


def test_every_benchmark_is_one_of_a_ratio(monkeypatch):
    parser = argparse.ArgumentParser()
    bench_all.add_arguments(parser)
    assert parser.parse_args([]).against == bench_all.COMMITTED
    assert [bench.__name__ for bench in bench_all.BENCHES] == ["start", "decoding", "loading", "scoring", "detection"]
    assert table([Ratio("x", 1.0, True)]).splitlines()[-1] == "| x | 1.00x | more |"
    assert 0 < cpu_seconds([sys.executable, "-SI", "-c", "raise SystemExit(3)"]) < 5
