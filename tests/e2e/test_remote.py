"""Runs whose teacher is behind a server: whole answers, imitation, rounds, and what is logged of its manners."""

from pathlib import Path
from typing import Any

import pytest
from tests import servers
from tests.e2e.small import parsed
from tests.servers import Completions, serving

from potstill import loop
from potstill.ledger import summary
from potstill.models import load

EXACT = "method={name='omniopd', similarity='exact', alpha=0.0, %s}"
RUNS = {
    "sft": ("method.name=sft",),
    "phased": ("method={name='mix', phased={share=1.0}}", "rollouts={prompts=2, group=2}"),
    "dagger": ("method={name='dagger', chunks=3, chunk_length=4}",),
    "omniopd": ("method={name='omniopd', chunks=2, continuations=5, chunk_length=3, similarity='exact', narrow=0.21}",),
}


def behind(url: str, *overrides: str, **fields: Any) -> Any:
    more = "".join(f", {key}={value!r}" for key, value in fields.items())
    return parsed("steps=3", f"teacher={{kind='http', base_url='{url}/v1', tokenizer='lab/teacher'{more}}}", *overrides)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_asks_for_everything_once(name: str, tmp_path: Path):
    with serving(Completions(load("lab/teacher"))) as server:
        run = loop.train(behind(server.url, *RUNS[name]), tmp_path)
        assert run.metrics[-1]["step"] == 3
        bodies = [s.body for s in server.answered if "seed" in s.body]
        paid = [(str(body["prompt"]), body["seed"] + i) for body in bodies for i in range(body["n"])]
        assert paid
        assert len(paid) == len(set(paid))
        [row] = summary(run.path / "ledger.sqlite")
        logged = sum(r["teacher/read"] + r["teacher/written"] for r in run.metrics)
        assert logged == row["read"] + row["written"]


def test_asking_one_after_the_other_is_cheaper(tmp_path: Path):
    method, written = (
        "method={name='omniopd', chunks=3, continuations=6, chunk_length=2, similarity='exact', narrow=%s}",
        [],
    )
    with serving(Completions(load("lab/teacher"))) as server:
        for narrow in (0, 0.21):
            run = loop.train(behind(server.url, method % narrow, f"name=n{narrow}"), tmp_path)
            written.append(sum(r["teacher/written"] for r in run.metrics))
    assert written[1] < 0.6 * written[0]


@pytest.mark.parametrize("most", [1, 4_000])
def test_whole_answers_end_with_the_budget(most: int, tmp_path: Path):
    with serving(Completions(load("lab/teacher"))) as server:
        run = loop.train(behind(server.url, "method.name=sft", "steps=60", max_teacher_tokens=most), tmp_path)
        assert run.finished is not None
        assert run.finished["early"]
        assert "max_teacher_tokens" in run.finished["why"]
        assert (run.finished["step"] > 2) == (most > 1)
        latest = run.latest()
        assert latest is not None
        assert latest[0] == run.finished["step"]


def test_manners_are_counted_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every third answer of a chat model is a refusal, every fourth is wrapped."""
    pytest.importorskip("openai")
    monkeypatch.setenv("PLANTED_KEY", "sk-planted")

    def speak(_: Any, i: int) -> str:
        return "I'm sorry, I can't help with that." if i % 3 == 2 else "Sure, here it is:\n\n7" if i % 4 == 3 else "7"

    table = "teacher={kind='chat', provider='openai', model='m', base_url='%s/v1', key_env='PLANTED_KEY', max_unanswered=1.0}"
    method = "method={name='omniopd', chunks=2, continuations=4, chunk_length=2, similarity='exact'}"
    with serving(servers.openai(speak)) as server:
        run = loop.train(parsed("steps=1", table % server.url, method), tmp_path)
    [row] = run.metrics
    assert row["teacher/accepted"] > 0
    assert row["teacher/repaired"] > 0
    assert row["teacher/rejected"] > 0
    assert row["teacher/unanswered"] == 0
    [counted] = summary(run.path / "ledger.sqlite")
    assert counted["answers"] == row["teacher/accepted"] + row["teacher/repaired"] + row["teacher/rejected"]


def test_a_step_can_use_one_rollout_several_times(tmp_path: Path):
    method = "method={name='omniopd', chunks=2, continuations=2, chunk_length=2, similarity='exact', max_ratio=1.5}"
    run = loop.train(parsed("steps=2", method, "teacher.text_only=true", "learner.updates=3"), tmp_path)
    assert all(row["ratio_max"] > 1 for row in run.metrics)


def test_the_student_is_asked_about_itself_and_one_after_the_other(tmp_path: Path):
    own = "chunks=3, continuations=5, chunk_length=2, baseline='own', alternatives=2, narrow=0.2"
    with serving(Completions(load("lab/teacher"))) as server:
        run = loop.train(behind(server.url, EXACT % own), tmp_path)
    assert all(0 < row["baseline"] < 1 for row in run.metrics)
    [row] = summary(run.path / "ledger.sqlite")
    assert sum(r["teacher/written"] for r in run.metrics) == row["written"]  # the student's own cost nothing


def test_a_later_round_that_brings_nothing_neither_hangs_nor_stops_the_run(tmp_path: Path, monkeypatch: Any):
    """The teacher answers twice at every place, and refuses ever after."""
    pytest.importorskip("openai")
    monkeypatch.setenv("PLANTED_KEY", "sk-planted")
    speak = servers.openai(lambda _, i: "REFUSED" if i > 1 else str(i))
    table = "teacher={kind='chat', provider='openai', model='m', base_url='%s/v1', key_env='PLANTED_KEY'}"
    with serving(speak) as server:
        some = "chunks=2, continuations=6, chunk_length=2, narrow=0.2"
        run = loop.train(parsed("steps=1", table % server.url, EXACT % some), tmp_path)
    assert run.metrics[0]["audited"] > 0
    assert run.metrics[0]["teacher/unanswered"] >= 0


def test_words_begin_chunks(tmp_path: Path):
    """The lab writes no white space: anchors within a chunk of the beginning move there, the others stay."""
    method = EXACT % "chunks=2, continuations=1, chunk_length=4, whole_words=true"
    run = loop.train(parsed("steps=1", method, "teacher.text_only=true"), tmp_path)
    assert run.metrics[0]["audited"] > 0
