"""What strangers wrote cannot forge a line of the log, drive a terminal or be run by a spreadsheet."""

import csv
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.audit.prompts import read_prompts
from memtrain.audit.training_samples import _read_csv
from memtrain.callbacks.canaries import CanaryList
from memtrain.cli.main import main
from memtrain.cli.shards import shards as shards_command
from memtrain.data.datamodule import from_shards
from memtrain.data.escaping import PrintableFormatter, as_cell, as_text, of_cell, printable
from tests.support.corpora import encode, sample, textured, write_tar

FORGED = "a\n2026-01-01 ERROR the disk is full"
EVIL = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\tx", "'=x", "\x1b[2Jx", FORGED, "b\udcff", "\u202etxt"]


@pytest.fixture
def handled(tmp_path, monkeypatch):
    """A log file as a run has one, and what is in it. Pytest hears it spelt out: pytest-xdist sends UTF-8 alone."""
    logger, file = logging.getLogger("memtrain"), logging.FileHandler(tmp_path / "run.log", encoding="utf-8")
    level = logger.level
    file.setFormatter(PrintableFormatter())
    for heard in logging.getLogger().handlers:
        monkeypatch.setattr(heard, "formatter", PrintableFormatter())
    monkeypatch.setattr(logger, "handlers", [file])
    logger.setLevel(logging.WARNING)
    yield lambda: (tmp_path / "run.log").read_bytes().decode("utf-8")
    logger.setLevel(level)
    file.close()


def test_each_bad_sample_is_one_line_of_the_log_whatever_its_key(tmp_path, handled):
    write_tar(tmp_path / "x.tar", [part for key in [*EVIL, "good"] for part in sample(key, b"<html>")])
    data = from_shards(str(tmp_path), 16, 1, 0, seed=0, canaries=0, repeats=1, reference=0, duplicates="none")
    data.decode(range(len(EVIL)))
    lines = handled().split("\n")[:-1]
    assert len(lines) == len(EVIL) and all(line.isprintable() for line in lines)
    assert lines[EVIL.index(FORGED)].startswith("bad sample x.tar/a\\n2026-01-01 ERROR")
    assert "x.tar/b\\udcff" in lines[EVIL.index("b\udcff")]


def test_a_traceback_keeps_its_lines(handled):
    try:
        raise ValueError(f"bad {EVIL[6]}")
    except ValueError:
        logging.getLogger("memtrain.data").exception("it broke")
    said = handled()
    assert said.startswith("it broke\nTraceback") and said.endswith("ValueError: bad \\x1b[2Jx\n")


@given(st.text())
def test_what_is_shown_is_printable_and_what_is_printable_stays(text):
    assert printable(text).isprintable() and (printable(text) == text) == text.isprintable()


@given(st.text(alphabet=st.sampled_from("'=+-@\t\rab,\"\n\udcff")))
def test_each_text_has_a_cell_of_its_own_that_is_no_formula(text):
    assert not as_cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert of_cell(as_cell(text)) == as_text(text)
    assert as_cell(-1.5) == -1.5 and of_cell(None) is None


class Trainer:
    """What the callback asks of one."""

    is_global_zero = True

    def __init__(self, datamodule, folder):
        self.datamodule, self.default_root_dir = datamodule, folder


def test_canaries_are_no_formulas_and_are_read_back(tmp_path):
    captions = [text.strip() for text in EVIL if text != "b\udcff"]
    (tmp_path / "shards").mkdir()
    for name in ("=a", "b"):  # a shard's name begins each key of it
        parts = [sample(EVIL[n], encode(textured(n + len(name) * 100)), caption) for n, caption in enumerate(captions)]
        write_tar(tmp_path / "shards" / f"{name}.tar", [member for part in parts for member in part])
    options = dict(seed=0, repeats=2, reference=1)
    data = from_shards(str(tmp_path / "shards"), 64, 1, 0, canaries=2 * len(captions) - 2, **options)
    CanaryList(reference=1).on_train_start(Trainer(data, tmp_path), None)
    with (tmp_path / "canaries.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert len(cells) == 3 * 2 * len(captions)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    known = {as_text(data.samples.key(n)): data.samples.get(n)[1] for n in range(len(data.samples))}
    _, rows = _read_csv(tmp_path / "canaries.csv")
    assert [row["caption"] for row in rows] == [known[row["key"]] for row in rows]
    assert sorted(read_prompts(tmp_path / "canaries.csv").texts) == sorted(known[row["key"]] for row in rows)
    listed = [row["key"] for row in rows if row["key"].startswith("=a.tar/") and row["key"].isprintable()]
    (tmp_path / "gone.txt").write_text("\n".join(listed))
    gone = dict(exclude_keys=str(tmp_path / "gone.txt"))
    left = from_shards(str(tmp_path / "shards"), 64, 1, 0, canaries=0, **options, **gone)
    assert len(listed) > 3 and len(left.samples) == len(data.samples) - len(listed)


def test_what_commands_print_is_printable(tmp_path, capsys):
    write_tar(tmp_path / "x\x1b[2J.tar", [part for key in EVIL for part in sample(key, b"<html>")])
    with pytest.raises(SystemExit):
        shards_command(["check", str(tmp_path), "--workers", "1"])
    with pytest.raises(SystemExit):
        shards_command(["check", str(tmp_path), "--workers", "1", "--json"])
    with pytest.raises(SystemExit) as stop:
        main(["shards", "check", str(tmp_path / "gone\x1b[2J\nERROR.tar")])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1
    assert all(line.isprintable() for line in (out + err).split("\n"))
