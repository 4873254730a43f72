"""What is asked of an answer before anybody learns from it: is it right?"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from pydantic import BaseModel

from potstill.errors import DataError

if TYPE_CHECKING:  # types.py needs torch, and reading a recipe must not
    from potstill.types import Prompt, Rollout


class Verifier(BaseModel, ABC, frozen=True, extra="forbid"):
    """Finds the answer in a text, then compares it with the prompt's own. Config and behaviour are one object.

    Only the text counts, not how it ended: an answer that is complete when the length limit cuts the text off is an
    answer. A verifier that should not accept one asks for what comes after the answer (`Exact(pattern=r"= (\\d+);")`).
    """

    kind: str

    @abstractmethod
    def extract(self, text: str) -> str | None:
        """The answer that `text` gives, or None when it gives none (counted as a format failure)."""

    @abstractmethod
    def score(self, answer: str, prompt: "Prompt") -> float:
        """How right an extracted answer is, from 0 (wrong) to 1 (right).

        Raises:
            DataError: The prompt has nothing to compare with.
        """

    def __call__(self, rollout: "Rollout") -> float:
        """The score of a whole rollout, 0 .. 1; one without an answer gets 0."""
        answer = self.extract(rollout.text())
        return 0.0 if answer is None else self.score(answer, rollout.prompt)


def gold(prompt: "Prompt") -> str:
    """The prompt's own answer.

    Raises:
        DataError: It has none.
    """
    if prompt.answer is None:
        columns = f" (its other columns: {', '.join(map(str, prompt.meta))})" if prompt.meta else ""
        raise DataError(
            f"prompt {prompt.id!r} has no answer{columns}, so nothing written for it can be verified; "
            "name the column that holds the answers (`answer` of the task), or use a method without a verifier"
        )
    return prompt.answer
