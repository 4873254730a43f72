"""Recipes: what is read, what is written back, and what is refused. tests/e2e/test_faults.py has the messages."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill import config, recipes
from potstill.errors import ConfigError

TEXT = """
name = "x"
steps = 3
student = {path = "lab/student"}
teacher = {path = "lab/teacher"}
task = {kind = "arithmetic"}
method = {name = "opd"}
"""

TASK, METHOD = {"kind": "arithmetic"}, {"name": "opd"}
RAW: dict[str, Any] = {
    "name": "x",
    "steps": 3,
    "student": {"path": "lab/student"},
    "task": TASK,
    "method": METHOD,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "x.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_overrides_are_toml_or_else_strings(recipe: Path):
    given = ["steps=7", "learner.lr=1e-4", "student.path=lab/teacher"]
    given += ["eval.greedy=false", "student.lora.rank=2", "task.digits=[2]"]
    parsed, text = recipes.read(recipe, given)
    assert (parsed.steps, parsed.learner.lr, parsed.student.path, parsed.eval.greedy) == (7, 1e-4, "lab/teacher", False)
    assert parsed.student.lora == config.LoRA(rank=2)
    assert parsed.task.digits == (2,)  # type: ignore[attr-defined]
    assert text.startswith(TEXT)
    assert all(f"# {override}\n" in text for override in given)


def test_without_overrides_the_text_is_the_file(recipe: Path):
    assert recipes.read(recipe)[1] == TEXT


def test_later_overrides_win(recipe: Path):
    assert recipes.read(recipe, ["steps=4", "steps=5"])[0].steps == 5


@pytest.mark.parametrize("name", recipes.packaged())
def test_resolved_recipes_read_as_themselves(name: str):
    """resolved.json holds every field, and is a recipe again."""
    parsed, _ = recipes.read(name)
    assert recipes.parse(parsed.model_dump(mode="json")) == parsed


def test_configs_are_frozen(recipe: Path):
    parsed, _ = recipes.read(recipe)
    with pytest.raises(ValueError, match="frozen"):
        parsed.steps = 9  # type: ignore[misc]


def test_every_field_at_fault_is_named_once():
    with pytest.raises(ConfigError) as caught:
        recipes.parse(
            RAW
            | {"steps": 0, "student": {}, "task": RAW["task"] | {"digits": [9]}, "method": RAW["method"] | {"beta": -1}}
        )
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[1].rstrip(":") for line in lines] == ["method.beta", "task.digits", "steps", "student.path"]


KEYS = st.sampled_from(["name", "kind", "path", "lora", "rank", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=2) | st.dictionaries(KEYS, x, max_size=3), max_leaves=6
)  # what TOML can hold, and a little more
TABLES = st.sampled_from([*config.Config.model_fields, "extra"])


@given(VALUES, TABLES)
def test_nonsense_is_a_config_error(value: object, table: str):
    """Whatever stands in a table, the answer is a Config or a ConfigError, never another exception."""
    with contextlib.suppress(ConfigError):
        assert isinstance(recipes.parse(RAW | {table: value}), config.Config)


@given(st.text(max_size=12))
def test_any_override_is_taken_or_refused(override: str):
    with contextlib.suppress(ConfigError):
        recipes.read("demo-opd", [override])
