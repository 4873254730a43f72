"""Where prompts come from: training prompts by (seed, step), evaluation questions in a fixed order."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from potstill.verifiers.base import Verifier

if TYPE_CHECKING:  # types.py needs torch, and reading a recipe must not
    from potstill.types import Prompt

Split = Literal["validation", "test"]
"""Held-out questions: `validation` to watch a run and to choose by, `test` to report."""


class Task(BaseModel, ABC, frozen=True, extra="forbid"):
    """Prompts and the verifier that knows their answers. Config and behaviour are one object.

    No prompt of one of training, `validation` and `test` is a prompt of another.
    """

    kind: str

    @abstractmethod
    def draw(self, seed: int, step: int, count: int) -> "list[Prompt]":
        """`count` different training prompts: a pure function of its arguments, so a resumed run sees the same ones.

        Raises:
            DataError: There are fewer than `count`.
        """

    @abstractmethod
    def questions(self, split: Split, count: int) -> "list[Prompt]":
        """The first `count` held-out prompts, in an order that never changes: fewer are a prefix of more.

        Raises:
            DataError: There are fewer than `count`.
        """

    def known(self) -> "Sequence[Prompt]":
        """Every training prompt, where there is an end to them: all are checked before a run starts."""
        return ()

    @abstractmethod
    def verifier(self) -> Verifier:
        """Scores an answer to a prompt of this task."""
