"""launch/wandb_sweep.yaml, which W&B's agent reads."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from memtrain.callbacks.logging import dashboard_name
from memtrain.cli import schema
from memtrain.cli.main import config_folder
from tests.support.forks import ROOT

WANDB = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())


def test_wandbs_sweep_file_fits_its_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(Path(__file__).with_name("wandb_sweep_schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(WANDB)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(WANDB | {"methd": "random"})


def test_what_wandbs_agent_starts_composes():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    assert WANDB["metric"]["name"] == dashboard_name("copy_rate/canary")
    drawn = {k: {"value": p.get("min", (p.get("values") or [0])[0])} for k, p in WANDB["parameters"].items()}
    arguments = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    command = [part for part in WANDB["command"] if not re.match(r"\$\{", part)]
    assert command[:2] == ["memtrain", "train"]
    schema.register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", [*command[2:], *arguments])
    assert cfg.exclusion.false_positive_rate == 0.0001 and cfg.exclusion.memory == 0.8
