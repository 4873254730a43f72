"""What a comparison asks for, what it refuses, and the statistics of its result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from potstill import comparison, recipes
from potstill.comparison import plan, results
from potstill.errors import ConfigError
from potstill.metrics import bootstrap, crossed_bootstrap
from potstill.run import Run, locked

RECIPE = """\
name = "tiny"
steps = 6
student.path = "lab/student"
teacher.path = "lab/teacher"
task.kind = "arithmetic"
method = {name = "opd", beta = 0.1}
learner = {lr = 1e-3, schedule = "cosine"}
eval = {questions = 8, samples = 2}

[variants]
forward = {method.beta = 0.0, learner.lr = 2e-3}
sft = {method.name = "sft"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def make(recipe: Path, *methods: str, overrides: tuple[str, ...] = (), budget: str | None = None) -> plan.Plan:
    return plan.make(recipe, methods, (0, 1), overrides, budget)


# --- variants -----------------------------------------------------------------------------------------------------


def test_a_variant_is_laid_over_the_recipe_table_by_table(recipe: Path) -> None:
    parsed, text = recipes.read(recipe, variant="forward")
    assert parsed.method.model_dump() == parsed.method.model_copy(update={"beta": 0.0}).model_dump()
    assert (parsed.learner.lr, parsed.learner.schedule) == (2e-3, "cosine")
    assert "# variant forward" in text
    assert recipes.read(recipe)[0].learner.lr == 1e-3, "without a variant: the recipe as it stands"


def test_another_method_takes_nothing_from_the_first(recipe: Path) -> None:
    assert recipes.read(recipe, ["teacher.temperature=0.5"], "sft")[0].method.model_dump() == {
        "name": "sft",
        "source": "teacher",
    }


def test_overrides_win_over_the_variant_and_fields_of_the_entry_over_both(recipe: Path) -> None:
    assert recipes.read(recipe, ["learner.lr=5e-4"], "forward")[0].learner.lr == 5e-4
    found = make(recipe, "forward", "forward:learner.lr=7e-4:beta=1", overrides=("learner.lr=5e-4",))
    assert found.variants["forward"]["learner"]["lr"] == 5e-4
    last = found.variants["forward:learner.lr=7e-4:beta=1"]
    assert (last["learner"]["lr"], last["method"]["beta"]) == (7e-4, 1)


def test_a_method_that_is_no_variant_has_its_defaults_unless_the_recipe_sets_it(recipe: Path) -> None:
    found = make(recipe, "opd", "sampled_kl", "omniopd:similarity=exact")
    assert found.variants["opd"]["method"] == {"name": "opd", "beta": 0.1}
    assert found.variants["sampled_kl"]["method"] == {"name": "sampled_kl"}
    assert found.variants["omniopd:similarity=exact"]["method"] == {"name": "omniopd", "similarity": "exact"}


def test_keys_of_tables_are_meant_as_written(recipe: Path) -> None:
    found = make(recipe, "opd:teacher.path=lab/student:method.beta=1:rollouts.prompts=4:beta=0.2")
    [tables] = found.variants.values()
    assert tables["teacher"]["path"] == "lab/student"
    assert tables["rollouts"]["prompts"] == 4
    assert tables["method"]["beta"] == 0.2


def test_all_variants_are_compared_if_nothing_is_named(recipe: Path) -> None:
    assert make(recipe).labels == ["forward", "sft"]
    assert make(recipe).changes("forward") == [("method.beta", 0.1, 0.0), ("learner.lr", 1e-3, 2e-3)]
    assert make(recipe).changes("sft") == [("method.name", "opd", "sft"), ("method.beta", 0.1, None)]


def test_a_resolved_recipe_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    parsed, _ = recipes.read(recipe, ["seed=3"])
    path = tmp_path / "resolved.json"
    path.write_text(json.dumps(parsed.model_dump(mode="json")))
    again, text = recipes.read(path)
    assert again == parsed
    (tmp_path / "again.toml").write_text(text)
    assert recipes.read(tmp_path / "again.toml")[0] == parsed, "its text is the same recipe in TOML"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "holds no tables"),
        ("a.toml", "variants = 3", "should hold a table for each name"),
        ("a.toml", "variants = {a = 3}", "should hold a table for each name"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        recipes.read(tmp_path / name)


def test_a_variant_that_is_not_there(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="there is no variant 'forwards'; did you mean 'forward'"):
        recipes.read(recipe, variant="forwards")
    with pytest.raises(ConfigError, match=r"has no \[variants\]"):
        recipes.read("demo-opd", variant="forward")


# --- what is asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("0-4", [0, 1, 2, 3, 4]), ("0,2,5", [0, 2, 5]), (" 3, 5-6", [3, 5, 6])])
def test_seeds(text: str, expected: list[int]) -> None:
    assert plan.parse_seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "4-2", "1,,2", "-1", "1.5"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is no list of seeds"):
        plan.parse_seeds(text)


def test_methods_are_split_at_commas_outside_brackets() -> None:
    assert plan.split_methods("a, b:learner.betas=[0.9,0.95]:c=1,d") == ["a", "b:learner.betas=[0.9,0.95]:c=1", "d"]
    assert plan.split_methods("a:student.lora={rank=2,alpha=4},b") == ["a:student.lora={rank=2,alpha=4}", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=400", ("steps", 400)),
        ("rollout_tokens=2e6", ("rollout_tokens", 2_000_000)),
        ("cpu_seconds=1.5", ("cpu_seconds", 1.5)),
    ],
)
def test_budget(text: str, expected: tuple[str, float]) -> None:
    assert plan.parse_budget(text) == expected


@pytest.mark.parametrize("text", ["steps", "steps=0", "steps=1.5", "steps=x", "hours=3", "steps=inf", "steps=nan"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="Write one of steps=N"):
        plan.parse_budget(text)


def test_a_budget_takes_the_place_of_the_recipes(recipe: Path) -> None:
    for tables in make(recipe, "sft", "opd", budget="cpu_seconds=3").variants.values():
        assert "steps" not in tables
        assert recipes.parse(tables).budget.given == ("cpu_seconds", 3)
    for tables in make(recipe, "sft", "opd", budget="steps=3").variants.values():
        assert recipes.parse(tables).steps == 3


@given(st.text(min_size=1))
def test_a_label_makes_a_safe_folder(label: str) -> None:
    name = plan.folder_name(label)
    assert set("/\\: \0") & set(name) == set()


# --- what is refused, before anything is written -------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"methods": ["opdd"]}, "no variant or method 'opdd'; did you mean 'opd'"),
    "a colon without a field": ({"methods": ["opd:beta"]}, "NAME:key=value"),
    "unknown field": ({"methods": ["opd:gamma=1"]}, "opd:gamma=1: .*\n.*method.gamma: there is no field 'gamma'"),
    "label twice": ({"methods": ["opd", "sft", "opd"]}, "names opd twice"),
    "one folder for two": ({"methods": ["opd:teacher.path=lab/teacher", "opd:teacher.path=lab_teacher"]}, "share the folder"),
    "no seeds": ({"seeds": []}, "there are no seeds"),
    "a seed twice": ({"seeds": [1, 1]}, "the same seed is the same run"),
    "a negative seed": ({"seeds": [-1]}, "must be 0 or more"),
    "two budgets": ({"budget": "steps=3,cpu_seconds=4"}, "names two budgets"),
    "a budget and an override": ({"budget": "steps=3", "overrides": ["budget.cpu_seconds=4"]}, "are two budgets"),
    "two budgets by override": ({"overrides": ["budget.cpu_seconds=4"]}, "contradict each other"),
    "against what": ({"against": "opd"}, "--against: there is no variant in this comparison 'opd'"),
    "a seed by override": ({"overrides": ["seed=4"]}, "Use --seeds"),
    "a method by override": ({"overrides": ["method.name=sft"]}, "every variant the same method"),
    "other questions": ({"methods": ["opd", "sft:eval.questions=9"]}, "differ in eval.questions"),
    "another budget": ({"methods": ["opd", "sft:learner.lr=1:method={name='sft'}:budget.cpu_seconds=4"]}, "differ in budget"),
    "another start": ({"methods": ["opd", "sft:student.path=lab/teacher"]}, r"differ in student.path"),
    "longer answers": ({"methods": ["opd", "sft:rollouts.max_tokens=9"]}, r"differ in rollouts.max_tokens"),
    "no questions": ({"overrides": ["eval.questions=0"]}, "forward: eval.questions = 0"),
    "cannot run": ({"overrides": ["learner.warmup=9"]}, "forward: learner.warmup = 9"),
    "no tokens of nobody": ({"methods": ["sft:source=data"], "budget": "teacher_tokens=9"}, "asks no teacher|no teacher"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, recipe: Path, tmp_path: Path) -> None:
    asked, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        comparison.compare(recipe, out=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_variants_and_no_methods(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no \[variants\].*--methods opd,sft"):
        comparison.compare("demo-opd", out=tmp_path / "out")


def test_a_folder_that_holds_something_else_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no comparison"):
        comparison.compare(recipe, out=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_plans_of_one_folder_may_grow_but_not_change(recipe: Path, tmp_path: Path) -> None:
    old = json.loads(json.dumps(make(recipe, "sft").record()))
    grown = plan.make(recipe, ["forward"], [4], (), None).joined(old, tmp_path)
    assert list(grown["variants"]) == ["sft", "forward"]
    assert grown["seeds"] == [0, 1, 4]
    with pytest.raises(ConfigError, match=r"learner.lr \(0.001 there, 0.5 now\)"):
        make(recipe, "sft", overrides=("learner.lr=0.5",)).joined(old, tmp_path)
    with pytest.raises(
        ConfigError, match=r"steps \(6 there, not set now\); budget.cpu_seconds \(not set there, 3.0 now\)"
    ):
        make(recipe, "sft", budget="cpu_seconds=3").joined(old, tmp_path)
    recipe.write_text(RECIPE.replace('sft = {method.name = "sft"}', 'sft = {method = {name = "sft", source = "data"}}'))
    with pytest.raises(ConfigError, match=r"sft: method.source \(not set there, 'data' now\)"):
        make(recipe, "sft").joined(old, tmp_path)
    recipe.write_text(RECIPE.replace("[variants]", "# a remark\n[variants]\nmore = {}"))
    assert list(make(recipe, "sft", "more").joined(old, tmp_path)["variants"]) == ["sft", "more"]


# --- one process at a time ----------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_process_and_let_go_when_it_is_killed(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config="", resolved={}, env={})
    code = f"""
import time
from pathlib import Path
from potstill import Run
with Run(Path({str(run.path)!r})).locked():
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is training"), run.locked():
            raise AssertionError("two at once")
        other.kill()
    with run.locked():
        pass
    with run.locked(), locked(tmp_path, "nobody"):
        pass


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config="", resolved={}, env={})
    assert run.finished is None
    run.finish({"step": 3, "why": "steps"})
    assert run.finished == {"step": 3, "why": "steps"}


# --- statistics ---------------------------------------------------------------------------------------------------


def drawn(rng: np.random.Generator, runs: int, questions: int, a: float, b: float, c: float) -> np.ndarray:
    """Crossed effects with standard deviations a (runs), b (questions), c (cells), around 0."""
    cells = rng.normal(0, c, (runs, questions))
    return rng.normal(0, a, (runs, 1)) + rng.normal(0, b, (1, questions)) + cells


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_equal_scores_have_an_interval_without_width(value: float) -> None:
    assert crossed_bootstrap(np.full((3, 7), value), resamples=200) == (value, value, value)


@given(arrays(float, (1, 6), elements=st.floats(0, 1)))
def test_one_run_is_the_bootstrap_over_questions(scores: np.ndarray) -> None:
    assert crossed_bootstrap(scores, resamples=200) == bootstrap(scores[0], resamples=200)


def test_the_drawn_means_vary_as_the_docstring_says() -> None:
    """Their variance is that of row means / S + of column means / Q + of the remainder / (S Q), exactly."""
    scores = drawn(np.random.default_rng(0), 12, 15, 1.0, 1.0, 3.0)
    rows, columns = scores.mean(1, keepdims=True), scores.mean(0, keepdims=True)
    rest = scores - rows - columns + scores.mean()
    expected = rows.var() / 12 + columns.var() / 15 + rest.var() / 180
    low, high = crossed_bootstrap(scores, level=0.6826895, resamples=100_000)[1:]
    assert (high - low) / 2 == pytest.approx(expected**0.5, rel=0.02)


@pytest.mark.parametrize(("a", "b", "c"), [(0.5, 1, 1), (1, 0.3, 0.3), (0, 1, 0.5)])
def test_coverage_of_new_runs_and_new_questions(a: float, b: float, c: float) -> None:
    rng = np.random.default_rng(1)
    intervals = [crossed_bootstrap(drawn(rng, 10, 40, a, b, c), resamples=400) for _ in range(300)]
    covered = np.mean([i.low <= 0 <= i.high for i in intervals])
    assert 0.88 <= covered <= 0.99


def test_questions_alone_would_be_overconfident_and_two_seeds_are_too_few() -> None:
    rng = np.random.default_rng(2)
    sets = [drawn(rng, 10, 40, 1, 0.3, 0.3) for _ in range(200)]
    alone = np.mean([abs(s.mean()) <= 1.96 * s.mean(0).std() / 40**0.5 for s in sets])
    assert alone < 0.5
    pairs = [crossed_bootstrap(s[:2], resamples=200) for s in sets]
    assert np.mean([i.low <= 0 <= i.high for i in pairs]) < 0.8


def test_pairing_narrows_the_difference() -> None:
    rng = np.random.default_rng(3)
    shared = drawn(rng, 5, 60, 0.1, 1, 0.0)
    a, b = shared + rng.normal(0, 0.1, shared.shape), shared + 0.2 + rng.normal(0, 0.1, shared.shape)
    paired, unpaired = crossed_bootstrap(b - a), crossed_bootstrap(b - a[:, rng.permutation(60)])
    assert paired.high - paired.low < 0.3 * (unpaired.high - unpaired.low)
    assert paired.low > 0


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.zeros((2, 0)), np.full((2, 2), np.nan)])
def test_no_interval_without_scores(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores"):
        crossed_bootstrap(scores)


# --- the result ---------------------------------------------------------------------------------------------------


def test_a_winner_is_named_only_if_the_interval_leaves_out_zero() -> None:
    rng = np.random.default_rng(4)
    base = rng.random((5, 50))
    clear = results.winner({"a": base, "b": base + 0.1 + rng.normal(0, 0.1, base.shape), "c": base - 1}, "avg@4")
    assert (clear["name"], clear["best"], clear["second"]) == ("b", "b", "a")
    assert clear["sentence"].startswith("winner: b in avg@4: b - a = +")
    near = results.winner({"a": base, "b": base + 0.01 + rng.normal(0, 0.5, base.shape)}, "avg@4")
    assert near["name"] is None
    assert near["sentence"].startswith(f"no winner: best {near['best']}, but ")
    assert near["sentence"].endswith("] holds 0")


def test_twins_have_no_winner_and_one_variant_has_none_either() -> None:
    same = np.random.default_rng(5).random((5, 50))
    assert results.winner({"a": same, "b": same}, "avg@4")["sentence"].endswith("+0.0 [+0.0, +0.0] holds 0")
    assert results.winner({"a": same}, "avg@4")["name"] is None


def test_one_seed_is_said_to_vary_no_seeds() -> None:
    one = np.random.default_rng(6).random((1, 50))
    found = results.winner({"a": one, "b": one + 0.1}, "avg@4")
    assert found["name"] == "b"
    assert found["sentence"].endswith("one seed, so seeds were not varied")


def test_curves_join_where_all_runs_were_asked_and_at_their_ends(tmp_path: Path) -> None:
    runs = []
    for seed, end in enumerate((5, 7)):
        run = Run.create(tmp_path / str(seed), config="", resolved={}, env={})
        for step in range(1, end + 1):
            run.append("metrics", {"step": step, "tokens": 10, "dropped": 1})
        for step in {0, 2, 4, 6, end}:
            if step <= end:
                accuracy = {"value": step / 10 + seed / 2}
                run.append(
                    "evals", {"step": step, "name": "sampled", "samples": 2, "avg@2": accuracy, "cpu_s": step / 4.0}
                )
        runs.append(run)
    found = results.curves(runs)
    assert [p["x"] for p in found["steps"]] == [0, 2, 4, 6], "two in the middle, and the mean of 5 and 7"
    assert [p["x"] for p in found["rollout_tokens"]] == [0, 22, 44, 66]
    assert [p["x"] for p in found["cpu_seconds"]] == [0, 0.5, 1, 1.5]
    assert found["steps"][-1] | {"low": 0.5, "high": 1.2} == found["steps"][-1]
    assert found["steps"][-1]["y"] == pytest.approx(0.85)
