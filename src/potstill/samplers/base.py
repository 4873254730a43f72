"""What a sampler is: whoever writes answers to prompts, in the student's tokens."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from potstill.types import Prompt, Rollout


@runtime_checkable
class Sampler(Protocol):
    """Writes rollouts. Numbers depend on (seed, step, prompt, sample) alone."""

    async def sample(self, prompts: Sequence[Prompt], n: int, *, seed: int, step: int) -> list[list[Rollout]]:
        """`n` answers to each prompt, as one group per prompt, in order."""
        ...
