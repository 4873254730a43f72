"""What happens in a step between sampling and learning: horizons, replaced prompts, budgets, teacher answers."""

from pathlib import Path
from typing import Any

import pytest
from tests.e2e.small import parsed

from potstill import loop
from potstill.build import Parts, build
from potstill.config import Config
from potstill.record import degenerate
from potstill.spent import Spent
from potstill.types import Rollout
from potstill.writing import Writing

Step = tuple[Config, Parts]


def step_of(*overrides: str) -> Step:
    config = parsed(*overrides)
    return config, build(config)


async def groups(
    config: Config, parts: Parts, step: int = 1, done: float = 0.0
) -> tuple[list[list[Rollout]], list[Rollout]]:
    written = await Writing(config, parts).of(step, done)
    return written.groups, written.dropped


def run(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


def test_an_answer_cut_at_the_horizon_has_no_verdict():
    config, parts = step_of("rollouts={prompts=6, horizon={start=20, grow=28}}", "steps=4")
    short, _ = run(groups(config, parts, 1))
    longest = max(len(r.response_ids) for group in short for r in group)
    assert longest == 20
    for group in short:
        for r in group:
            assert (r.verdict is None) == (r.finish == "length")
    whole, _ = run(groups(config, parts, 2))
    assert all(r.verdict is not None for group in whole for r in group)


def test_an_answer_cut_at_the_limit_is_wrong_as_ever():
    config, parts = step_of("rollouts={prompts=4, max_tokens=5}")
    made, _ = run(groups(config, parts))
    assert [r.verdict for group in made for r in group] == [0.0] * 4


def test_prompts_that_teach_nothing_are_replaced_and_paid_for():
    rollouts = "rollouts={prompts=8, group=4%s}"
    config, parts = step_of("method.name=grpo", "teacher=NONE", rollouts % "")
    plain, nothing = run(groups(config, parts))
    assert nothing == []
    again = config.model_copy(update={"rollouts": config.rollouts.model_copy(update={"resample": 3})})
    got, dropped = run(groups(again, parts))
    kept = [i for i, group in enumerate(plain) if not degenerate(group)]
    assert 0 < len(kept) < 8
    assert [got[i] for i in kept] == [plain[i] for i in kept]
    assert sum(map(degenerate, got)) < sum(map(degenerate, plain))
    assert len({group[0].prompt.id for group in got}) == 8
    first = sum(len(r.response_ids) for i in range(8) if i not in kept and got[i] != plain[i] for r in plain[i])
    assert sum(len(r.response_ids) for r in dropped) >= first > 0


def test_a_budget_ends_the_run_with_the_step_that_reaches_it(tmp_path: Path):
    run_ = loop.train(parsed("steps=NONE", "budget.rollout_tokens=300", "learner.schedule=linear"), tmp_path)
    tokens = [row["tokens"] for row in run_.metrics]
    assert sum(tokens[:-1]) < 300 <= sum(tokens)
    assert run_.finished is not None
    assert (run_.finished["rollout_tokens"], run_.finished["why"]) == (sum(tokens), "rollout_tokens")
    assert run_.evals[-1]["step"] == len(tokens) == run_.finished["step"]
    spent = [0, *tokens]
    rates = [1e-3 * (1 - sum(spent[: i + 1]) / 300) for i in range(len(tokens))]
    assert [row["lr"] for row in run_.metrics] == pytest.approx(rates)
    assert [row["done"] for row in run_.metrics] == pytest.approx(
        [min(sum(tokens[: i + 1]) / 300, 1) for i in range(len(tokens))], abs=1e-6
    )


def test_teacher_tokens_are_a_budget_too(tmp_path: Path):
    run_ = loop.train(parsed("steps=NONE", "budget.teacher_tokens=400"), tmp_path)
    read = [row["teacher/read"] + row["teacher/written"] for row in run_.metrics]
    assert sum(read[:-1]) < 400 <= sum(read)


def test_what_is_spent_survives_a_stop():
    config = parsed("steps=NONE", "budget.rollout_tokens=1000")
    row = {"tokens": 90, "dropped": 10, "teacher/read": 7, "teacher/written": 3, "cpu_s": 1.5}
    spent = Spent(config, [row, row | {"cpu_s": 2.5}])
    assert (spent.steps, spent.rollout_tokens, spent.teacher_tokens, spent.cpu_s, spent.share) == (2, 200, 20, 2.5, 0.2)


def test_teacher_answers_come_first_and_then_go(tmp_path: Path):
    method = "method={name='sgopd', phased={share=1.0, flat=0.4, end=0.6, tries=2}}"
    run_ = loop.train(parsed("steps=5", method), tmp_path)
    first, last = run_.metrics[0], run_.metrics[-1]
    assert first["examples/share"] == first["examples/found"] == 1
    assert first["teacher/written"] > 1.5 * first["tokens"]  # two tries for each answer that is kept
    assert first["example_loss"] > 0
    assert "examples/share" not in last
    assert last["teacher/written"] == 0
    assert [r["author"] for r in run_.rollouts(1)] == ["teacher"] * 4
    assert [r["author"] for r in run_.rollouts(5)] == ["student"] * 4


def test_what_the_teacher_wrote_for_replaced_prompts_is_paid_for(tmp_path: Path):
    method = "method={name='grpo', phased={share=0.9, mode='prefix', tries=1}}"
    rollouts = "rollouts={prompts=4, group=2, resample=%d}"
    plain, again = (
        loop.train(parsed("steps=1", f"name=r{n}", "eval.questions=0", method, rollouts % n), tmp_path).metrics[0]
        for n in (0, 2)
    )
    assert again["dropped"] > 0
    assert again["teacher/written"] > plain["teacher/written"]


def test_a_prefix_of_the_teacher_is_marked(tmp_path: Path):
    method = "method={name='sgopd', phased={share=0.5, mode='prefix'}}"
    run_ = loop.train(parsed("steps=1", method), tmp_path)
    rows = run_.rollouts(1)
    assert all(r["author"] == "student" for r in rows)
    assert any(4 <= r["guided"] <= 24 for r in rows)
    for r in rows:
        assert [w == 0 for w in r["weight"]] == [t < r["guided"] for t in range(len(r["weight"]))]
        assert r["imitate"] is None or [w > 0 for w in r["imitate"]] == [w == 0 for w in r["weight"]]
    assert run_.metrics[0]["examples/found"] == sum(r["guided"] > 0 for r in rows) / len(rows)
    assert run_.metrics[0]["mismatch"] < 1e-4  # old_logp of what the student wrote is the learner's, behind any prefix


GROUPS = "rollouts={prompts=2, group=4}"
SAME = {
    "alpha = 1 is sampled_kl": (("method={name='mix', alpha=1.0}",), ("method.name=sampled_kl",)),
    "alpha = 0 is grpo": (("method={name='mix', alpha=0.0}", "teacher=NONE"), ("method.name=grpo", "teacher=NONE")),
    "lam = beta = 1 is sampled_kl": (
        ("method={name='sgopd', lam=1.0, beta=1.0, phased={share=0.0}}",),
        ("method.name=sampled_kl",),
    ),
    "lam = beta from the start is exopd": (
        ("method={name='sgopd', lam=1.25, beta=1.25, reference='start', phased={share=0.0}}",),
        ("method.name=exopd",),
    ),
    "lam = 1, beta = 0 is opdvr": (
        ("method={name='sgopd', lam=1.0, beta=0.0, sign='outcome', phased={share=0.0}}",),
        ("method.name=opdvr",),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_runs_of_the_same_method_under_two_names_are_the_same_to_the_bit(name: str, tmp_path: Path):
    one, other = (
        loop.train(parsed("steps=3", GROUPS, "eval.questions=0", f"name=run{i}", *overrides), tmp_path).metrics
        for i, overrides in enumerate(SAME[name])
    )
    for a, b in zip(one, other, strict=True):
        shared = [key for key in a.keys() & b.keys() if not key.startswith("time/") and key != "cpu_s"]
        assert {"loss", "grad_norm", "verdict", "ratio_max", "credit"} <= set(shared)
        assert {key: a[key] for key in shared} == {key: b[key] for key in shared}
    assert any(row["grad_norm"] > 0 for row in one)


def test_off_policy_the_teacher_writes_and_the_student_is_asked_how_likely_that_was(tmp_path: Path):
    run_ = loop.train(parsed("steps=2", "method.name=sampled_kl", "rollouts={prompts=4, off_policy=true}"), tmp_path)
    first = run_.metrics[0]
    assert [r["author"] for r in run_.rollouts(1)] == ["teacher"] * 4
    assert first["verdict"] == 1.0  # the teacher is nearly always right, the student hardly ever
    assert first["mismatch"] < 1e-4  # what the student says of it is what the learner computes
    assert first["teacher/written"] == first["tokens"]
    assert first["teacher_kl"] < 0  # on the teacher's own tokens the teacher is the likelier one
    assert first["entropy"] > 0
