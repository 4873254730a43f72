"""Whole answers of a teacher that is no model in this process: what `sft` learns from behind a server or an API."""

from collections.abc import Sequence
from dataclasses import replace

from potstill.errors import BudgetEnded
from potstill.models import Tokens
from potstill.samplers.hf import foreign_rollout, prompt_within
from potstill.seeds import derive
from potstill.teachers.base import Teacher
from potstill.types import Ask, Feedback, Prompt, Rollout, Turn, Usage, Wants


class AskedSampler:
    """Asks a teacher to go on from nothing, and reads what it writes in the student's tokens.

    Such a teacher is asked for each answer once, ever: a prompt that comes again brings the answers that it brought
    before, and costs nothing.
    """

    def __init__(self, teacher: Teacher, student: Tokens):
        self.teacher, self.student = teacher, student

    async def sample(self, prompts: Sequence[Prompt], n: int, turn: Turn) -> list[list[Rollout]]:
        """`n` answers to each prompt; none to a prompt that the teacher did not answer, as `n` times as it was asked to.

        Raises BudgetEnded if there is no answer at all for lack of budget.
        """
        asks = [self._ask(p, n, turn) for p in prompts]
        try:
            said = await self.teacher.feedback(asks)
        except BudgetEnded as end:
            if not end.said:
                raise
            said = list(end.said)
        of = {f.ask.view.id: f for f in said}
        return [self._rollouts(of[p.id], turn) if p.id in of else [] for p in prompts]

    def _ask(self, prompt: Prompt, n: int, turn: Turn) -> Ask:
        nothing = Rollout(
            prompt=prompt,
            sample=0,
            author="teacher",
            prompt_ids=prompt_within(self.student, prompt, turn.max_tokens),
            response_ids=(),
            pieces=(),
            finish="length",
            seed=derive(turn.seed, "teacher", turn.step, prompt.id),
        )
        return Ask(rollout=nothing, view=prompt, wants=Wants.TEXT, length=turn.max_tokens, n=n, ids=True)

    def _rollouts(self, said: Feedback, turn: Turn) -> list[Rollout]:
        asked = said.ask.rollout
        group = [
            foreign_rollout(
                self.student,
                asked.prompt,
                ids[: turn.max_tokens],
                sample=i,
                author="teacher",
                seed=derive(asked.seed, i),
            )
            for i, ids in enumerate(said.ids)
        ]
        return [replace(r, usage=said.usage if i == 0 else Usage()) for i, r in enumerate(group)]
