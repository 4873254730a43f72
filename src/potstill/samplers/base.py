"""What a sampler is: whoever writes answers to prompts, in the student's tokens."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from potstill.types import Prompt, Rollout, Turn


@runtime_checkable
class Sampler(Protocol):
    """Writes rollouts. Numbers depend on the weights and on (seed, step, prompt, sample) alone."""

    async def sample(self, prompts: Sequence[Prompt], n: int, turn: Turn) -> list[list[Rollout]]:
        """`n` answers to each prompt, as one group per prompt, in order."""
        ...


@runtime_checkable
class Continuing(Protocol):
    """A sampler that can also go on from given tokens."""

    async def sample(
        self, prompts: Sequence[Prompt], n: int, turn: Turn, *, guides: Sequence[tuple[int, ...]] = ()
    ) -> list[list[Rollout]]:
        """As above; with `guides`, one per prompt, every answer starts with these tokens."""
        ...
