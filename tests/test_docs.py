"""The pages say what is true: commands compose, keys, files, links and pictures exist, the README is short.

A command that is not to be tried stands in a block behind a line `<!-- not composed -->`.
"""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from memtrain.cli import schema, shards
from memtrain.cli.arguments import spelled
from memtrain.cli.main import COMMANDS, _with_hydra, config_folder
from memtrain.report.table import marks_of
from tests.support.observe import observe
from tests.test_rooms import BELOW

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(REPO.glob("docs/**/*.md"))
CONF = config_folder()
WITH_HYDRA = [command for command, run in COMMANDS.items() if run is _with_hydra]
FENCE = re.compile(r"^(?P<mark><!-- not composed -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
OVERRIDE = re.compile(r"\+?([a-z_][\w./@-]*)=(.*)", re.S)
OURS = re.compile(r"(conf|memtrain|launch|tests|docs|\.ci)/[\w./-]*")


def name_of(page: Path) -> str:
    return str(page.relative_to(REPO))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, kind: str) -> list[str]:
    return [found["text"] for found in FENCE.finditer(read(page)) if found["kind"] == kind and not found["mark"]]


def spans(page: Path) -> list[str]:
    """What stands `so` in the text."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", read(page)))


def words(command: str) -> list[str]:
    """A shell's words, without comments and `…`, which stands for any value elsewhere; none where it is no shell."""
    try:
        return [word.replace("…", "any") for word in shlex.split(command, comments=True) if word != "…"]
    except ValueError:
        return []


def commands(page: Path) -> list[tuple[str, ...]]:
    """All `memtrain COMMAND …` of a page, and what launch/ hands to `memtrain train`."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for said in (words(line) for line in [*lines, *spans(page)]):
        while said and re.fullmatch(r"[A-Z_]+=.*", said[0]):  # VARIABLE=value before a command
            said = said[1:]
        said = said[: said.index("|")] if "|" in said else said
        if said[:1] == ["memtrain"] and len(said) > 1:
            found.append(tuple(said[1:]))
        elif said[:1] == ["-m"] and len(said) > 1 and "=" in said[1]:  # a part of `memtrain train -m …`
            found.append(("train", *said))
        elif said[:1] == ["bash"] and re.search(r"launch/(quickstart|local|torchrun_node)\.sh$", said[1]):
            found.append(("train", "experiment=demo", *said[2:]))
    return [command for command in found if not command[0].startswith("-")]


EVERY_COMMAND = sorted({command for page in PAGES for command in commands(page)})


@pytest.fixture(scope="module")
def hydra():
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def first_of_each(overrides: list[str]) -> list[str]:
    """Those of -m, the first value of each."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [
        f"{one.get_key_element()}={next(iter(one.sweep_string_iterator()))}" if one.is_sweep_override() else text
        for one, text in zip(parsed, overrides, strict=True)
    ]


class Understood(Exception):
    """The parser has taken all arguments."""


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=" ".join)
def test_a_command_composes(hydra, monkeypatch, command):
    name, *arguments = command
    assert name in COMMANDS
    if command[:2] in (("bench", "mitigation"), ("bench", "repair")):
        name, *arguments = f"bench_{command[1]}", *command[2:]
    if name in (*WITH_HYDRA, "bench_mitigation", "bench_repair"):
        flags = {"-m", "--multirun", "--help", "--cfg", "job", "--config-dir", "DIR", "study=mine", "protocol=mine"}
        overrides = spelled(name, [argument for argument in arguments if argument not in flags])
        composed = compose(name, first_of_each(overrides))
        if name in ("sweep", "bench_mitigation"):  # what it says of every trial is for `train`
            compose("train", list(composed.overrides))
    elif len(arguments) < 2:  # named, not used
        with pytest.raises(SystemExit, match="0"):
            getattr(importlib.import_module(f"memtrain.cli.{name}"), name)([*arguments, "--help"])
    else:
        parse = argparse.ArgumentParser.parse_args

        def parse_alone(parser, argv):
            parse(parser, argv)
            raise Understood

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
        with pytest.raises(Understood):
            getattr(importlib.import_module(f"memtrain.cli.{name}"), name)(arguments)


def test_there_are_commands_of_every_kind():
    """Else the test above tests nothing."""
    assert {command[0] for command in EVERY_COMMAND} >= COMMANDS.keys() and len(EVERY_COMMAND) > 40


# ---- keys


def leaves(config: DictConfig, above: str = "") -> set[str]:
    """Keys, and keys of keys."""
    found = set()
    for key in config:
        name = f"{above}{key}"
        inner = OmegaConf.to_container(config)[key]
        found |= {name} | (leaves(OmegaConf.create(inner), f"{name}.") if isinstance(inner, dict) else set())
    return found


@cache
def known_keys() -> frozenset[str]:
    """Of all files of conf/, as the commands spell them, and options of `memtrain shards`, said as keys."""
    found = {f"prompts.{name}" for name in ("column", "label", "group")} | {"model", "models", "embedding"}
    for path in CONF.glob("**/*.yaml"):
        group = ".".join(path.parent.relative_to(CONF).parts)
        is_global = "# @package _global_" in read(path)
        found |= leaves(OmegaConf.load(path), "" if is_global or not group else f"{group}.")
    (tasks,) = (action.choices for action in shards.parser()._actions if isinstance(action.choices, dict))
    for task in tasks.values():
        found |= {option.removeprefix("--") for option in task._option_string_actions}
    return frozenset(found)


FREE = ("hydra.launcher.", "exclusion._target_", "protocol.rows.")  # keys below these are the user's


def unknown(said: str) -> list[str]:
    """The keys of `key=value …` that nothing has, and choices that there are not; [] where `said` is something else."""
    matches = [OVERRIDE.fullmatch(word) for word in words(said)]
    if not matches or not all(matches):
        return []
    wrong = []
    for key, value in (match.groups() for match in matches):
        group = CONF / key
        if group.is_dir() and not value.isupper():  # PATH is a path
            passed = ("", "any", "joblib", "submitit_local", "basic")  # these launchers are Hydra's own
            choices = [choice.strip() for choice in value.strip("[]").split(",")]
            wrong += [f"{key}={c}" for c in choices if c not in passed and not (group / f"{c}.yaml").exists()]
        elif key not in known_keys() and not key.startswith(FREE):
            wrong.append(key)
    return wrong


# methods of `memtrain mitigate`, which has a key of the name that is a group of `memtrain train`
MITIGATIONS = {f"method={name}" for name in ("all", *OmegaConf.load(CONF / "mitigate.yaml").method) if name != "names"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_exist(page):
    wrong = [part for said in spans(page) if not said.startswith("memtrain ") for part in unknown(said)]
    assert [part for part in wrong if part not in MITIGATIONS] == []


def test_a_key_that_does_not_exist_is_found():
    assert unknown("exclusion.treshold=3 exclusion=fixd score.every=2") == ["exclusion.treshold", "exclusion=fixd"]
    assert unknown("logger=[csv,wandb] exclusion.threshold=.inf") == unknown("a = b") == []


# ---- files and links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_exist(page):
    named = [found[0] for said in spans(page) for word in words(said) if (found := OURS.fullmatch(word))]
    named += re.findall(r"\bbash (launch/[\w./-]+)", read(page))
    assert [path for path in named if not (REPO / path).exists()] == []
    modules = re.findall(r"python -m (memtrain[\w.]+)", read(page))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_names_what_is_not_in_the_repository(page):
    """Pages and programs, by their names alone."""
    theirs = {"table.md", "train_text_to_image.py"}  # what a command writes, what diffusers has
    named = set(re.findall(r"(?<![\w/.-])[\w-]+\.(?:md|py|sh|sbatch)\b", " ".join(spans(page))))
    ours = {path.name for folder in ("docs", "launch", "memtrain", "tests") for path in (REPO / folder).rglob("*.*")}
    assert named - theirs - ours - {path.name for path in REPO.glob("*.*")} == set()


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_picture_is_shown():
    shown = " ".join(map(read, PAGES))
    assert [path.name for path in REPO.glob("docs/pictures/*") if f"pictures/{path.name})" not in shown] == []


def test_files_of_the_drawings_exist():
    page = read(REPO / "docs/architecture.md")
    named = set(re.findall(r"\b(\w+(?:/\w+)+\.py)", page))
    assert [path for path in named if not (REPO / "memtrain" / path).exists() and not (REPO / path).exists()] == []
    assert len(named) > 25


# ---- what the pages say


def rows(page: str, begin: str, end: str) -> list[list[str]]:
    table = page.split(begin, 1)[1].split(end, 1)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_readme_is_read_in_four_minutes():
    text = [line for line in read(REPO / "README.md").splitlines() if not line.startswith(("|", "<!--"))]
    assert len(" ".join(text).split()) <= 900


def test_the_readmes_table_is_a_part_of_the_results():
    headline = rows(read(REPO / "README.md"), "<!-- headline: begin -->", "<!-- headline: end -->")
    results = rows(read(REPO / "docs/results.md"), *marks_of("mitigation"))
    places = [results[0].index(column) for column in headline[0]]
    assert len(headline) > 3
    assert all(row in [[one[place] for place in places] for one in results[2:]] for row in headline[2:])


def test_the_results_have_a_place_for_each_table():
    page = read(REPO / "docs/results.md")
    names = ("mitigation", "seeds", "flow", "flow-separation", "flow-separation-over-loss")
    assert all(page.count(mark) == 1 for name in names for mark in marks_of(name))
    assert "--into docs/results.md" in read(REPO / "launch" / "flow_table.sh")


def test_the_table_of_rooms_is_that_of_the_tests():
    page = read(REPO / "docs/architecture.md").split("## Names")[0]
    said = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", page, re.M))
    assert said.pop("cli") == "all" and said.pop("core").startswith("torch and the standard library")
    assert {room: set(below.split(", ")) for room, below in said.items()} == {r: b for r, b in BELOW.items() if b}


@pytest.mark.parametrize("folder", ["exclusion", "method"])
def test_every_rule_and_method_is_described(folder):
    page = read(REPO / "docs/method.md")
    assert [path.stem for path in (CONF / folder).glob("*.yaml") if f"`{path.stem}`" not in page] == []


def test_the_rule_of_ones_own_decides():
    (block,) = blocks(REPO / "docs/guides/choosing_a_rule.md", "python")
    space: dict = {}
    exec(block, space)
    decision = space["LowLoss"]().decide(observe([1.0, 1.0], loss=torch.tensor([0.005, 0.02])))
    assert decision.keep_mask.tolist() == [False, True]


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert "LikelihoodEvidence" in read(tmp_path / "site/api/core.html") and len(pages) > 15
    fetched = re.compile(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?https?:')
    assert [page.name for page in pages if fetched.search(read(page))] == []
