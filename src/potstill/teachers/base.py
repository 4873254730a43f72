"""What a teacher is: somebody who answers Asks."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from potstill.types import Ask, Feedback, Wants


@runtime_checkable
class Teacher(Protocol):
    """Answers questions about rollouts. It never learns which method asks."""

    name: str

    @property
    def offers(self) -> Wants:
        """The most that it can show of itself."""
        ...

    async def feedback(self, asks: Sequence[Ask]) -> list[Feedback]:
        """One answer per question; each carries its question. Raises TeacherError.

        A teacher that only writes may leave questions unanswered; scores are never left out.
        """
        ...
