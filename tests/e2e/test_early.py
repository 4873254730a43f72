"""A remote teacher hears of an answer as soon as it is written, while others still are; and no number changes by it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.small import parsed
from tests.servers import Completions, serving

from potstill import loop
from potstill.build import build
from potstill.decode import Decoding
from potstill.models import load
from potstill.samplers.hf import HFSampler
from potstill.teachers.asking import Asking
from potstill.types import Prompt, Rollout, Turn
from potstill.writing import Writing

METHODS = {
    "omniopd": "method={name='omniopd', chunks=2, continuations=3, chunk_length=3, similarity='exact'}",
    "sampled_kl": "method.name=sampled_kl",
    "of common beginnings": (
        "method={name='omniopd', chunks=2, continuations=3, chunk_length=1, similarity='exact', scheduler='uniform'}"
    ),
}


def behind(url: str, *overrides: str, **fields: Any) -> Any:
    more = "".join(f", {key}={value!r}" for key, value in fields.items())
    table = f"teacher={{kind='http', base_url='{url}/v1', tokenizer='lab/teacher'{more}}}"
    return parsed("steps=2", "rollouts={prompts=3, group=6, max_tokens=48}", table, *overrides)


def train(config: Any, at: Path) -> list[dict[str, Any]]:
    times = ("cpu_s", "time/sample", "time/teacher", "time/learn", "wall_s", "memory/peak_gb")
    return [{k: v for k, v in row.items() if k not in times} for row in loop.train(config, at).metrics]


@pytest.mark.parametrize("name", METHODS)
def test_asking_early_changes_no_number(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, asked = {}, {}
    for early in (True, False):
        if not early:
            monkeypatch.setattr(Asking, "expect", lambda self, asks: None)
        with serving(Completions(load("lab/teacher"))) as server:
            chance = {} if name == "sampled_kl" else {"temperature": 3.0}
            rows[early] = train(behind(server.url, METHODS[name], f"name=early-{early}", **chance), tmp_path)
            asked[early] = sorted(str((s.body["prompt"], s.body.get("seed"))) for s in server.answered if s.body)
    assert rows[True] == rows[False]
    assert asked[True] == asked[False]


def test_the_end_of_a_budget_is_no_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The answers that are learnt from in the last step are not those that ended first."""
    rows = {}
    for early in (True, False):
        if not early:
            monkeypatch.setattr(Asking, "expect", lambda self, asks: None)
        with serving(Completions(load("lab/teacher"))) as server:
            fields = {"max_teacher_tokens": 400, "in_flight": 1, "temperature": 3.0}
            config = behind(server.url, METHODS["of common beginnings"], "steps=3", f"name=early-{early}", **fields)
            rows[early] = train(config, tmp_path)
    assert rows[True] == rows[False]
    assert len(rows[True]) == 1


def test_questions_are_asked_before_feedback_is_asked_for(tmp_path: Path):
    """Of the answers that are written, none is left to ask about."""
    with serving(Completions(load("lab/teacher"))) as server:
        config = behind(server.url, METHODS["omniopd"])
        parts = build(config, tmp_path)
        assert isinstance(parts.teacher, Asking)

        async def two_halves(teacher: Asking) -> int:
            written = await Writing(config, parts).of(1, 0.0)
            await asyncio.gather(*teacher._begun)
            before = len(server.answered)
            asks = [ask for group in written.groups for r in group for ask in parts.method.asks(r)]
            assert len(await teacher.feedback(asks)) == len(asks)
            return before

        assert asyncio.run(two_halves(parts.teacher)) == len(server.answered) > 12


PROMPTS = [Prompt(id=str(i), messages=({"role": "user", "content": f"{i}*7"},), answer=None) for i in range(8)]
TURN = Turn(seed=0, step=1, done=0.0, max_tokens=100)


def test_answers_are_heard_of_while_others_are_written():
    """One prompt's answers have room for a single token, those of the others for a hundred."""
    heard = list[tuple[Rollout, float]]()
    sampler = HFSampler(load("lab/student"), decoding=Decoding(temperature=3.0))
    guides = [(5,) * 99, *[()] * 7]

    async def write() -> tuple[list[list[Rollout]], float]:
        done = await sampler.sample(
            PROMPTS, 2, TURN, guides=guides, ended=lambda r: heard.append((r, time.monotonic()))
        )
        return done, time.monotonic()

    began = time.monotonic()
    groups, end = asyncio.run(write())
    assert {r.key: r for r, _ in heard} == {r.key: r for group in groups for r in group}
    assert len(heard[-1][0].response_ids) > 40
    assert heard[0][0].prompt.id == "0"
    assert heard[-1][1] <= end
    assert heard[-1][1] - heard[0][1] > 0.2 * (end - began)


def test_a_writer_that_nobody_waits_for_stops():
    """At the next answer that is over, so that the process can end."""
    sampler, heard = HFSampler(load("lab/student"), decoding=Decoding(temperature=3.0)), list[Rollout]()

    async def give_up() -> None:
        def ended(r: Rollout) -> None:
            heard.append(r)
            task.cancel()

        task = asyncio.create_task(sampler.sample(PROMPTS, 8, TURN, ended=ended))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())  # waits for the thread
    assert 1 <= len(heard) < 32
