"""What the classes and functions that conf/ names take, read from their source: nothing is imported for it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
_PLAIN = {"bool": bool, "float": float, "int": int, "str": str}
_LISTS = ("list", "tuple", "Sequence")


def is_ours(target: str) -> bool:
    """Whether `target`, a path as `_target_` says it, is of memtrain, and so has a source that can be read here."""
    return target.startswith(f"{PACKAGE.name}.")


@cache
def parameters(target: str) -> dict[str, Any]:
    """Parameters of a class or function of memtrain's own: name -> type of the value in a config, in their order.

    A config knows bool, float, int, str, lists of these, and null; a parameter of any other type takes anything.

    Raises:
        LookupError: there is nothing of that name.
    """
    module, _, name = target.rpartition(".")
    tree = _source(module)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _arguments(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node, module)
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names] and is_ours(node.module):
            return parameters(f"{node.module}.{name}")
    raise LookupError(f"{target}: {module} has no class or function {name}")


@cache
def _source(module: str) -> ast.Module:
    file = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise LookupError(f"{module}: there is no {file}")
    return ast.parse(file.read_text(encoding="utf-8"))


def _of_class(node: ast.ClassDef, module: str) -> dict[str, Any]:
    """Of its own `__init__`, of its fields where it is a dataclass, else of the first base that takes anything."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return dict(list(_arguments(part).items())[1:])  # without self
    if any(ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list):
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        return {field.target.id: _type(field.annotation) for field in fields}
    for base in node.bases:
        try:
            return parameters(f"{module}.{ast.unparse(base)}")
        except LookupError:  # a class of another library: it says nothing of a config's values
            continue
    return {}


def _arguments(node: ast.FunctionDef) -> dict[str, Any]:
    return {argument.arg: _type(argument.annotation) for argument in (*node.args.args, *node.args.kwonlyargs)}


def _type(annotation: ast.expr | None) -> Any:
    match annotation:
        case ast.Name(id=name) if name in _PLAIN:
            return _PLAIN[name]
        case ast.BinOp(op=ast.BitOr(), left=left, right=ast.Constant(value=None)):
            inner = _type(left)
            return inner if inner is Any else inner | None
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _LISTS:
            return list[_type(inner.elts[0] if isinstance(inner, ast.Tuple) else inner)]
    return Any
