"""The Pareto front of a sweep, the choice from it, and their picture and table."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from memtrain.report.pareto import Tried, choose, draw_pareto, front, table, why, write_csv


def tried(*figures, setting="exclusion=fixed exclusion.threshold=2") -> list[Tried]:
    return [
        Tried(f"trial_{n:03d}", setting, "given up" if pair is None else "finished", 8, *(pair or (None, None)))
        for n, pair in enumerate(figures)
    ]


shares = st.sampled_from([0.0, 0.1, 0.5, 0.9])
losses = st.sampled_from([0.05, 0.0505, 0.06, 0.09])
some = st.lists(st.one_of(st.none(), st.tuples(shares, losses)), max_size=8).map(lambda pairs: tried(*pairs))


@given(some)
def test_what_is_not_on_the_front_is_worse_than_something_on_it(trials):
    on_front = front(trials)
    for one in trials:
        if one.memorization is not None and one not in on_front:
            assert any(
                best.memorization <= one.memorization and best.quality <= one.quality and best != one
                for best in on_front
            )
    for one in on_front:
        assert not any(other.memorization < one.memorization and other.quality < one.quality for other in on_front)


@given(some, st.sampled_from([0.0, 0.02, 1.0]))
def test_the_choice_lies_on_the_front_and_within_the_tolerance(trials, tolerance):
    chosen = choose(trials, tolerance)
    if chosen is None:
        assert front(trials) == []
        return
    assert chosen in front(trials)
    assert chosen.quality <= (1 + tolerance) * min(one.quality for one in front(trials)) + 1e-12


def test_the_rule_of_the_choice():
    trials = tried((0.9, 0.0500), (0.2, 0.0508), (0.0, 0.0600), None)
    assert choose(trials, 0.02).name == "trial_001"
    assert choose(trials, 0.0).name == "trial_000"
    assert choose(trials, 0.2).name == "trial_002"
    assert "lowest copy rate (20.0%)" in why(trials, 0.02)
    assert "within 2% of the best (0.0500, trial_000)" in why(trials, 0.02)
    assert "nothing to take" in why(tried(None), 0.02)


def test_table_and_csv_name_the_choice_and_show_settings_as_they_are(tmp_path):
    trials = tried((0.9, 0.05), (0.2, 0.0505), (0.95, 0.06), None, setting="a=[red]b[/red] c=$x$")
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(table(trials, 0.02))
    text = console.export_text()
    assert "a [red]b[/red]" in text and "c $x$" in text and "given up" in text
    assert [line.split()[:2] for line in text.splitlines() if "trial_" in line] == [
        ["front", "trial_000"], ["take", "trial_001"], ["trial_002", "a"], ["trial_003", "a"],
    ]  # fmt: skip
    console.file.close()
    write_csv(tmp_path / "trials.csv", trials, 0.02)
    with (tmp_path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["taken"] for row in rows] == ["False", "True", "False", "False"] and rows[3]["quality"] == ""


def test_the_picture(tmp_path):
    trials = tried((0.9, 0.05), (0.2, 0.0505), (0.95, 0.06), None, setting="a=$x$ b=_{")
    draw_pareto(tmp_path / "pareto.png", trials, 0.02, "copies", "loss")
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.size == (960, 660)
    draw_pareto(tmp_path / "one.png", tried((0.0, 0.05)), 0.02, "copies", "loss")
    with pytest.raises(ValueError, match="no trial has finished"):
        draw_pareto(tmp_path / "none.png", tried(None), 0.02, "copies", "loss")
