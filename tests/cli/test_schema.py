"""A config key has one home, the file in conf/ where its value stands; its type is that of what takes it."""

import inspect
import re
from functools import reduce

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ValidationError

from memtrain.cli import schema
from memtrain.cli.choices import about
from memtrain.cli.signatures import parameters
from tests.support.conf import CONF, FILES, load, ours, sections

# fsdp's hands all that it is given on to Lightning's Trainer
SECTIONS = [found for found in sections() if ours(found[1]) and found[0] != "fsdp"]
ASKED = {file: schema._ASKS.findall(file.read_text()) for file in FILES}
# What a command of that name takes in Python, too. Values of all keys of conf/ that it shares are the same.
IN_PYTHON = [
    ("detect", "memtrain.audit.detect.detection.detect"),
    ("detect", "memtrain.audit.detect.scoring.DetectionSettings"),
    ("explain", "memtrain.audit.explain.explanation.explain"),
    ("explain", "memtrain.audit.explain.explanation.check_words"),
    ("mitigate", "memtrain.audit.mitigate.mitigation.mitigate"),
    ("mitigate", "memtrain.audit.mitigate.mitigation.Sampling"),
    ("mitigate", "memtrain.audit.mitigate.comparison.Judges"),
    ("mitigate", "memtrain.audit.mitigate.comparison.Comparison"),
    ("repair", "memtrain.audit.repair.work.Steps"),
    ("repair", "memtrain.audit.repair.repairing.Criterion"),
    ("repair", "memtrain.audit.repair.material.Drawing"),
    ("evaluate", "memtrain.audit.evaluate.similarity.LatentRmse"),
    ("evaluate", "memtrain.audit.evaluate.similarity.Sscd"),
    ("data/shards", "memtrain.data.datamodule.DataModule"),
    ("data/shards", "memtrain.data.samples.ShardSamples"),
]
# `out` is a folder on the command line and nothing in Python; `method` is a name there, and a mitigation here; `lr`
# null is that of a LoRA or of all weights
DIFFERENT = {("detect", "out"), ("mitigate", "method"), ("repair", "lr")}


@pytest.fixture(scope="module", autouse=True)
def hydra():
    schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.mark.parametrize(("name", "target", "values"), SECTIONS, ids=[name for name, *_ in SECTIONS])
def test_every_key_is_a_parameter_and_says_the_same_default(name, target, values):
    assert values.keys() <= parameters(target).keys()
    assert differing(target, values) == {}


@pytest.mark.parametrize(("name", "target"), IN_PYTHON)
def test_a_command_and_its_function_have_the_same_defaults(name, target):
    values = load(CONF / f"{name}.yaml")
    assert values.keys() & inspect.signature(get_object(target)).parameters.keys()
    given = {key: value for key, value in values.items() if (name, key) not in DIFFERENT}
    assert differing(target, given) == {}


def differing(target: str, values: dict) -> dict:
    """Parameters whose default is another than the value in a config."""
    own = inspect.signature(get_object(target)).parameters
    both = {key: (own[key].default, value) for key, value in values.items() if key in own}
    return {
        key: (default, value)
        for key, (default, value) in both.items()
        if default is not inspect.Parameter.empty and plain(default) != plain(value)
    }


def plain(value):
    return list(value) if isinstance(value, tuple | range) else value


def test_each_file_asks_for_its_own_types():
    asked = [name for names in ASKED.values() for name in names]
    assert len(asked) == len(set(asked)) > 25
    for file, names in ASKED.items():
        group = file.relative_to(CONF).parts[0]
        assert all(name.split("/")[0] == group.removesuffix(".yaml") for name in names), file


def typed(config: DictConfig) -> bool:
    return isinstance(config._metadata.object_type, type) and config._metadata.object_type is not dict


def test_every_choice_whose_class_takes_anything_is_typed():
    """But loggers, of which several are chosen at once."""
    for file in FILES:
        group, target = file.parent.name, load(file).get("_target_", "")
        if file.parent != CONF and ours(target) and parameters(target):
            alone = group != "exclusion"  # a rule may bring its score, which only a whole config has
            config = compose(f"{group}/{file.stem}") if alone else compose("train", [f"{group}={file.stem}"])
            assert typed(config[group]), file


@pytest.mark.parametrize("name", [file.stem for file in CONF.glob("*.yaml")])
def test_every_command_is_typed_and_holds_its_own_defaults(name):
    written = load(CONF / f"{name}.yaml")
    keys = [key for key in written if key not in ("defaults", "hydra")]
    composed = compose(name)
    assert typed(composed)
    assert {key: OmegaConf.to_container(composed)[key] for key in keys} == {key: written[key] for key in keys}


def test_every_statement_of_a_type_is_about_a_key():
    stated = schema.TYPES.keys() | schema.TAKEN_BY.keys() | schema.OPTIONAL
    files = {names[0].replace("/", "."): load(file) for file, names in ASKED.items() if names}
    for path in stated:
        name = next(name for name in files if path.startswith(f"{name}."))
        *above, key = path.removeprefix(f"{name}.").split(".")
        assert key in reduce(dict.get, above, files[name]), path


def test_a_key_that_its_class_does_not_take_is_named():
    section = {"_target_": "memtrain.core.exclusion.FixedThreshold", "treshold": 2.0}
    with pytest.raises(
        LookupError, match=r"exclusion\.mine\.treshold: .*FixedThreshold has no such parameter.*threshold"
    ):
        schema.node("exclusion.mine", section)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (True, "perhaps"),
        (3, "many"),
        (3, 3.5),
        (0.5, "half"),
        ("text", ["a"]),
        ([1, 2], ["a"]),
        ([0.5], 0.5),
        (3, None),
    ],
)
def test_a_key_has_the_type_of_its_value(value, wrong):
    config = OmegaConf.structured(schema.node("mine", {"key": value, "nothing": None}))
    config.key = value
    config.nothing = "text"
    config.nothing = None
    with pytest.raises(ValidationError):
        config.key = wrong
    with pytest.raises(ConfigAttributeError):
        config.kye = value


@pytest.mark.parametrize("file", [file for file in FILES if file.parent != CONF], ids=lambda file: file.stem)
def test_the_comment_at_the_top_of_a_choice_says_what_it_does(file):
    assert re.fullmatch(r"[\w`].*[\w)`?]", about(file)) and len(about(file).split()) > 1
