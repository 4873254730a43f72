"""Rollouts copied from the data set: the worked answers that `sft` learns from."""

from collections.abc import Sequence

from potstill.errors import DataError
from potstill.models import Tokens
from potstill.samplers.hf import foreign_rollout
from potstill.seeds import derive
from potstill.types import Prompt, Rollout, Turn


class DataSampler:
    """Every prompt's own `completion`, or its `answer` where it has none, with the end-of-sequence token behind it."""

    def __init__(self, student: Tokens):
        self.student = student

    async def sample(self, prompts: Sequence[Prompt], n: int, turn: Turn) -> list[list[Rollout]]:
        """One answer to each prompt, `n` times. Raises DataError for a prompt that has none, or one too long."""
        return [[self._rollout(p, i, turn) for i in range(n)] for p in prompts]

    def _rollout(self, prompt: Prompt, sample: int, turn: Turn) -> Rollout:
        ids = answer_ids(self.student, prompt, turn.max_tokens)
        seed = derive(turn.seed, turn.step, prompt.id, sample)
        return foreign_rollout(self.student, prompt, ids, sample=sample, author="data", seed=seed)


def answer_ids(student: Tokens, prompt: Prompt, room: int) -> tuple[int, ...]:
    """The prompt's worked answer in the student's tokens, its end included. Raises DataError if missing or too long."""
    text = prompt.completion or prompt.answer
    if text is None:
        raise DataError(
            f"prompt {prompt.id!r} has neither completion nor answer, so there is nothing to imitate. "
            'Add the column, or let the teacher write: method.source = "teacher"'
        )
    ids = (*student.tokenizer.encode(text, add_special_tokens=False), student.eos[0])
    if len(ids) > room:
        raise DataError(
            f"the answer of prompt {prompt.id!r} has {len(ids)} tokens, more than rollouts.max_tokens = {room}. "
            "Raise max_tokens, or drop the row"
        )
    return ids
