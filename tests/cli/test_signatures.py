"""What is read from source is what Python itself says of a signature, once imported."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
from hydra.utils import get_object

from memtrain.cli import signatures
from memtrain.cli.signatures import parameters
from tests.support.conf import ours, sections

TAKERS = sorted({target for _, target, _ in sections() if ours(target)})


@pytest.mark.parametrize("target", TAKERS)
def test_the_names_are_those_of_the_imported_signature(target):
    own = inspect.signature(get_object(target)).parameters.values()
    named = [one.name for one in own if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
    assert list(parameters(target)) == named


def test_there_are_takers_of_every_kind():
    """Else the test above tests nothing: functions, classes, dataclasses, and what inherits its parameters."""
    assert len(TAKERS) > 30 and parameters("memtrain.training.methods.RandomCaption") == {
        "probability": float,
        "count": int,
    }


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the name in which the sources lie that are read."""
    folder = tmp_path / "memtrain"
    folder.mkdir()
    monkeypatch.setattr(signatures, "PACKAGE", folder)
    for function in (signatures.parameters, signatures._source):
        function.cache_clear()
    yield folder
    for function in (signatures.parameters, signatures._source):
        function.cache_clear()


def test_types_are_those_that_a_config_knows(package):
    (package / "mine.py").write_text(
        "from torch import Tensor\n"
        "def taken(a: int, b: float, c: bool, d: str, e: int | None, f: list[str], g: tuple[float, float],\n"
        "          h: Sequence[int] | None, i: Tensor, j, k: int | float | None, *, last: str = '', **rest: int): ...\n"
    )
    assert parameters("memtrain.mine.taken") == {
        "a": int, "b": float, "c": bool, "d": str, "e": int | None, "f": list[str], "g": list[float],
        "h": list[int] | None, "i": Any, "j": Any, "k": Any, "last": str,
    }  # fmt: skip


def test_parameters_are_inherited_from_other_files_too(package):
    (package / "base.py").write_text("class Base:\n    def __init__(self, rate: float): ...\n")
    (package / "mine.py").write_text(
        "from abc import ABC\nfrom memtrain.base import Base\n"
        "class Mine(ABC, Base): ...\nclass Own(Base):\n    def __init__(self, count: int): ...\nclass Bare(ABC): ...\n"
    )
    assert parameters("memtrain.mine.Mine") == {"rate": float}
    assert parameters("memtrain.mine.Own") == {"count": int} and parameters("memtrain.mine.Bare") == {}


@pytest.mark.parametrize("target", ["memtrain.mine.Mine", "memtrain.core.exclusion.Nobody"])
def test_what_is_not_there_is_named(target):
    with pytest.raises(LookupError, match=target.rpartition(".")[0]):
        parameters(target)


def test_nothing_is_imported_for_it():
    program = (
        "import sys; from memtrain.cli.schema import register; register(); "
        "print(sorted({'torch', 'pytorch_lightning', 'diffusers'} & set(sys.modules)), "
        "'memtrain.core.exclusion' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["[]", "False"]
