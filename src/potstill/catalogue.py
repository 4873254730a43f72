"""What a method is, read from its source and not by importing it: the docstring with the equation, and the fields.

So `potstill methods` needs no torch, and the documentation cannot differ from the file.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from potstill.errors import ConfigError, unknown
from potstill.registry import methods


@dataclass(frozen=True, slots=True)
class FieldOf:
    """A field of a method: its type and default as written, and what it does."""

    name: str
    type: str
    default: str
    text: str


@dataclass(frozen=True, slots=True)
class Described:
    """A method as its file describes it."""

    name: str
    equation: str
    """The docstring of the file."""
    summary: str
    """The docstring of the class."""
    fields: tuple[FieldOf, ...]


def describe(name: str) -> Described:
    """A method by name. Raises ConfigError for an unknown one."""
    known = methods()
    if name not in known:
        raise ConfigError(unknown("method", name, known))
    module, _, class_name = known[name].partition(":")
    tree = ast.parse(_source(module))
    cls = _class(tree, class_name)
    return Described(name, ast.get_docstring(tree) or "", ast.get_docstring(cls) or "", tuple(_fields(tree, cls)))


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


def _source(module: str) -> str:
    top, *rest = module.split(".")  # find_spec(module) would import its parents, and perhaps torch with them
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the method's module {module!r} is not installed here. Install it, or remove its entry point"
        )
    file = Path(spec.origin) if not rest else Path(spec.origin).parent.joinpath(*rest).with_suffix(".py")
    return file.read_text(encoding="utf-8")


def _fields(tree: ast.Module, cls: ast.ClassDef) -> Iterator[FieldOf]:
    """A class's own fields, then those of the classes of potstill that it derives from, then those of its tables."""
    own = list(_own(cls))
    yield from own
    seen = {field.name for field in own}
    for base in cls.bases:
        for field in _imported(tree, ast.unparse(base)):
            if field.name not in seen:
                yield field
                seen.add(field.name)
    for field in own:
        for inner in _imported(tree, field.type):
            name = f"{field.name}.{inner.name}"
            if name not in seen:
                yield FieldOf(name, inner.type, inner.default, inner.text)
                seen.add(name)


def _own(cls: ast.ClassDef) -> Iterator[FieldOf]:
    for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id != "name":
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            yield FieldOf(node.target.id, ast.unparse(node.annotation), _default(node.value), text)


def _imported(tree: ast.Module, name: str) -> Iterator[FieldOf]:
    """The fields of a class that the module imports from elsewhere in potstill."""
    for node in tree.body:
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("potstill.")
        if isinstance(node, ast.ImportFrom) and ours and name in {alias.name for alias in node.names}:
            there = ast.parse(_source(node.module or ""))
            if any(isinstance(n, ast.ClassDef) and n.name == name for n in there.body):
                yield from _fields(there, _class(there, name))


def _default(value: ast.expr | None) -> str:
    """`Field(1.0, ge=0)` -> "1.0  (ge=0)"."""
    if value is None:
        return "required"
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Field":
        default = ast.unparse(value.args[0]) if value.args else "required"
        limits = ", ".join(f"{k.arg}={ast.unparse(k.value)}" for k in value.keywords)
        return f"{default}  ({limits})" if limits else default
    return ast.unparse(value)
