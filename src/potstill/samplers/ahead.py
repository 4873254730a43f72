"""The student of a moment ago, writing in a thread of its own while the learner moves on."""

import copy
from collections.abc import Sequence

import torch

from potstill.decode import Decoding
from potstill.models import Loaded
from potstill.samplers.hf import HFSampler
from potstill.types import Prompt, Rollout, Turn


class AheadSampler:
    """Samples from a copy of the student, made anew by `keep`."""

    def __init__(self, student: Loaded, *, decoding: Decoding):
        self._student, self._copy = student, Loaded(copy.deepcopy(student.model).requires_grad_(False), student.tokens)
        self._inner = HFSampler(self._copy, decoding=decoding)

    @torch.no_grad()
    def keep(self) -> None:
        """Write with the weights as they are now."""
        theirs = self._student.model.state_dict()
        for name, mine in self._copy.model.state_dict().items():
            mine.copy_(theirs[name])

    async def sample(self, prompts: Sequence[Prompt], n: int, turn: Turn) -> list[list[Rollout]]:
        """`n` answers to each prompt, by the student as it was kept."""
        return await self._inner.sample(prompts, n, turn, apart=True)
