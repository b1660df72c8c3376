"""The wheel holds all that `pip install .` must bring, and runs where nothing else of the repository is."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import memtrain

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
CONSTRAINTS = (REPO / "launch" / "constraints.txt").read_text()


def normalized(requirement: str) -> str:
    """The package a requirement names, spelt as constraints.txt spells it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_every_package_is_listed():
    on_disk = {".".join(path.parent.relative_to(REPO).parts) for path in REPO.glob("memtrain/**/__init__.py")}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == on_disk | {"memtrain.conf"}, "tool.setuptools.packages in pyproject.toml lists them"


def test_constraints_pin_every_dependency_and_nothing_else_than_versions():
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    pins = re.compile(r"[a-z0-9-]+==[\w.]+( ; .+)?")  # pip refuses extras here, and takes a URL for a source
    assert [line for line in lines if not pins.fullmatch(line)] == []
    assert "://" not in CONSTRAINTS and not re.search(r"--(index|extra-index|find)", CONSTRAINTS)

    project = PROJECT["project"]
    groups = [
        PROJECT["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
    ]
    wanted = {normalized(requirement) for group in groups for requirement in group}
    missing = wanted - {normalized(line) for line in lines}
    assert not missing, "launch/constraints.txt begins with the command that makes it"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    for name in ("memtrain", "conf"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    # The environment's own setuptools builds it, so no network is needed.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", out, source], check=True, stdout=subprocess.DEVNULL)
    (built,) = out.iterdir()
    return built


@pytest.mark.slow
def test_the_wheel_holds_code_conf_and_demo(wheel):
    sources = [
        *REPO.glob("memtrain/**/*.py"),
        *REPO.glob("memtrain/demo/pipeline/**/*"),
        *REPO.glob("memtrain/demo/flow/**/*"),
        REPO / "memtrain/py.typed",  # tells type checkers that memtrain's own annotations count
        *REPO.glob("memtrain/demo/*.zip"),
        *REPO.glob("memtrain/report/assets/*"),
    ]
    expected = {str(path.relative_to(REPO)) for path in sources if path.is_file()}
    expected |= {"memtrain/" + str(path.relative_to(REPO)) for path in REPO.glob("conf/**/*.yaml")}
    expected |= {"memtrain/conf/__init__.py"}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert expected - held == set()
    assert {name.split("/")[0] for name in held} == {"memtrain"}


@pytest.mark.slow
def test_the_wheel_is_of_the_version_that_the_package_says(wheel):
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"], "said once"
    assert wheel.name.split("-")[1] == memtrain.__version__


@pytest.mark.slow
def test_the_installed_command_finds_its_conf(wheel, tmp_path):
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python, command = venv / "bin" / "python", venv / "bin" / "memtrain"
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    # Dependencies come from this environment, by a plain path: the .pth files beside them, the one of an
    # editable memtrain among them, are not read.
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command) -> str:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import memtrain; print(memtrain.__file__)")
    assert Path(where.strip()) == site_packages / "memtrain" / "__init__.py"
    assert "train" in run(command, "--help")
    assert run(command, "--version") == f"memtrain {memtrain.__version__}\n"
    composed = OmegaConf.create(run(command, "train", "--cfg", "job", "experiment=demo"))
    assert {"data", "model", "exclusion", "optimizer", "trainer", "logger", "callbacks"} <= composed.keys()
    assert list(empty.iterdir()) == []
