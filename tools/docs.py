"""Write docs/methods.md, docs/metrics.md and docs/recipes.md from the code; `--check` only says whether they are stale.

Types, limits and defaults are those of the classes that read a recipe, and meanings are their docstrings, so a page
cannot differ from what it describes.
"""

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from potstill import catalogue, config, credit, registry
from potstill.logged import LOGGED
from potstill.methods.base import Method
from potstill.methods.token_credit import TokenCredit
from potstill.tasks import TASKS
from potstill.tasks.rows import Rows
from potstill.teachers import settings
from potstill.types import Wants
from potstill.verifiers import Exact, Math

DOCS = Path(__file__).resolve().parents[1] / "docs"
GENERATED = "<!-- Written by tools/docs.py from the source: change the source, then run it. -->\n"

TABLES: dict[str, tuple[type[BaseModel], str]] = {
    "The top of the file": (config.Config, ""),
    "[student]": (config.Student, ""),
    "[student.lora]": (config.LoRA, "Optional. "),
    "[teacher]": (config.Teacher, "Left out where the method asks no teacher. "),
    '[teacher] kind = "http"': (settings.HTTP, ""),
    '[teacher] kind = "chat"': (settings.Chat, ""),
    '[teacher] kind = "potstill"': (settings.Potstill, ""),
    '[teacher] kind = "replay"': (settings.Replay, ""),
    "[reference]": (config.Reference, "Optional. "),
    "[budget]": (config.Budget, "Instead of `steps`. "),
    "[rollouts]": (config.Rollouts, ""),
    "[rollouts.horizon]": (config.Horizon, "Optional. "),
    "[select]": (config.Select, "Optional. "),
    "[learner]": (config.Learner, ""),
    "[geometry]": (config.Geometry, ""),
    "[projection]": (config.Projection, "Optional. "),
    "[eval]": (config.Evaluation, ""),
    "[save]": (config.Save, ""),
}
"""Heading of a table: its class, and a word before the docstring."""

NESTED = {
    *("student", "lora", "teacher", "reference", "budget", "task", "method", "rollouts", "horizon", "select"),
    *("learner", "geometry", "projection", "eval", "save"),
}
"""Fields that are tables of their own."""

KINDS = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", dict: "table"}
LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def texts(cls: type[BaseModel]) -> dict[str, str]:
    """The string below each field, its own or inherited: what it means."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("potstill."):
            [node] = ast.parse(inspect.getsource(base)).body
            assert isinstance(node, ast.ClassDef)
            for field, after in pairwise(node.body):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    assert isinstance(after.value, ast.Constant)
                    found[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return found


def kind(annotation: Any) -> str:
    """A type as the writer of a recipe sees it."""
    origin, inside = get_origin(annotation), [a for a in get_args(annotation) if a is not type(None)]
    if origin is Literal:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in inside)
    if origin in (Union, UnionType):
        return " or ".join(kind(a) for a in inside)
    if origin is tuple:
        return f"list of {kind(inside[0])}s"
    origin = origin or annotation
    return KINDS[origin] if origin in KINDS else f"`{json.dumps(origin.__name__.lower())}`"


def default(field: FieldInfo) -> str:
    """What a field is when it is not given."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "unset"
    if value in ((), {}):
        return "empty"
    if isinstance(value, BaseModel):
        return f"`{json.dumps(type(value).__name__.lower())}`"
    return f"`{json.dumps(value)}`"


def row(name: str, field: FieldInfo, meaning: str, preset: Any = None) -> str:
    """A line of a table; `preset` is the default where it is not the field's own."""
    limits = [f"{LIMITS[a]} {getattr(m, a)}" for m in field.metadata for a in LIMITS if hasattr(m, a)]
    usual = default(field) if preset is None else f"`{json.dumps(preset)}`"
    cells = [f"`{name}`", ", ".join([kind(field.annotation), *limits]), usual, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def rows(cls: type[BaseModel], prefix: str, preset: BaseModel | None) -> list[str]:
    """The fields of a table within a table, with the defaults of the one it stands in."""
    meaning = texts(cls)
    given = {} if preset is None else dict(preset)
    return [row(f"{prefix}{n}", f, meaning.get(n, ""), given.get(n)) for n, f in cls.model_fields.items()]


def _table_of(field: FieldInfo) -> type[BaseModel] | None:
    parts = (field.annotation, *get_args(field.annotation))
    return next((t for t in parts if isinstance(t, type) and issubclass(t, BaseModel)), None)


def table(cls: type[BaseModel], skip: Sequence[str] = ()) -> str:
    """The fields of a class as Markdown; tables of their own, and `skip`, are left out."""
    meaning, prefix = texts(cls), ""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    inner: list[str] = []
    for name, field in cls.model_fields.items():
        if name in skip or (name in NESTED and _table_of(field)):
            continue
        if part := _table_of(field):
            preset = field.default if isinstance(field.default, BaseModel) else None
            inner += rows(part, f"{prefix}{name}.", preset)
        else:
            lines.append(row(f"{prefix}{field.alias or name}", field, meaning.get(name, "")))
    lines += inner
    return "\n".join(lines) + "\n" if len(lines) > 2 else "No fields.\n"


def methods() -> str:
    """One section per method: the docstring of its file, and its fields; the token-credit family side by side."""
    found = {name: registry.method_class(name) for name in registry.METHODS}
    family = [name for name, cls in found.items() if issubclass(cls, TokenCredit)]
    out = [GENERATED, "# Methods\n", "The same as `potstill methods NAME`. All quantities are in nats and tokens.\n"]
    out.append("## The token-credit family\n\n```text\n" + (inspect.getdoc(credit) or "") + "\n```\n")
    out += ["| method | A_t | needs |", "|---|---|---|"]
    for name in family:
        lines = [line.strip() for line in catalogue.describe(name).equation.splitlines()]
        equations = [line for line in lines if line.startswith(("A_t =", "c_t =", "w_t =", "m_t ="))]
        shown = "<br>".join(map(formula, equations)) if equations else ""
        out.append(f"| `{name}` | {shown.replace('|', chr(92) + '|')} | {needs(found[name]())} |")
    out.append("\nTheir loss, and the fields that all of them have:\n")
    out.append("```text\n" + (inspect.getdoc(inspect.getmodule(TokenCredit)) or "") + "\n```\n")
    out.append(table(TokenCredit, skip=("name",)))
    common = set(TokenCredit.model_fields)
    for name, cls in found.items():
        method = catalogue.describe(name)
        out.append(f"## {name}\n\n{method.summary}\n\n```text\n{method.equation}\n```\n")
        own = [
            n
            for n, f in cls.model_fields.items()
            if name in family and n in common and n not in vars(cls)["__annotations__"]
        ]
        out.append(table(cls, skip=("name", *own)))
    return "\n".join(out)


def formula(line: str) -> str:
    """`A_t = ...` as code, and what stands far behind it in words."""
    code, *words = re.split(r"\s{3,}", line)
    return f"`{code}`" + "".join(f" ({word})" for word in words)


def needs(method: Method) -> str:
    """What a method needs, with its defaults, in words."""
    teacher = {Wants.NOTHING: [], Wants.SAMPLED: ["teacher's log-probs"]}[method.wants]
    words = {"verdict": "verdicts", "group": "several answers to a prompt", "entropy": "entropies"}
    of = {"start": "the initial student's log-probs", "base": "those of a base"}
    also = [of[method.refers_to]] if method.refers_to else []
    return ", ".join([*teacher, *(words[n] for n in words if n in method.needs), *also])


def metrics() -> str:
    """Every logged number."""
    out = [
        GENERATED,
        "# Logged numbers\n",
        "`metrics.jsonl` has one row a step, `evals.jsonl` one row an evaluation. Figures of an evaluation are",
        '`{"value": ..., "low": ..., "high": ...}`: a mean over questions and its 95 % interval (bootstrap over questions).\n',
        "| name | unit | meaning |",
        "|---|---|---|",
    ]
    for name, (unit, meaning) in LOGGED.items():
        out.append(f"| `{name}` | {unit} | {meaning} |".replace("||", "\\|\\|"))
    return "\n".join(out) + "\n"


def recipes() -> str:
    """Every table and field of a recipe."""
    out = [
        GENERATED,
        "# Recipes\n",
        "A recipe is one TOML file. `potstill check RECIPE` prints every field as understood. Behind the recipe, any field",
        "can be set on the command line: `learner.lr=1e-4`, `method.beta=0.5`, `name=second-try`. Values are TOML, or",
        "strings where they are not. An unknown field is an error. Relative paths start where the command is run.\n",
    ]
    for heading, (cls, before) in TABLES.items():
        out.append(f"## {heading}\n\n{before}{inspect.getdoc(cls)}\n\n{table(cls)}")
    out.append("## [method]\n\n`name` chooses the method; its other fields are in [methods.md](methods.md).")
    out.append('A class of your own is `name = "path/to/file.py:Class"`.\n')
    out.append("## [task]\n\n`kind` chooses the task; its other fields are below.\n")
    for name in TASKS:
        cls = registry.task_class(name)
        about = [inspect.getdoc(c) for c in (cls, Rows) if issubclass(cls, c)]
        said = "\n\n".join(text for text in about if text)
        out.append(f'### kind = "{name}"\n\n{said}\n\n{table(cls, skip=("kind",))}')
    out.append("## Verifiers\n\n`verify` of the tasks `jsonl` and `hub`: a name or a table.\n")
    for verifier in (Exact, Math):
        name = verifier.__name__.lower()
        out.append(f'### "{name}"\n\n{inspect.getdoc(verifier)}\n\n{table(verifier, skip=("kind",))}')
    return "\n".join(out)


PAGES: dict[str, Callable[[], str]] = {"methods.md": methods, "metrics.md": metrics, "recipes.md": recipes}


def stale() -> list[str]:
    """Pages that differ from what the source says."""
    there = {name: DOCS / name for name in PAGES}
    return [n for n, make in PAGES.items() if not there[n].exists() or there[n].read_text(encoding="utf-8") != make()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or check them. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/ from the source.")
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is stale, and write nothing")
    if not parser.parse_args(arguments).check:
        for name, make in PAGES.items():
            (DOCS / name).write_text(make(), encoding="utf-8")
        return 0
    names = stale()
    if names:
        sys.stderr.write(f"stale: {', '.join(names)}. Run: python tools/docs.py\n")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
