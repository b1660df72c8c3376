"""The scripts of launch/: what they say when a machine lacks something, and that they do their work once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pip
import pytest

from tests.support.forks import PATIENCE

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = [".ci/run", *(str(path.relative_to(REPO)) for path in sorted(REPO.glob("launch/*.sh")))]

# A memtrain without dependencies, and with a build backend of its own, so that pip needs no registry. Its
# command prints how it was called.
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "memtrain"
version = "0.1.0"
"""
BACKEND = """
import zipfile
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "memtrain-0.1.0-py3-none-any.whl"
    info = "memtrain-0.1.0.dist-info/"
    files = {
        "called.py": "import json, os, sys\\ndef main(): print(json.dumps([os.getcwd(), *sys.argv[1:]]))\\n",
        info + "METADATA": "Metadata-Version: 2.1\\nName: memtrain\\nVersion: 0.1.0\\n",
        info + "WHEEL": "Wheel-Version: 1.0\\nGenerator: b\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        info + "entry_points.txt": "[console_scripts]\\nmemtrain = called:main\\n",
    }
    files[info + "RECORD"] = "".join(f"{file},,\\n" for file in [*files, info + "RECORD"])
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return name
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Launch scripts with a pyproject.toml beside them, in a folder with a space in its name."""
    root = tmp_path / "a checkout"
    root.mkdir()
    shutil.copytree(REPO / "launch", root / "launch")
    shutil.copy(REPO / "pyproject.toml", root)
    return root


# What makes environments with the pip of these tests: to unpack and compile its own takes Python seconds each time.
BASE = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    "{python}" -m venv --without-pip "$3" && cp -R "{pip}" "$3/lib/{version}/site-packages/"
else
    exec "{python}" "$@"
fi
"""


def base_interpreter(folder: Path) -> str:
    """A Python for `PYTHON=`."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    path = folder / "base"
    path.write_text(BASE.format(python=sys.executable, pip=Path(pip.__file__).parent, version=version))
    path.chmod(0o755)
    return str(path)


def launch(script: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "PYTHON", "MEMTRAIN_")) and name != "VIRTUAL_ENV"
    }
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=inherited | {"PIP_CONFIG_FILE": os.devnull, "MEMTRAIN_TORCH": "default"} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def path_with(folder: Path, **interpreters: str) -> str:
    """A PATH of what any machine has, and of these interpreters, each given as a shell script."""
    folder.mkdir()
    for tool in ("bash", "sh", "dirname", "grep", "head", "tail", "sed", "cat", "touch", "mkdir", "rm"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, script in interpreters.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def the_only_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", REPO / script], check=True)


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_python_too_old(checkout, tmp_path, script):
    path = path_with(tmp_path / "bin", python3="echo 3.8.1")
    done = launch(checkout / "launch" / script, cwd=tmp_path, PATH=path)
    assert the_only_line(done) == (
        f"memtrain needs Python >= 3.10, found 3.8.1 ({path}/python3); set PYTHON=/path/to/python3.11"
    )
    assert not (checkout / ".venv").exists()


def test_python_missing(checkout, tmp_path):
    done = launch(checkout / "launch" / "test.sh", cwd=tmp_path, PATH=path_with(tmp_path / "bin"))
    assert the_only_line(done).startswith("memtrain needs Python >= 3.10, found none")


def test_python_named_but_not_there(checkout, tmp_path):
    done = launch(checkout / "launch" / "test.sh", cwd=tmp_path, PYTHON="/no/such/python")
    assert the_only_line(done) == "memtrain needs Python >= 3.10, but PYTHON=/no/such/python does not run"


def test_venv_module_missing(checkout, tmp_path):
    without_venv = 'case "$2" in *venv*) exit 1 ;; esac; echo 3.12.4'
    path = path_with(tmp_path / "bin", python3=without_venv)
    line = the_only_line(launch(checkout / "launch" / "test.sh", cwd=tmp_path, PATH=path))
    assert "venv and ensurepip" in line and "python3.12-venv" in line


@pytest.mark.parametrize("found", [True, False])
def test_a_machine_without_a_gpu_asks_for_the_wheel_for_cpus(checkout, tmp_path, found):
    """`pip` writes down how it is called; it finds the wheel in its sources, or does not."""
    pip = f'case "$*" in -c*) exit 1 ;; esac; echo "$*" >>"{tmp_path}/calls"; exit {int(not found)}'
    (fake := tmp_path / "python").write_text(f"#!/bin/sh\n{pip}\n")
    fake.chmod(0o755)
    (tmp_path / "install.sh").write_text(
        f'source "{checkout}/launch/common.sh"; mkdir -p "$venv"; python="{fake}"\n'
        "wants_cpu_torch && install_cpu_torch; MEMTRAIN_TORCH=default; wants_cpu_torch || echo left\n"
    )
    done = launch(tmp_path / "install.sh", cwd=tmp_path, MEMTRAIN_TORCH="cpu")
    assert done.returncode == 0, done.stderr
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert "--no-deps" in call and call.endswith("+cpu")
    assert done.stdout.splitlines()[-1] == "left" and ("the default one" in done.stdout) == (not found)


def is_usable(root: Path) -> bool:
    """Whether the .venv of a checkout is taken as it is."""
    ask = f'source "{root}/launch/common.sh"; venv_is_usable'
    return subprocess.run(["bash", "-c", ask], cwd=root).returncode == 0


@pytest.mark.slow
def test_quickstart_says_what_it_cannot_reach_and_installs_once(checkout, tmp_path):
    script = checkout / "launch" / "quickstart.sh"
    base = {"PYTHON": base_interpreter(tmp_path)}
    nobody_listens = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    for first_time in (True, False):
        done = launch(script, cwd=tmp_path, **nobody_listens, **base)
        line = the_only_line(done)
        assert line.startswith("could not install: the package registry cannot be reached (")
        assert "Connection refused" in line and "; check the network or PIP_INDEX_URL" in line
        assert ("making" in done.stdout) == first_time  # pip changed nothing, so .venv stays

    (checkout / "pyproject.toml").write_text(PYPROJECT)
    (checkout / "backend.py").write_text(BACKEND)

    def calls(root: Path, *arguments: str, **environment: str) -> tuple[str, list]:
        done = launch(root / "launch" / script.name, *arguments, cwd=tmp_path, **environment, **base)
        assert done.returncode == 0, done.stdout + done.stderr
        printed = done.stdout.splitlines()
        called = [json.loads(line) for line in printed if line.startswith("[")]
        return "\n".join(printed[: -len(called)]), called

    said, (demo, cache, train) = calls(checkout, "exclusion=none", "trainer.max_steps=5")
    corpus = f"{checkout}/data/demo"
    assert "making" not in said and "installed in" in said
    assert demo == [str(checkout), "demo", corpus]
    shards = f"data.shards='{corpus}'"
    assert cache == [str(checkout), "cache", "model=demo", "data.resolution=64", "dtype=float32", shards]
    overrides = ["experiment=demo", "data.cache=beside", shards, "exclusion=none", "trainer.max_steps=5"]
    assert train == [str(checkout), "train", *overrides]

    for other in ("model=demo_flow", "data.resolution=32"):  # what is trained on is not what would be encoded
        _, (_, train) = calls(checkout, other)
        assert train == [str(checkout), "train", "experiment=demo", "data.cache=null", shards, other]

    said, (demo, *_) = calls(checkout, MEMTRAIN_DEMO="it's here")
    assert said == ""
    assert demo[-1] == f"{tmp_path}/it's here"

    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# a change\n")
    said, _ = calls(checkout)
    assert "making" not in said and "installing" in said

    unfinished = checkout / ".venv" / "memtrain-unfinished"
    assert is_usable(checkout)
    unfinished.touch()
    assert not is_usable(checkout)
    unfinished.unlink()

    (checkout / ".venv" / "left over").touch()
    moved = checkout.rename(tmp_path / "moved")
    said, (demo, *_) = calls(moved)
    assert "making" in said and demo == [str(moved), "demo", f"{moved}/data/demo"]
    assert not (moved / ".venv" / "left over").exists()
