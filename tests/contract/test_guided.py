"""Answers that start with given tokens, and controls of a teacher that writes."""

import asyncio
from typing import Any

import pytest
import torch
from tests import tiny

from potstill.decode import Decoding
from potstill.samplers.base import Continuing
from potstill.samplers.hf import HFSampler
from potstill.teachers.hf import HFTeacher
from potstill.types import Ask, Rollout, Turn, Wants

STUDENT = tiny.tokens(tiny.byte_level(), "student")
PROMPTS = [tiny.prompt("Why? " * (i + 1), id=f"p{i}") for i in range(3)]
TURN = Turn(seed=1, step=2, max_tokens=12)


def written(family: str, guides: list[tuple[int, ...]] | None = None, **options: Any) -> list[list[Rollout]]:
    by = HFSampler(tiny.loaded(family), **options)
    assert isinstance(by, Continuing)
    return asyncio.run(by.sample(PROMPTS, 2, TURN, guides=guides or ()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_guided_answer_goes_on_from_its_guide(family: str) -> None:
    guides = [(9, 8, 7), (), (5,)]
    made = tiny.loaded(family)
    for group, guide in zip(written(family, guides), guides, strict=True):
        for r in group:
            n = len(guide)
            assert r.response_ids[:n] == guide
            assert r.guided == n
            assert len(r.response_ids) <= TURN.max_tokens
            assert r.old_logp is not None
            assert r.entropy is not None
            assert r.old_logp[:n] == r.entropy[:n] == (0.0,) * n
            logp = tiny.plain_logp(made.model, r.prompt_ids, r.response_ids, STUDENT.vocab)
            own = logp.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(r.old_logp[n:]), own[n:], atol=1e-4, rtol=1e-4)
            assert "".join(r.pieces) == STUDENT.tokenizer.decode(list(r.response_ids), skip_special_tokens=True)


def test_the_longest_answer_includes_the_guide() -> None:
    guides = [tuple(range(5, 16))] * 3
    assert {len(r.response_ids) for group in written("llama", guides) for r in group} == {12}


def test_no_guide_is_no_difference() -> None:
    assert written("llama") == written("llama", [(), (), ()])


def test_shuffled_continuations_are_those_of_another_prompt() -> None:
    rollouts = [tiny.rollout(STUDENT, "the cat sat on the mat", ask=p, seed=i) for i, p in enumerate(PROMPTS)]
    asks = [
        Ask(rollout=r, view=r.prompt, wants=Wants.TEXT, start=start, length=4, n=2)
        for r, starts in zip(rollouts, [(1, 3), (2,), (0, 4)], strict=True)
        for start in starts
    ]
    plain, shuffled = (
        asyncio.run(HFTeacher(tiny.loaded(seed=1), STUDENT, decoding=Decoding(), shuffled=on).feedback(asks))
        for on in (False, True)
    )
    texts = [f.texts for f in plain]
    assert [f.texts for f in shuffled] == [texts[2], texts[2], texts[3], texts[0], texts[1]]
    assert [f.ask for f in shuffled] == asks
    assert [f.usage for f in shuffled] == [f.usage for f in plain]
