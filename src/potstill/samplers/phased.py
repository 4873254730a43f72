"""Teacher answers among the student's, by schedule: who writes what in a step (see `potstill.phased`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from potstill.metrics import repetition
from potstill.phased import Phased
from potstill.samplers.base import Continuing, Sampler
from potstill.types import Prompt, Rollout, Turn, Usage


class PhasedSampler:
    """The student, and a teacher whose verified answers take the student's place for some prompts."""

    def __init__(self, student: Continuing, teacher: Sampler, verifier: Callable[[Rollout], float], how: Phased):
        self.student, self.teacher, self.verifier, self.how = student, teacher, verifier, how

    async def sample(self, prompts: Sequence[Prompt], n: int, turn: Turn) -> list[list[Rollout]]:
        """`n` answers to each prompt; fewer where the teacher wrote fewer right ones, which then stand alone."""
        rho = self.how.rho(turn.done)
        asked = prompts if self.how.mode == "prefix" else prompts[: int(rho * len(prompts) + 0.5)]
        if rho == 0 or not asked:
            return await self.student.sample(prompts, n, turn)
        written = await self.teacher.sample(asked, self.how.tries, turn)
        right = [[r for r in group if self.accepts(r)] for group in written]
        if self.how.mode == "prefix":
            groups = await self._continued(prompts, n, turn, right, rho)
        else:
            without = [p for p, group in zip(asked, right, strict=True) if not group] + list(prompts[len(asked) :])
            rest = iter(await self.student.sample(without, n, turn) if without else [])
            groups = [group[:n] or next(rest) for group in right] + list(rest)
        charged = [_charged(*each) for each in zip(groups, written, right, strict=False)]
        return charged + groups[len(charged) :]

    async def _continued(
        self, prompts: Sequence[Prompt], n: int, turn: Turn, right: Sequence[Sequence[Rollout]], rho: float
    ) -> list[list[Rollout]]:
        """Every answer goes on from the first rho of a right answer; from nothing where there is none."""
        guides = [
            group[0].response_ids[: int(rho * (len(group[0].response_ids) - 1))] if group else () for group in right
        ]
        return await self.student.sample(prompts, n, turn, guides=guides)

    def accepts(self, r: Rollout) -> bool:
        """Finished, right, and not a loop."""
        return r.finish == "stop" and self.verifier(r) == 1 and repetition(r.response_ids) <= self.how.max_repetition


def _charged(group: list[Rollout], tries: Sequence[Rollout], right: Sequence[Rollout]) -> list[Rollout]:
    """All that the teacher wrote for a prompt is paid for, whether it is learnt from or not."""
    cost = sum((r.usage for r in tries), Usage())
    first = replace(group[0], usage=cost, tries=len(tries), right=len(right))
    return [first, *(replace(r, usage=Usage()) for r in group[1:])]
