"""Questions to a teacher, and its answers, as contract tests put them."""

import asyncio
from typing import Any

from potstill.types import Ask, Feedback, Rollout, Wants


def answers(by: Any, *asks: Ask) -> list[Feedback]:
    """What a teacher says."""
    return asyncio.run(by.feedback(asks))


def score(wants: Wants, r: Rollout, **fields: Any) -> Ask:
    """What do you think of these tokens?"""
    return Ask(rollout=r, view=r.prompt, wants=wants, **fields)


def go_on(r: Rollout, start: int, length: int = 6, n: int = 3, **fields: Any) -> Ask:
    """How would you go on here?"""
    return Ask(rollout=r, view=r.prompt, wants=Wants.TEXT, start=start, length=length, n=n, **fields)
