"""What is typed without a thought of Hydra's grammar means what it says."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from memtrain.cli.arguments import spelled
from memtrain.sweep.space import quoted

TYPED = [
    "data.shards=/data/{00000..00041}.tar",
    "data.shards=https://host/{00000..00041}.tar?part=1&of=2",
    "data.shards=pipe:aws s3 cp s3://corpus/{00000..00041}.tar -",
    "data.shards=/data/ours (new)/00000.tar",
    "data.where=a < 1 and b > 2",
    "data.where=nsfw == 'UNLIKELY' or nsfw in ('a', \"b\")",
    "++data.where=not (width < 512)",
]
MEANT = [  # lists, mappings, choices, interpolations, quoted text, groups: as Hydra has them
    "data.shards=[/a,/b]",
    "data.shards='/data/{0..3}.tar'",
    "data.where='a < 1'",
    "exclusion=none,fixed",
    "seed=range(1,4)",
    "data.where=null",
    "runs_dir=${oc.env:HOME}/runs",
    "callbacks.copies={every: 3}",
    "~callbacks.report",
    "optimizer.lr=1e-5",
    "name=",
]
TEXTS = [
    *("a b", " a ", "a,b", "a, (b) [c]", "[x]", "{a: b}", "/d/{0..3}.tar", "a=b", "a < 1", "null", "", "#a", "~", "%"),
    *("it's", "'a'", 'say "hi"', "\\", "\\'", "ends\\", "\\\\", "a\\nb", "$HOME", "ü 狐", "\t"),
]
BROKEN = ["data.shards=[/a", "data.where='a < 1", "trainer={a:1", "runs_dir=${oc.env:HOME", "da ta(=a < 1"]


@pytest.mark.parametrize("command", ["train", "cache", "evaluate", "mitigate"])
@pytest.mark.parametrize("typed", TYPED)
def test_what_hydras_grammar_refuses_is_text(command, typed):
    (argument,) = spelled(command, [typed])
    override = OverridesParser.create().parse_override(argument)
    key, _, value = typed.partition("=")
    assert argument.startswith(f"{key}=")
    assert isinstance(override._value, QuotedString) and override.value() == value


@pytest.mark.parametrize("typed", TYPED)
def test_a_sweep_hands_it_on_to_trials_that_quote_it(typed):
    (argument,) = spelled("sweep", [typed])
    assert OverridesParser.create().parse_override(argument).value() == [typed]


@pytest.mark.parametrize("typed", [*MEANT, *BROKEN, "--config-dir=a < b"])
def test_what_means_something_to_hydra_stays(typed):
    """So does what was meant to and is wrong: Hydra says what."""
    assert spelled("train", [typed]) == [typed]


@pytest.mark.parametrize("text", TEXTS)
def test_quoted_text_is_that_text(text):
    """Alone and in a list; it stays as it is where a person copies it to another command line."""
    argument = f"name={quoted(text)}"
    assert spelled("train", [argument]) == [argument]
    assert OverridesParser.create().parse_override(argument).value() == text
    several = f"overrides=[{quoted(argument)},{quoted(text)}]"
    assert OverridesParser.create().parse_override(several).value() == [argument, text]


def test_braces_and_conditions_reach_the_config(capsys):
    from memtrain.cli.main import main

    main(["train", "--cfg", "job", "data.shards=/d/{00000..00041}.tar", "data.where=a < 1 and b > 2"])
    said = capsys.readouterr().out
    assert "shards: /d/{00000..00041}.tar" in said and "where: a < 1 and b > 2" in said
