"""Imports between the rooms run one way, as docs/architecture.md draws it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "memtrain"
BELOW = {
    "core": set(),
    "models": {"core"},
    "data": {"core"},
    "training": {"core", "models", "data", "demo"},
    "audit": {"core", "models", "data"},
    "report": {"core", "data", "audit"},
    "sweep": {"core", "report"},
    "callbacks": {"core", "models", "data", "training", "report"},
    "demo": {"core", "models", "data"},
}
AUDITS = ("detect", "explain", "mitigate", "repair", "evaluate")  # commands with a folder each


def rooms_that(room: str) -> set[str]:
    """The rooms that a room's files import, wherever in the file."""
    found = set()
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name.startswith("memtrain.")}
    return found


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_what_is_below_it(room):
    assert rooms_that(room) - {room} <= BELOW[room]


def test_every_room_but_the_cli_is_held():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*BELOW, "cli"}


def imports_of(path: Path) -> set[str]:
    """The files of the package that one imports, under TYPE_CHECKING and within functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def needs_within(folder: Path) -> dict[str, set[str]]:
    """Of each file in a folder: which others of it are imported, by their dotted names."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in folder.rglob("*.py")}
    return {name: imports_of(path) & files.keys() for name, path in files.items()}


def test_no_circle_of_imports():
    """A file that another one needs can be understood without it."""
    needs = needs_within(PACKAGE)
    while free := [name for name, needed in needs.items() if not needed & needs.keys()]:
        for name in free:  # needs nothing that is left
            del needs[name]
    assert not needs, f"these import each other, or what does: {sorted(needs)}"


def test_a_file_of_the_audit_is_read_with_five_others_at_most():
    """The longest chain of imports between its files has six."""
    needs = needs_within(PACKAGE / "audit")

    def chain(name: str) -> list[str]:
        return [name, *max((chain(needed) for needed in needs[name]), key=len, default=[])]

    longest = max(map(chain, needs), key=len)
    assert len(longest) <= 6, " → ".join(longest)


@pytest.mark.parametrize("command", AUDITS)
def test_a_command_of_the_audit_needs_no_other_one(command):
    paths = list((PACKAGE / "audit" / command).glob("*.py"))
    others = tuple(f"memtrain.audit.{other}" for other in AUDITS if other != command)
    needed = set().union(*map(imports_of, paths))
    assert len(paths) > 1 and not {name for name in needed if name.startswith(others)}


@pytest.mark.parametrize("room", [*BELOW, "cli"])
def test_no_class_name_comes_twice_in_a_room(room):
    names = [
        node.name
        for path in (PACKAGE / room).rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    assert {name for name in names if names.count(name) > 1} == set()


def owners_set(path: Path) -> set[str]:
    """Whose attributes a file sets: the first name of `trainer.strategy.checkpoint_io = ...`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        owner = node
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            found |= {owner.id} if isinstance(owner, ast.Name) else set()
    return found


@pytest.mark.parametrize("path", sorted((PACKAGE / "callbacks").glob("*.py")), ids=lambda path: path.stem)
def test_a_callback_sets_nothing_of_the_run_it_looks_at(path):
    assert not owners_set(path) & {"trainer", "pl_module", "exception"}


def test_what_sets_something_of_the_run_is_found():
    assert "trainer" in owners_set(PACKAGE / "training" / "checkpoint.py")
    assert "exception" in owners_set(PACKAGE / "training" / "signals.py")
