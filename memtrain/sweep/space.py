"""What a study varies: parameters over Hydra overrides of `memtrain train`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna import Trial

Value = str | int | float | bool | list | None


@dataclass(frozen=True)
class Parameter:
    """One setting that differs between trials.

    Args:
        name: in the study; `when` of other parameters refers to it.
        key: of the override, `exclusion.threshold`.
        choices: values to choose from; text as on the command line, where quotes count.
        low, high: instead of choices, a range; of whole numbers where both are, else of numbers with four digits.
        log: draw evenly over the logarithm.
        when: `NAME=VALUE`; only where that parameter, an earlier one, has this value.
    """

    name: str
    key: str
    choices: Sequence[Value] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    when: str | None = None

    def __post_init__(self):
        of = f"study.space.{self.name}"
        if (self.choices is None) == (self.low is None) or (self.low is None) != (self.high is None):
            raise ValueError(f"{of} needs choices, or low and high")
        if self.choices is not None:
            if not self.choices:
                raise ValueError(f"{of}.choices must name at least one value, got []")
            return
        if not all(isinstance(end, int | float) for end in (self.low, self.high)):
            raise ValueError(f"{of}: low and high must be numbers, got {self.low} and {self.high}")
        if not self.low < self.high:
            raise ValueError(f"{of}: low must be < high, got {self.low:g} and {self.high:g}")
        if self.log and not self.low > 0:
            raise ValueError(f"{of}.low must be > 0 with log=true, got {self.low:g}")

    def suggest(self, trial: Trial) -> str:
        """The value that the study would try next, as on the command line."""
        if self.choices is not None:
            return trial.suggest_categorical(self.name, [spell(choice) for choice in self.choices])
        if isinstance(self.low, int) and isinstance(self.high, int):
            return spell(trial.suggest_int(self.name, self.low, self.high, log=self.log))
        return f"{trial.suggest_float(self.name, self.low, self.high, log=self.log):.4g}"


def check_space(space: Sequence[Parameter]) -> None:
    """Raises ValueError where a condition refers to no earlier parameter, or to a value that it does not take."""
    earlier: dict[str, Parameter] = {}
    for parameter in space:
        name, equals, value = (parameter.when or "").partition("=")
        if parameter.when is not None and (not equals or name not in earlier):
            raise ValueError(
                f"study.space.{parameter.name}.when must be NAME=VALUE of an earlier parameter "
                f"({', '.join(sorted(earlier)) or 'there is none'}), got {parameter.when}"
            )
        if parameter.when is not None and earlier[name].choices is not None:
            choices = [spell(choice) for choice in earlier[name].choices]
            if value not in choices:
                raise ValueError(f"study.space.{parameter.name}.when={parameter.when}: {name} is one of {choices}")
        earlier[parameter.name] = parameter


def suggest(trial: Trial, space: Iterable[Parameter], fixed: Mapping[str, str]) -> list[str]:
    """The overrides that a trial has of its own, as the study suggests them.

    Args:
        fixed: key -> value, of overrides that hold for every trial; parameters of these keys are not varied.
    """
    values: dict[str, str] = {}  # by parameter
    keys: dict[str, str] = {}
    for parameter in space:
        name, _, value = (parameter.when or "").partition("=")
        if parameter.when is not None and values.get(name) != value:
            continue
        if parameter.key in fixed:
            values[parameter.name] = fixed[parameter.key]
            continue
        if parameter.key in keys:
            raise ValueError(
                f"study.space: {keys[parameter.key]} and {parameter.name} both set {parameter.key}; "
                "part them by conditions (when)"
            )
        keys[parameter.key] = parameter.name
        values[parameter.name] = parameter.suggest(trial)
    return [f"{key}={values[name]}" for key, name in keys.items()]


def spell(value: Value) -> str:
    """As on the command line."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(spell, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def quoted(text: str) -> str:
    """A string for Hydra's grammar, in which a backslash counts before a quote alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), text) + "'"


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def merged(*overrides: Iterable[str]) -> list[str]:
    """One override for each key: that of the last list that has it. Hydra refuses a group chosen twice."""
    by_key: dict[str, str] = {}
    for several in overrides:
        for override in several:
            by_key[key_of(override)] = override
    return list(by_key.values())
