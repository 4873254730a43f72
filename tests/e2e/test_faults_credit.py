"""Planted faults of verdicts, groups, references, budgets and token selection: refused before a weight is loaded."""

import json
from pathlib import Path

import pytest
from tests.e2e.small import RECIPE, Command, command, recipe, refused

WITHOUT = {
    "teacher": 'teacher.path = "lab/teacher"\n',
    "steps": "steps = 2\n",
}
FAULTS = {
    "lam below 1": (["method={name='sgopd', lam=0.9}"], "method.lam = 0.9", "greater than or equal to 1"),
    "beta below 0": (["method={name='sgopd', beta=-0.1}"], "method.beta = -0.1", "greater than or equal to 0"),
    "a field within a table": (["method={name='sgopd', phased={shar=1}}"], "phased.shar", "did you mean 'share'?"),
    "phases out of order": (["method={name='sgopd', phased={share=1, flat=0.6, end=0.2}}"], "flat = 0.6", "end = 0.2"),
    "grpo of one answer": (["-teacher", "method.name=grpo"], "grpo", "rollouts.group = 1", "rollouts.group = 8"),
    "sgopd by groups of one": (
        ["method={name='sgopd', sign='group'}"],
        "sgopd",
        "rollouts.group = 1",
        "sign = 'outcome'",
    ),
    "mix of one answer": (["method={name='mix', alpha=0.5}"], "mix", "rollouts.group = 1"),
    "no base": (
        ["method={name='exopd', reference='base'}"],
        'reference = "base"',
        "Add [reference]",
        '"start"',
    ),
    "a base without effect": (["method.name=exopd", "reference.path=lab/teacher"], "[reference] would have no effect"),
    "a base with another tokenizer": (
        ["method={name='exopd', reference='base'}", "reference.path=lab/foreign"],
        "do not share a tokenizer",
    ),
    "two ends": (["budget.rollout_tokens=100"], "steps and budget.rollout_tokens contradict each other", "give steps"),
    "three ends": (["budget={rollout_tokens=100, cpu_seconds=1}"], "steps and budget.rollout_tokens and budget.cpu_s"),
    "no end": (["-steps"], "nothing says when the run ends", "cpu_seconds"),
    "a budget nobody spends": (
        ["-steps", "-teacher", "budget.teacher_tokens=100", "method.name=grpo", "rollouts.group=2"],
        "budget.teacher_tokens may never end a run of grpo",
        "Give steps",
    ),
    "a budget that may never be spent": (
        ["-steps", "method={name='grpo', phased={share=0.5}}", "rollouts.group=2", "budget.teacher_tokens=100"],
        "budget.teacher_tokens may never end a run of grpo",
        "budget.rollout_tokens",
    ),
    "a schedule without its share": (["method={name='mix', phased={end=0.3}}"], "method.phased.share: missing"),
    "one answer written many times": (
        ["method={name='sgopd'}", "teacher.temperature=0"],
        "teacher.temperature = 0",
        "or ask once",
    ),
    "alternatives that nobody asks for": (
        ["method={name='omniopd', chunk_length=2, alternatives=3}"],
        "method.alternatives = 3",
        'set baseline = "own"',
    ),
    "a baseline of one chunk": (
        ["method={name='omniopd', chunk_length=2, chunks=1, baseline='mean'}"],
        "leave only one",
        "Raise either",
    ),
    "a ratio that is always 1": (
        ["method={name='omniopd', chunk_length=2, max_ratio=2.0}"],
        "method.max_ratio = 2",
        "learner.updates = 1",
    ),
    "a deviation that is never reached": (
        ["method={name='omniopd', chunk_length=2, continuations=4, narrow=0.1}"],
        "method.narrow = 0.1",
        "after 2 texts",
        "0.194",
    ),
    "a deviation of nothing to save": (
        ["method={name='omniopd', chunk_length=2, continuations=2, narrow=0.2}"],
        "method.narrow = 0.2",
        "remove narrow",
    ),
    "shuffled texts one after the other": (
        ["method={name='omniopd', chunk_length=2, narrow=0.2}", "teacher.shuffled=true"],
        "teacher.shuffled",
        "Set method.narrow = 0",
    ),
    "tokens chosen of a teacher's": (
        ["method={name='dagger', chunk_length=2}", "select.by=entropy"],
        "[select] keeps some",
        "dagger",
    ),
    "a horizon for verdicts": (
        ["-teacher", "method.name=grpo", "rollouts={group=2, horizon={start=8}}"],
        "rollouts.horizon",
        "learns from verdicts",
    ),
    "a horizon for the teacher's answers": (["method={name='sgopd'}", "rollouts.horizon={start=8}"], "(phased)"),
    "a sign kept of nothing": (["method={name='sgopd', keep_sign=true}"], "keep_sign", "start"),
    "a gate that never opens": (["method={name='sgopd', margin=10}"], "margin = 10.0", "limit = 10.0"),
    "a field of [reference] without effect": (
        ["method={name='exopd', reference='base'}", "reference={path='lab/teacher', temperature=0.5}"],
        "reference.temperature",
        "there is no field",
    ),
    "selection without scores": (
        ["method={name='grpo', phased={share=0.5, loss='topk'}}", "rollouts.group=2", "select={by='divergence'}"],
        "select.by = 'divergence'",
    ),
    "shuffled with itself": (
        [
            "method={name='omniopd', chunk_length=4}",
            "teacher={path='lab/teacher', shuffled=true}",
            "rollouts.prompts=1",
        ],
        "rollouts.prompts = 1",
    ),
    "a teacher for grpo": (["method.name=grpo", "rollouts.group=2"], "asks no teacher", "Remove the table"),
    "examples without a teacher": (
        ["-teacher", "method={name='grpo', phased={share=0.5}}", "rollouts.group=2"],
        "grpo learns from a teacher (its answers)",
    ),
    "resampling without groups": (["rollouts.resample=2"], "rollouts.resample = 2", "rollouts.group = 1"),
    "resampling without verdicts": (["rollouts={resample=2, group=2}"], "a method that uses verdicts (opd)"),
    "a horizon behind the end": (["rollouts.horizon={start=48}"], "rollouts.horizon.start = 48", "48 tokens"),
    "entropies of the teacher's answers": (["method.name=sft", "select={by='entropy'}"], "select.by = 'entropy'"),
    "scores that nobody asks for": (
        ["method={name='omniopd', chunk_length=4}", "teacher.text_only=true", "select={by='tip'}"],
        "select.by = 'tip'",
        "by = 'entropy'",
    ),
    "shuffled scores": (["teacher.shuffled=true"], "teacher.shuffled", "omniopd"),
    "a ratio that cannot be": (["method={name='sampled_kl', clip_low=1.0}"], "method.clip_low = 1.0", "less than 1"),
}


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str]) -> Command:
    return command(capsys)


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_and_leaves_nothing(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, potstill: Command):
    overrides, *words = FAULTS[fault]
    text = RECIPE
    for name in [o[1:] for o in overrides if o.startswith("-")]:
        text = text.replace(WITHOUT[name], "")
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, text)
    for verb in ("check", "train"):
        refused(potstill(verb, "tiny.toml", *[o for o in overrides if not o.startswith("-")]), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", ["sgopd", "opdvr", "r2opd", "grpo", "grpd", "rlsd", "mix"])
def test_verdicts_without_answers(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, potstill: Command):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}*2=", **({"answer": str(2 * i)} if i % 2 else {})} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe(tmp_path, RECIPE if method != "grpo" else RECIPE.replace(WITHOUT["teacher"], ""))
    task = ("task={kind='jsonl', path='data.jsonl'}", "eval.questions=0", f"method={{name='{method}'}}")
    ended = potstill("train", "tiny.toml", *task, "rollouts={prompts=4, group=2}")
    refused(ended, f"{method} as set here needs a verdict", "no answer to compare with", "such as sampled_kl")
    assert not (tmp_path / "runs").exists()
