"""The answer must be the same string."""

import re
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from potstill.verifiers.base import Verifier, gold

if TYPE_CHECKING:
    from potstill.types import Prompt


class Exact(Verifier, frozen=True):
    """1 if the extracted answer equals `prompt.answer`, character for character, else 0.

    White space around either is ignored. Example: ``Exact(pattern=r"#### (.+)")`` reads the answers of GSM8K.
    """

    kind: Literal["exact"] = "exact"
    pattern: str | None = None
    """A regular expression; the first group of its *last* match is the answer. None: the whole text is."""

    @field_validator("pattern")
    @classmethod
    def _has_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(
                f"pattern {pattern!r} is not a regular expression: {error}; correct it, or leave it out to compare "
                "the whole text"
            ) from error
        if groups == 0:
            raise ValueError(
                f"pattern {pattern!r} has no group, so it does not say which part of a match is the answer; "
                "put parentheses around that part"
            )
        return pattern

    def extract(self, text: str) -> str | None:
        """The stripped text, or the stripped first group of the pattern's last match; None if that is empty."""
        if self.pattern is None:
            return text.strip() or None
        answers = [match[1] or "" for match in re.finditer(self.pattern, text)]
        return (answers[-1].strip() or None) if answers else None

    def score(self, answer: str, prompt: "Prompt") -> float:
        """1.0 or 0.0; see `Verifier.score`."""
        return float(answer.strip() == gold(prompt).strip())
