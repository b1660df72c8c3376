"""The space of a study: its parameters, conditions and choices, spelt for the command line."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from memtrain.sweep.space import Parameter, check_space, merged, spell, suggest
from tests.support.searches import search


def test_conditions_and_keys_that_are_fixed(tmp_path):
    space = [
        Parameter("rule", "exclusion", choices=["none", "fixed"]),
        Parameter("fixed", "exclusion.threshold", low=1.0, high=4.0, log=True, when="rule=fixed"),
    ]
    for rule, keys in (("none", set()), ("fixed", {"exclusion.threshold"})):
        one = search(tmp_path / rule, f"exclusion={rule}", space=space)
        trial = one.study.ask()
        assert {override.split("=")[0] for override in suggest(trial, space, one.plan.fixed)} == keys
    assert merged(["a=1", "b=2"], ["+a=3"]) == ["+a=3", "b=2"]


@pytest.mark.parametrize(
    ("parameter", "says"),
    [
        (dict(low=1.0), "study.space.p needs choices, or low and high"),
        (dict(choices=[]), r"study.space.p.choices must name at least one value, got \[\]"),
        (dict(low=2.0, high=1.0), "study.space.p: low must be < high, got 2 and 1"),
        (dict(low="a", high="b"), "study.space.p: low and high must be numbers, got a and b"),
        (dict(low=0.0, high=1.0, log=True), "study.space.p.low must be > 0 with log=true, got 0"),
    ],
)
def test_a_wrong_space_is_named(parameter, says):
    with pytest.raises(ValueError, match=says):
        Parameter("p", "k", **parameter)


def test_a_condition_that_never_holds_is_named():
    rule = Parameter("rule", "exclusion", choices=["none", "fixed"])
    check_space([rule, Parameter("t", "k", low=1, high=2, when="rule=fixed")])
    for when in ("rule", "role=fixed", "rule=fixd"):
        with pytest.raises(ValueError, match=r"study\.space\.t\.when"):
            check_space([rule, Parameter("t", "k", low=1, high=2, when=when)])


def test_choices_are_what_the_command_line_would_give():
    choices = [1e-5, 0.123456, True, None, [500, 1000], [[0.9, 0.99], ["a", None]], "'a, b'", 3]
    read = [OverridesParser.create().parse_override(f"k={spell(choice)}").value() for choice in choices]
    assert read == [*choices[:-2], "a, b", 3]
