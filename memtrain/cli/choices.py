"""What conf/ offers, for the help of a command: its groups, and what each choice's file says of it."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import yaml

from memtrain.cli.schema import LOADER, groups
from memtrain.data.paths import config_folder

_WIDTH = 120
_TEMPLATE = "  {group:<12}{name:<24}{says}"


def choices(command: str) -> str:
    """A line for each file of the groups that the command's config chooses from."""
    config = yaml.load((config_folder() / f"{command}.yaml").read_text(encoding="utf-8"), LOADER)
    lines: list[str] = []
    for group in groups(config, with_optional=True):
        named = group
        for file in sorted((config_folder() / group).glob("*.yaml")):
            said = _TEMPLATE.format(group=named, name=file.stem, says=about(file))
            lines += textwrap.wrap(said, _WIDTH, subsequent_indent=_TEMPLATE.format(group="", name="", says=""))
            named = ""
    return "\n".join(lines).replace("$", "$$")  # Hydra puts its own words in where a $ stands


def about(file: Path) -> str:
    """The first sentence of the comment at the top of a config, which says what it does."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package")]
    comment = re.match(r"(# \S.*\n)*", "\n".join([*lines, ""]))[0].replace("# ", "").split()
    return re.split(r"\.(?: (?=[A-Z])|$)", " ".join(comment))[0]
