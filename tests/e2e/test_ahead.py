"""Writing one step ahead: by the student of one update ago, in another thread, with the same numbers every time."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.e2e.small import parsed

from potstill import loop, models
from potstill.build import build
from potstill.checks import check
from potstill.errors import ConfigError
from potstill.run import Run
from potstill.samplers.ahead import AheadSampler
from potstill.writing import Writing

AHEAD = "rollouts={prompts=4, max_tokens=24, ahead=true}"
NOW = "rollouts={prompts=4, max_tokens=24}"
FAST = ("method.name=sampled_kl", "eval.questions=0", "learner.lr=0.01", "save={every=4, rollouts_every=1}")
TIMES = ("time/", "cpu_s")


def numbers(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in run.metrics]


def train(root: Path, *overrides: str, resume: bool = False) -> Run:
    return loop.train(parsed(*FAST, *overrides), root, resume=resume)


def kept(run: Run, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("ahead"), "steps=6", AHEAD)


def test_answers_are_one_update_old_but_behind_a_checkpoint(run: Run) -> None:
    assert [row["lag"] for row in run.metrics] == [0, 1, 1, 1, 0, 1]
    assert [kept(run, step)[0]["policy_version"] for step in (1, 2, 3, 5)] == [0, 0, 1, 4]


def test_the_second_step_is_written_by_the_initial_student(run: Run) -> None:
    start = models.load("lab/student")
    for row in kept(run, 2):
        prompt = models.chat.prompt_ids(start.tokens.tokenizer, loop_prompt(row))
        ids = tuple(start.tokens.tokenizer.encode("".join(row["pieces"]), add_special_tokens=False))
        ids += start.tokens.eos[:1] * (len(row["pieces"]) - len(ids))
        want = tiny.plain_logp(start.model, prompt, ids, start.tokens.vocab).gather(-1, torch.tensor(ids)[:, None])
        torch.testing.assert_close(torch.tensor(row["old_logp"]), want[:, 0], atol=2e-4, rtol=1e-3)


def loop_prompt(row: dict[str, Any]) -> Any:
    from potstill.types import Prompt

    return Prompt(id=row["id"], messages=tuple(row["messages"]))


def test_the_ratio_tells_how_old_they_are(run: Run, tmp_path: Path) -> None:
    old, new = (
        [row["mismatch"] for row in run.metrics],
        [row["mismatch"] for row in train(tmp_path, "steps=3", NOW).metrics],
    )
    assert max(new) < 1e-5
    assert max(old[0], old[4]) < 1e-5
    assert min(old[1], old[2], old[3], old[5]) > 1e-3


def test_numbers_do_not_depend_on_which_thread_is_faster(run: Run, tmp_path: Path) -> None:
    assert numbers(train(tmp_path, "steps=6", AHEAD)) == numbers(run)


def test_a_resumed_run_goes_on_as_if_nothing_had_been(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stops:
        def step(self, row: Any) -> None:
            if row["step"] == 5:
                raise KeyboardInterrupt

        def evaluation(self, row: Any) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        loop.train(parsed(*FAST, "steps=6", AHEAD), tmp_path, watch=Stops())
    assert numbers(train(tmp_path, "steps=6", AHEAD, resume=True)) == numbers(run)


def test_it_writes_while_the_learner_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(*FAST, "steps=2", AHEAD)
    parts = build(config, tmp_path)
    assert isinstance(parts.sampler, AheadSampler)
    began, inner = threading.Event(), parts.sampler._inner.sample

    async def sample(*args: Any, **kwargs: Any) -> Any:
        began.set()
        return await inner(*args, **kwargs)

    monkeypatch.setattr(parts.sampler._inner, "sample", sample)

    async def step() -> tuple[bool, int]:
        writing = Writing(config, parts)
        await writing.begin(1, 0.0)
        return began.wait(10), (await writing.of(1, 0.0)).lag  # this thread waits and gives way to nobody

    assert asyncio.run(step()) == (True, 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("method.name=sft",), "student's answers alone"),
        (("method={name='sgopd', phased={share=0.5}}",), "student's answers alone"),
        (("method={name='omniopd', chunks=2, chunk_length=3}", "teacher.text_only=true"), "method.max_ratio"),
    ],
)
def test_what_cannot_be_written_ahead_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(parsed("rollouts={prompts=4, group=2, ahead=true}", *overrides))


def test_omniopd_weighs_old_answers_by_its_ratio(tmp_path: Path) -> None:
    method = "method={name='omniopd', chunks=2, continuations=2, chunk_length=3, similarity='exact', max_ratio=2}"
    run = train(tmp_path, "steps=3", AHEAD, method, "teacher.text_only=true")
    assert abs(run.metrics[1]["ratio_max"] - 1) > 1e-3
    assert run.metrics[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
