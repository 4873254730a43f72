"""What a teacher is: somebody who answers Asks."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from potstill.types import Ask, Feedback, Wants


@runtime_checkable
class Teacher(Protocol):
    """Answers questions about rollouts. It never learns which method asks."""

    name: str
    notes: Counter[str]
    """How many texts were accepted, repaired, rejected, and questions unanswered, so far; empty for a mere model."""
    ended: str
    """Why it will not answer any more; empty while it does."""

    @property
    def offers(self) -> Wants:
        """The most that it can show of itself."""
        ...

    async def feedback(self, asks: Sequence[Ask]) -> list[Feedback]:
        """One answer per question; each carries its question. Raises TeacherError.

        A teacher that only writes may leave questions unanswered; scores are never left out.
        """
        ...


@runtime_checkable
class Expecting(Protocol):
    """A teacher whose answers take time, but not this machine's."""

    def expect(self, asks: Sequence[Ask]) -> None:
        """Begin with questions that `feedback` will be asked soon."""
        ...

    async def forget(self) -> None:
        """It will not be asked them after all."""
        ...
