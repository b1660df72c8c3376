"""The page says what the run wrote, holds all it needs, and lets no data out of its place."""

import base64
import csv
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from memtrain.callbacks.ledger import Ledger
from memtrain.callbacks.report import Report
from memtrain.cli.main import main
from memtrain.core.exclusion import GROUP_NAMES
from memtrain.data.copies_file import CopyRow, read_copies, write_copies
from memtrain.data.ledger import About, LedgerRows, LedgerWriter, read_ledger
from memtrain.data.paths import LEDGER
from memtrain.report.comparison import differences, table
from memtrain.report.copies import rates_by_group
from memtrain.report.figures import figures_of, plane
from memtrain.report.page import ASSETS, write_report
from memtrain.report.run import Run, read_run
from memtrain.report.verdict import baseline_of, verdict
from tests.conftest import build_data, build_module, fit
from tests.support.corpora import encode, sample, textured, write_tar
from tests.support.forks import PATIENCE

EVIL = '</script><script>alert("caption")</script> & <img src=x onerror=alert(1)> \u2028 \u202e"\' `${1}`'
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
COUNTS = {"train": 150, "canary": 4, "reference": 60}
MEMORIZED = 7  # of the ordinary samples
TIMESTEPS = 1000


class Page(HTMLParser):
    """What a reader's parser makes of it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.scripts, self.styles, self.inside = [], [], [], [], []
        self.feed(text)
        self.close()
        (self.data,) = [json.loads(text) for kind, text in self.scripts if kind == "application/json"]
        self.figures = {figure["id"]: figure for figure in self.data}
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.inside = self.inside[: max(n for n, (name, _) in enumerate(self.inside) if name == tag)]

    def handle_data(self, data):
        tag, attributes = self.inside[-1] if self.inside else ("", {})
        if tag == "script":
            self.scripts.append((attributes.get("type"), data))
        elif tag == "style":
            self.styles.append(data)
        else:
            self.texts.append(data)


def read(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evil")
    members = []
    for number in range(12):
        caption = EVIL if number == 0 else f"caption {number}"
        members += sample(f"{number:09d}", encode(textured(number)), caption)
    write_tar(folder / "00000.tar", members)
    return folder


def key(position: int) -> str:
    return f"00000.tar/{position:09d}"


def write_ledger(run, excludes: bool, with_reference: bool, fixed: bool) -> None:
    """Steps of 24 rows; memorized samples score 1.8 times as much at high noise."""
    rng = np.random.default_rng(5)
    (run / LEDGER).mkdir()
    writer = LedgerWriter(run / LEDGER, 0, key, About(TIMESTEPS, 1.0))
    ends = np.cumsum(list(COUNTS.values()))
    for step in range(250):
        index = rng.integers(0, ends[-1] if with_reference else ends[1], 24)
        index[:4] = rng.integers(ends[0], ends[1], 4)
        group = np.array([GROUP_NAMES.index(name) for name in COUNTS])
        group = group[np.searchsorted(ends, index, side="right")]
        timestep = rng.integers(0, TIMESTEPS, 24)
        memorized = (index < MEMORIZED) | (group == GROUP_NAMES.index("canary"))
        score = np.exp(rng.normal(0, 0.15, 24)) * np.where(memorized & (timestep >= 700), 1.8, 1)
        threshold = np.full(24, 1.5 if fixed else 0.6)
        kept = score < 1.5 if fixed else ~(memorized & excludes & (rng.random(24) < 0.75))
        scored = rng.random(24) < 0.9
        writer.add(
            LedgerRows(
                np.full(24, step), index, index, group.astype(np.int8), timestep.astype(np.int16),
                score.astype(np.float32), scored, np.full(24, 0.1, np.float32),
                threshold.astype(np.float32), kept, np.zeros(24, np.float32),
            )
        )  # fmt: skip
    writer.close_part()


def make_run(folder, shards="gone", rule="Evidence", copies=0.25, heldout=0.059, finished=True, **ledger_options):
    folder.mkdir(parents=True)
    config = {
        "run_dir": str(folder), "exclusion": {"_target_": f"memtrain.core.exclusion.{rule}"}, "seed": 0,
        "data": {"_target_": "memtrain.data.datamodule.from_shards", "shards": str(shards), "resolution": 64,
                 "caption": "txt", "note": EVIL},
        "trainer": {"max_steps": 20},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    rows = [
        {"step": 0, "heldout_loss": 0.05, "val_score_high_noise/canary": 1.0},
        {"step": 10, "score_high_noise/canary": 1.5, "score_high_noise/train": "nan", "excluded/canary": 0.3},
        {"step": 20, "score_high_noise/canary": 1.7, "score_high_noise/train": 1.1, "heldout_loss": heldout,
         "copy_rate/canary": copies, "copy_rate/reference": 0.0, "threshold_by_timestep/t000": 2,
         "threshold_by_timestep/t900": 1},
    ]  # fmt: skip
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    if finished:
        score = {"canary": {"excluded_fraction": 0.4}, "train": {"excluded_fraction": 0.001}}
        summary = {"score": score, "samples_per_second": 40, "memorized_at": {key(150): 10, key(151): None}}
        (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "canaries.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("key", "caption", "group"), (key(150), EVIL, "canary")])
    defaults = dict(excludes=rule != "KeepAll", with_reference=True, fixed=False)
    write_ledger(folder, **(defaults | ledger_options))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards):
    return make_run(tmp_path_factory.mktemp("runs") / "demo" / "<b>one", shards)


@pytest.fixture(scope="module")
def page(run):
    write_report([run], run / "report.html")
    return read(run / "report.html")


def test_nothing_is_fetched_and_only_our_script_may_run(page):
    fetching = {"link", "iframe", "object", "embed", "base", "form"}
    assert not fetching & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert attributes.get("src", "data:").startswith("data:")
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
        assert attributes.get("href", "#").startswith("#")
    (policy,) = [of["content"] for _, of in page.tags if of.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    (script,) = [text for kind, text in page.scripts if kind is None]
    assert "uPlot" in script
    for text in (script, *page.styles):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_data_stays_data(run, page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.scripts) == 2 and "<b>one" not in text and "</script><script>alert" not in text
    assert not any(attributes.get("src") == "x" for _, attributes in page.tags)
    assert EVIL in page.texts  # the caption, from the shards
    assert page.texts.count(EVIL) >= 3  # of the sample, of the canary, and the setting
    (data,) = [text for kind, text in page.scripts if kind == "application/json"]
    assert not set(data) & set("<>&'\u2028") and data.isascii()


def test_the_figures_hold_the_curves(run, page):
    drawn = [attributes["data-figure"] for tag, attributes in page.tags if tag == "figure"]
    assert sorted(drawn) == sorted(page.figures) and len(drawn) == len(set(drawn))
    curves = {series["name"]: series for series in page.figures["score-high-noise"]["series"]}
    assert (curves["canaries"]["x"], curves["canaries"]["y"]) == ([10, 20], [1.5, 1.7])
    assert curves["training samples"]["y"] == [None, 1.1]  # a gap, not NaN
    (loss,) = page.figures["heldout-loss"]["series"]
    assert (loss["x"], loss["y"]) == ([0, 20], [0.05, 0.059])
    assert [series["name"] for series in page.figures["threshold-by-timestep"]["series"]] == ["t000", "t900"]
    assert all(figure["series"] for figure in page.data)
    scatter = {series["name"]: series for series in page.figures["scatter-0"]["series"]}
    points, median = scatter["canaries"], scatter["canaries, median"]
    reference = scatter["99 % of the reference lies below"]
    assert len(points["x"]) == len(points["y"]) > 800 and points["x"] == sorted(points["x"])
    assert len(median["y"]) == 10 and median["y"][9] > reference["y"][9] > median["y"][3]
    assert "threshold, median" not in scatter and "threshold is not held against a single score" in page.text


def test_the_most_memorized_come_first_with_picture_and_caption(page):
    text = page.text
    start, excluded = text.index("Most memorized pictures"), text.index("Excluded most often")
    shown = re.findall(r"00000\.tar/\d{9}", text[start:excluded])
    assert set(map(key, [*range(MEMORIZED), 150, 151, 152, 153])) == set(shown[: MEMORIZED + 4])
    assert text[start:excluded].count("stands out") >= MEMORIZED + 4
    assert "copied since step 10" in text
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) >= 12 and all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)
    often = re.findall(r"00000\.tar/\d{9}", text[excluded : text.index("Settings", excluded)])
    assert set(often) == set(map(key, [*range(MEMORIZED), 150, 151, 152, 153]))
    assert re.search(r"\d+ of \d+ pictures could not be read from the shards", text)  # the corpus here has 12


def test_the_verdict_names_what_was_planted(run):
    sentences = [sentence.text for sentence in verdict(read_run(run), None)]
    says = r"(\d+) of 1\d\d ordinary training pictures look .* about 2, so some are\."
    found = re.fullmatch(says, sentences[0])
    assert found and MEMORIZED <= int(found[1]) <= 3 * MEMORIZED, sentences[0]
    assert sentences[1] == "4 of 4 canaries look memorized by their score."
    assert sentences[2].startswith("25.0% of the generations from canaries' captions copy the training ")
    assert sentences[3].startswith("1 of 2 canaries came to be copied") and "by step 10" in sentences[3]
    assert sentences[4].startswith("Evidence excluded 40.0% of the canaries' visits, 0.1% of the other")
    assert sentences[5] == "Held-out loss 0.0590, 18.0% higher than at the run's start (0.0500)."


def test_a_threshold_on_the_score_is_drawn(tmp_path):
    folder = make_run(tmp_path / "fixed", rule="FixedThreshold", fixed=True)
    write_report([folder], tmp_path / "page.html")
    (scatter,) = [figure for figure in read(tmp_path / "page.html").data if figure["scatter"]]
    scatter = {series["name"]: series for series in scatter["series"]}
    assert scatter["threshold, median"]["y"] == [1.5] * 10


def test_runs_are_compared_with_the_unprotected_one(tmp_path):
    unprotected = make_run(tmp_path / "a" / "none", rule="KeepAll", copies=0.8, heldout=0.0595)
    folders = [make_run(tmp_path / "a" / "evidence"), unprotected]
    write_report(folders, tmp_path / "page.html")
    runs = [read_run(folder) for folder in folders]
    assert baseline_of(runs) is runs[1] and baseline_of(runs[:1]) is None
    headings, rows = table(runs, runs[1])
    cells = dict(zip(headings, rows[0], strict=True))
    assert cells["copy rate, canaries"] == "25.0%" and cells["against a/none"] == "-0.8%"
    assert [(s.name, s.x, s.y) for s in plane(runs).series] == [
        ("a/evidence", [0.059], [0.25]), ("a/none", [0.0595], [0.8]),
    ]  # fmt: skip
    assert [row[0] for row in differences(runs)] == ["exclusion._target_"]
    page = read(tmp_path / "page.html")
    assert {"plane", "heldout-loss", "scatter-0", "scatter-1"} <= set(page.figures)
    assert "against 80.0% in a/none" in page.text and "0.8% lower than in a/none (0.0595)" in page.text
    assert page.text.count("Nothing was excluded (exclusion=none)") == 1


def test_what_is_missing_is_said(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("trainer: {max_steps: 9}\nexclusion: {_target_: a.Rule}\n")
    write_report([bare], bare / "report.html")
    text = read(bare / "report.html").text
    for said in ("No curves", "No ledger", "at step 0 of 9, still going on", "there is no ledger"):
        assert said in text
    gone = make_run(tmp_path / "gone", with_reference=False, finished=False)
    write_report([gone], gone / "report.html")
    page = read(gone / "report.html")
    assert "the shards cannot be opened any more" in page.text and "No reference set was scored" in page.text
    assert "stands out" not in page.text and "is not known" in page.text
    assert EVIL in page.texts  # the canary's caption is in canaries.csv
    (gone / "config.yaml").write_text("- [no settings")
    write_report([gone], gone / "report.html")
    assert "No settings" in read(gone / "report.html").text


def test_copies_are_told_with_interval_cut_and_dose(tmp_path):
    """Looks in the middle are drawn as they are judged by the cut that was known at the end."""
    runs = [make_run(tmp_path / name, rule=rule, shards="gone") for name, rule in (("a", "KeepAll"), ("b", "Evidence"))]
    rows = [
        CopyRow("canary", canary, "near", repeats, key(150), EVIL, g, 0.2, 0.1, key(3), repeats > 5)
        for canary, repeats in enumerate((1, 1, 400, 400))
        for g in range(2)
    ]
    rows.append(CopyRow("reference", None, "", 0, key(9), "=1+1", 0, 0.9, 0.4, key(3), False))
    for run in runs:
        write_copies(run / "copies.csv", rows)
        assert read_copies(run / "copies.csv") == rows and ",'=1+1," in (run / "copies.csv").read_text()
        summary = json.loads((run / "summary.json").read_text())
        found = {
            "cut": 0.3, "cut_is": "where none counts", "training_pictures": {"searched": 7, "all": 9},
            "own": {"canary": vars(rates_by_group(rows)["canary"])},
            "nearest": {group: vars(rate) for group, rate in rates_by_group(rows, 0.3).items()},
            "looks": {"copy_rate/canary": [[10, 20], [0.125, 0.5]]},
        }  # fmt: skip
        (run / "summary.json").write_text(json.dumps(summary | {"copies": found}))
    first = read_run(runs[0])
    assert first.curves["copy_rate/canary"] == ([10, 20], [0.125, 0.5])
    said = " ".join(sentence.text for sentence in verdict(first, None))
    assert "50.0% (95 % over canaries: 0.0% to 100.0%) of the generations" in said
    assert "; 100.0% of them and 0.0% of those from captions that were never trained on copy some" in said
    assert "A copy lies within an RMSE of 0.3: where none counts" in said and "7 of the 9 training pictures" in said
    assert "all canaries: half copied at 20 repeats" in said
    write_report(runs, tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert "Copies by repeats" in page.text and "50.0% (0 to 100)" in page.text
    (runs[0] / "copies.csv").write_text("group,canary\ncanary,x\n")
    assert "is no copies.csv" in read_run(runs[0]).remarks[-1]


def test_figures_without_data_are_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,heldout_loss\n1,\n")
    assert figures_of([read_run(tmp_path)]) == []


def test_a_training_run_ends_with_its_page(pipeline_folder, corpus, tmp_path, capsys):
    ledger, report = Ledger(sample=1.0, seed=7), Report()
    fit(build_module(pipeline_folder), build_data(corpus), tmp_path, 4, callbacks=[ledger, report])
    page = read(tmp_path / "report.html")
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert "scatter-0" in page.figures and "No settings" in page.text
    assert not list(tmp_path.glob(".report*"))


def test_the_command(run, tmp_path, capsys):
    main(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert read(tmp_path / "page.html").figures
    for arguments, says in (
        ([str(tmp_path)], "is no run"),
        ([str(run), "--out", str(tmp_path / "no" / "page.html")], "there is no folder"),
        ([], "RUN.*--help says more"),
    ):
        with pytest.raises(SystemExit):
            main(["report", *arguments])
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert re.search(says, line)


def test_repeated_samples_are_said_to_be(run, tmp_path):
    keys = read_ledger(run).to_table(columns=["key"])["key"].unique().to_pylist()
    pq.write_table(pa.table({"group": [7] * len(keys), "key": keys}), tmp_path / "groups.parquet")
    main(["report", str(run), "--out", str(tmp_path / "page.html"), "--duplicates", str(tmp_path / "groups.parquet")])
    assert f"{len(keys)} times in the corpus" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_is_vendored_is_what_is_said():
    rows = re.findall(r"\| `([^`]+)` \| `[^`]+` \| `([0-9a-f]{64})` \|", (ASSETS / "VENDORED.md").read_text())
    assert len(rows) == 3
    for name, sha256 in rows:
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == sha256


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.slow
def test_a_browser_draws_every_figure(run, page, tmp_path):
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--dump-dom"]
    url = (run / "report.html").as_uri()
    done = subprocess.run([CHROMIUM, *options, url], capture_output=True, text=True, timeout=PATIENCE)
    assert "CONSOLE" not in done.stderr, done.stderr  # no error, nothing refused
    dom = done.stdout
    assert dom.count("<canvas") == len(page.data) and dom.count("u-legend") >= len(page.data)
    assert "&lt;/script&gt;&lt;script&gt;alert" in dom and "<script>alert" not in dom
    sides = [int(side) for side in re.findall(r'<canvas width="(\d+)"', dom)]
    assert math.prod(sides) > 0


def test_rules_are_named_as_they_are_chosen():
    folder = Path(__file__).parents[2] / "conf" / "exclusion"
    chosen = {path.stem: OmegaConf.load(path).get("_target_") for path in folder.glob("*.yaml")}
    assert chosen.pop("evidence_by_magnitude") is None  # evidence with settings of its own
    assert len(set(chosen.values())) == len(chosen) > 5
    for name, target in chosen.items():
        assert a_run(target).rule == name
    assert a_run("mine.LowLoss").rule == "LowLoss" and a_run("mine.Quantile").rule == "Quantile"


def a_run(target: str) -> Run:
    return Run(Path("run"), "run", {"exclusion": {"_target_": target}}, {}, {}, {}, None)
