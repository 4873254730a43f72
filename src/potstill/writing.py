"""What is written in a step: prompts -> rollouts -> verdicts. With `rollouts.ahead`, that of the next step meanwhile.

    step       n                        n + 1
    write      y_n+1 by theta_n-1       y_n+2 by theta_n
    learn      theta_n from y_n         theta_n+1 from y_n+1         one update later than it was written

The first step, and each after a checkpoint, is written anew by the newest weights, so that a run that crashed goes on as if
it had not. One that was stopped by Ctrl-C does not: its last step has a checkpoint of its own, and the next is written anew.

If not written ahead, answers that are over are told to a teacher that can begin with them while others are still written.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from potstill.build import Parts
from potstill.config import Config
from potstill.errors import PotstillError
from potstill.record import degenerate
from potstill.samplers.ahead import AheadSampler
from potstill.samplers.hf import HFSampler
from potstill.seeds import derive
from potstill.teachers.base import Expecting
from potstill.types import Prompt, Rollout, Turn


@dataclass(frozen=True, slots=True)
class Written:
    """The rollouts of a step, prompt by prompt."""

    groups: list[list[Rollout]]
    dropped: list[Rollout]
    """Those of prompts that others have replaced."""
    lag: int
    """Updates made since the weights that wrote them."""


class Writing:
    """The rollouts of one step after another."""

    def __init__(self, config: Config, parts: Parts):
        self.config, self.parts = config, parts
        self._ahead = parts.sampler if isinstance(parts.sampler, AheadSampler) else None
        self._coming: asyncio.Task[Written] | None = None

    async def of(self, step: int, done: float) -> Written:
        """The rollouts of a step; `done` is the share of the run before it."""
        coming, self._coming = self._coming, None
        if coming is not None:
            return await coming
        if self._ahead:
            self._ahead.keep()
        return await self._write(step, done, lag=0)

    async def begin(self, step: int, done: float) -> None:
        """Start on the next step's, with the weights as they are now, if it is to be written ahead."""
        if self._ahead:
            self._ahead.keep()
            self._coming = asyncio.create_task(self._write(step, done, lag=1))
            await asyncio.sleep(0)  # let it start: the learner does not wait for anything

    async def settle(self) -> None:
        """Let what is being written for the next step come to its end: its time is not that of what follows."""
        if self._coming is not None:
            await asyncio.wait([self._coming])

    async def aclose(self) -> None:
        """Give up what is being written and asked."""
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.wait([self._coming])  # it hears of it at the next pause
            self._coming = None
        if isinstance(self.parts.teacher, Expecting):
            await self.parts.teacher.forget()

    async def _write(self, step: int, done: float, *, lag: int) -> Written:
        """Groups whose answers all score alike are replaced by those of other prompts, as often as allowed."""
        config, parts = self.config, self.parts
        limit = config.rollouts.max_tokens
        dropped: list[Rollout] = []
        room = config.rollouts.horizon.at(step, limit) if config.rollouts.horizon else limit
        turn = Turn(seed=config.seed, step=step, done=done, max_tokens=room)

        known: dict[tuple[str, int], Rollout] = {}

        def judged(rollout: Rollout) -> Rollout:
            if rollout.key not in known:
                known[rollout.key] = self._judged(rollout, step - 1 - lag, cut=room < limit)
            return known[rollout.key]

        async def written(prompts: Sequence[Prompt]) -> list[list[Rollout]]:
            groups = await self._sampled(prompts, turn, judged)
            return [[judged(r) for r in group] for group in groups]

        groups = await written(parts.task.draw(config.seed, step, config.rollouts.prompts))
        for again in range(config.rollouts.resample):
            alike = [i for i, group in enumerate(groups) if degenerate(group)]
            asked = {r.prompt.id for group in groups for r in group}
            fresh = parts.task.draw(derive(config.seed, "again", again), step, len(alike)) if alike else []
            fresh = [p for p in fresh if p.id not in asked]
            for i, group in zip(alike, await written(fresh) if fresh else (), strict=False):
                dropped += groups[i]
                groups[i] = group
        return Written(groups, dropped, lag)

    async def _sampled(
        self, prompts: Sequence[Prompt], turn: Turn, judged: Callable[[Rollout], Rollout]
    ) -> list[list[Rollout]]:
        """Where no answer can be replaced any more, the teacher hears of each as soon as it is over."""
        config, parts, teacher = self.config, self.parts, self.parts.teacher
        if config.rollouts.resample or not (isinstance(teacher, Expecting) and isinstance(parts.sampler, HFSampler)):
            return await parts.sampler.sample(prompts, config.rollouts.group, turn)

        def ended(rollout: Rollout) -> None:
            with suppress(PotstillError):  # it comes up again when all are written
                teacher.expect([ask for ask in parts.method.asks(judged(rollout)) if ask.of == "teacher"])

        return await parts.sampler.sample(prompts, config.rollouts.group, turn, ended=ended)

    def _judged(self, rollout: Rollout, version: int, *, cut: bool) -> Rollout:
        """With its verdict, where its prompt has an answer to compare with and the answer was not cut short on purpose."""
        unknown = rollout.prompt.answer is None or (cut and rollout.finish == "length")
        return replace(rollout, policy_version=version, verdict=None if unknown else self.parts.verifier(rollout))
