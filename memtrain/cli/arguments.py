"""What a person types, as Hydra takes it; and the parser of commands that have no config."""

from __future__ import annotations

import argparse
import re
import sys
from typing import NoReturn

from memtrain.sweep.space import quoted

_COLUMNS = {**{f"prompts.{name}": name for name in ("column", "label")}, "column": "column", "label": "label"}
_AUDIT = {
    "model": "model.pretrained",
    **{name: name for name in ("model.config", "lora", "prompts", "out")},
    **_COLUMNS,
}

# For each command what is typed and the key that it is, of keys whose values are text: paths and names. A key differs
# where a group of that name, or a value, bars the plain spelling.
_TEXT = {
    "train": {"resume": "resume.run"},
    "cache": {"out": "out"},
    "demo": {"out": "out"},
    "detect": {
        **_AUDIT,
        "prompts.group": "group",
        **{name: name for name in ("memorized", "other", "group", "embedding")},
    },
    "explain": {**_AUDIT, "prompt": "prompt"},
    "mitigate": {
        **_AUDIT,
        "data": "data.shards",
        "method": "method.names",
        **{name: name for name in ("prompt", "reference", "judge", "clip")},
    },
    "evaluate": {
        "model": "models",
        "model.config": "config",
        "data": "data.shards",
        "samples": "samples.file",
        **{name: name for name in ("models", "lora", "sscd", "clip", "fid", "out")},
    },
    "repair": {
        **{name: key for name, key in _AUDIT.items() if name in ("model", "model.config", "lora", "out")},
        **{name: f"{name}.shards" for name in ("data", "keep")},
        "forget": "forget.list",
        "method": "method.names",
        **{
            name: name
            for name in (
                "forget.column",
                "forget.label",
                "keep.captions",
                "keep.cache",
                "reference",
                "earlier",
                "target_modules",
            )
        },
    },
    "bench_mitigation": {name: name for name in ("out", "shards", "into")},
    "bench_repair": {name: name for name in ("runs", "out", "shards", "into")},
}
# Keys of the sweep's and of the bench's own; whatever else is said is for each of their runs.
_OWN = {
    "sweep": r"(\+|~)?(study|hydra)(/|\.|=|@)|(name|runs_dir|trials|workers|patience|storage)=",
    "bench_mitigation": r"(\+|~)?(protocol|hydra)(/|\.|=|@)|(out|shards|rows|seeds|workers|dry_run|report|into)=",
}


class Parser(argparse.ArgumentParser):
    """Ends with a ValueError of one line in place of the usage and that line.

    Options may be said as commands with a config have them: `distributor=ray` for `--distributor ray`, `merge=true`
    or `merge` for `--merge`.
    """

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        end = words.index("--") if "--" in words else len(words)
        options = [self._as_option(word) for word in words[:end]]
        kept = [word for word, option in zip(words, options, strict=False) if option is None]
        said = [option for option in options if option]
        return super().parse_known_args([*said, *kept, *words[end:]], namespace)

    def _as_option(self, word: str) -> str | None:
        """`--name=value` for `name=value`, nothing for a flag that is off; None where the parser has no such option."""
        name, equals, value = word.partition("=")
        action = self._option_string_actions.get(f"--{name}")
        if action is None or (not equals and name != "merge"):
            return None
        if action.nargs == 0:
            if value not in ("", "true", "false"):
                self.error(f"{word}: say {name}=true, or leave it out")
            return "" if value == "false" else f"--{name}"
        return f"--{word}"

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help says more")


def spelled(command: str, arguments: list[str]) -> list[str]:
    """A command's arguments in Hydra's grammar.

    Text is quoted, so that a path or a prompt may hold any character; lists, mappings, null, `${…}` and what is quoted
    already stay as they are, but in `prompt=`, where nothing means anything. `.inf`, as YAML spells it, becomes inf.
    What Hydra's grammar refuses of any other key is text too: braces of shards, a condition.

    Raises:
        ValueError: `model=` and `models=` are both said.
    """
    if command == "demo" and arguments and not re.match(r"-|\w+=", arguments[0]):
        arguments = [f"out={arguments[0]}", *arguments[1:]]
    if command in ("detect", "evaluate", "cache"):
        arguments = ["merge=true" if argument == "merge" else argument for argument in arguments]
    if command in _OWN:
        arguments = _for_every_run(arguments, _OWN[command])
    if command == "bench_mitigation":
        arguments = [_with_quoted_words(argument) for argument in arguments]
    keys = _TEXT.get(command, {})
    if command == "evaluate" and {"model", "models"} <= {argument.partition("=")[0] for argument in arguments}:
        raise ValueError("say model=PATH, or models=[A,B,…] for several, not both")
    return [_spelled(argument, keys) for argument in arguments]


def _spelled(argument: str, keys: dict[str, str]) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key.startswith("-"):
        return argument
    means_something = value == "null" or value.startswith(("[", "{", "'", '"', "${"))
    if key not in keys:
        argument = re.sub(r"=([+-]?)\.(inf|Inf|INF|nan|NaN|NAN)$", r"=\1\2", argument)
        if means_something or "${" in value or _is_override(argument):
            return argument
        text = f"{key}={quoted(value)}"
        return text if _is_override(text) else argument  # the key is wrong: Hydra says so
    if key == "prompt" or not means_something:
        value = quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))  # no interpolation
    return f"{keys[key]}={value}"


def _is_override(argument: str) -> bool:
    """Whether Hydra's grammar takes it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _with_quoted_words(argument: str) -> str:
    """`protocol.rows.mine=[exclusion=fixed,score=both]`: words of a row, which Hydra's grammar wants in quotes."""
    listed = re.fullmatch(r"(\+?protocol\.(?:rows\.[^=]+|words|make|cache|evaluate|judge)=)\[(.*)\]", argument)
    if listed is None or "'" in listed[2] or '"' in listed[2]:
        return argument
    words = re.findall(r"(?:[^,\[\]{}]|\[[^\]]*\]|\{[^}]*\})+", listed[2])  # at commas, but for those in brackets
    return f"{listed[1]}[{','.join(map(quoted, words))}]"


def _for_every_run(arguments: list[str], own_keys: str) -> list[str]:
    """`study=thresholds trials=6 exclusion=evidence`: what is for every trial is put in a list."""
    overrides = [argument for argument in arguments if re.match(r"~|[^-].*=", argument)]
    others = [override for override in overrides if not re.match(own_keys, override)]
    if not others:
        return arguments
    first = arguments.index(overrides[0])  # overrides stay in a row, between options; Hydra's parser wants them so
    own = [argument for argument in arguments[first:] if argument not in others]
    return [*arguments[:first], f"overrides=[{','.join(map(quoted, others))}]", *own]
