"""Imports point one way: types <- divergence, credit, chunks <- methods <- loop <- cli."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import potstill
from potstill import registry

ROOT = Path(potstill.__file__).parent
HEAVY = {"torch", "transformers", "peft", "datasets", "reasoning_gym", "math_verify", "matplotlib", "rouge_score"}

LAYERS = [
    {"errors", "seeds", "logged", "lean"},
    {"types"},
    {"divergence", "credit", "chunks", "phased", "similarity", "kv", "chat", "metrics", "run", "ledger"},
    {"batch", "select", "verifiers", "tasks", "lab"},
    {
        *("methods", "split", "decode", "models", "align", "wire", "serve"),
        *("teachers", "samplers", "registry", "catalogue", "config", "recipes"),
    },
    {"learners", "geometry", "evaluate", "record", "spent", "stop", "report", "progress"},
    {"checks", "build"},
    {"writing"},
    {"loop"},
    {"comparison", "demo", "doctor", "cli"},
]
"""From what knows nothing to what knows everything. A module may import those of its own row and of the rows above."""


def modules() -> dict[str, Path]:
    """Dotted names below potstill, without `__init__` of the package itself."""
    paths = [p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem not in ("__init__", "__main__")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imported(path: Path, top_only: bool = False) -> set[str]:
    """What a file imports, by dotted name; `top_only`: on import of the module, not later inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    out: set[str] = set()
    for node in top_level(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            out |= {node.module} if node.module != "potstill" else {f"potstill.{alias.name}" for alias in node.names}
    return out


def top_level(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        found.append(node)
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not checking:
            found += top_level(node)
    return found


def ours(path: Path) -> set[str]:
    """The modules of potstill that a file imports, anywhere, without the leading `potstill.`."""
    return {name.removeprefix("potstill.") for name in imported(path) if name.startswith("potstill.")}


def layer(module: str) -> int:
    part = module.partition(".")[0]
    found = [i for i, row in enumerate(LAYERS) if part in row]
    assert found, f"potstill.{part} has no place in LAYERS: give it one"
    return found[0]


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_nothing_above_it(module: str):
    if module.startswith("lab."):  # lab.build and lab.train use the whole package; nothing but the cli uses them
        pytest.skip("the script that builds the bundled models")
    above = {name for name in ours(modules()[module]) if layer(name) > layer(module) and not name.startswith("lab.")}
    assert not above, f"potstill.{module} imports {above}"


def test_nothing_imports_the_cli():
    rest = {m: path for m, path in modules().items() if m.partition(".")[0] != "cli"}
    assert not [m for m, path in rest.items() if any(name.partition(".")[0] == "cli" for name in ours(path))]


@pytest.mark.parametrize("package", ["teachers", "samplers", "learners"])
def test_back_ends_do_not_know_methods(package: str):
    names = {f'"{name}"' for name in registry.METHODS} | {
        value.partition(":")[2] for value in registry.METHODS.values()
    }
    for module, path in modules().items():
        if module.startswith(package):
            known = {name for name in ours(path) if name.startswith("methods")}
            assert known <= ({"methods.base"} if package == "learners" else set()), module
            code = ast.unparse(without_docstrings(ast.parse(path.read_text(encoding="utf-8")))).replace("'", '"')
            assert not [name for name in names if name in code], module


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))] or [
                ast.Pass()
            ]  # type: ignore[attr-defined]
    return tree


def test_methods_know_no_back_end():
    for module, path in modules().items():
        if module.startswith("methods."):
            known = {name.partition(".")[0] for name in ours(path)}
            assert not known & {
                "models",
                "decode",
                "teachers",
                "samplers",
                "learners",
                "config",
                "recipes",
                "loop",
                "batch",
            }, module
            others = {name for name in ours(path) if name.startswith("methods.")} - {
                "methods.audited",
                "methods.base",
                "methods.token_credit",
            }
            assert not others, f"{module} imports another method: {others}"


LIGHT = {
    "cli",
    "run",
    "config",
    "recipes",
    "registry",
    "catalogue",
    "metrics",
    "report",
    "logged",
    "tasks",
    "lab",
    "comparison",
}
TRAINING = {"lab.build", "lab.train", "lab.evaluate", "lab.tokenizers"}


@pytest.mark.parametrize("module", [m for m in modules() if m.partition(".")[0] in LIGHT and m not in TRAINING])
def test_light_modules_import_nothing_heavy(module: str):
    assert not {name.partition(".")[0] for name in imported(modules()[module], top_only=True)} & HEAVY


def test_import_potstill_leaves_torch_alone():
    code = f"""
import sys
import potstill, potstill.cli, potstill.config, potstill.recipes, potstill.metrics, potstill.report, potstill.tasks, potstill.demo
heavy = {HEAVY!r} & sys.modules.keys()
assert not heavy, heavy
assert callable(potstill.load_run)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
