"""The answer must mean the same: 1/2, 0.5 and \\frac{1}{2} are one number."""

import threading
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from potstill.errors import DataError, require
from potstill.verifiers.base import Verifier, gold

if TYPE_CHECKING:
    from potstill.types import Prompt

SECONDS = 5
"""For one parse or one comparison; an expression that takes longer counts as unreadable, or as different."""


class Math(Verifier, frozen=True):
    """1 if the answer is mathematically equal to `prompt.answer`, else 0, as `math-verify` decides.

    The answer of a text is what stands in ``\\boxed{...}``, else its last LaTeX formula, else its last number. Several
    boxes are read together, as a set, so a student gains nothing by boxing one guess after the other.
    The time limit rests on a signal, which Python delivers to the main thread only: in other threads there is none.
    """

    kind: Literal["math"] = "math"

    @model_validator(mode="after")
    def _installed(self) -> "Math":
        require("math_verify", "math", "verifier math")
        return self

    def extract(self, text: str) -> str | None:
        """The answer as it was written, without the box or the dollar signs around it."""
        parsed = _parse(text)
        return str(parsed[-1]) if parsed else None

    def score(self, answer: str, prompt: "Prompt") -> float:
        """1.0 or 0.0; see `Verifier.score`.

        Raises:
            DataError: The prompt has no answer, or one that is not mathematics.
        """
        from math_verify import verify

        reference = gold(prompt)
        marked = "$" in reference or "\\boxed" in reference
        expected = _parse(reference if marked else f"\\boxed{{{reference}}}")
        if not expected:
            raise DataError(
                f"the answer of prompt {prompt.id!r}, {reference!r}, cannot be read as mathematics, so nothing can be "
                'compared with it; write it as a number or in LaTeX, or use the verifier "exact"'
            )
        return float(verify(expected, _parse(f"\\boxed{{{answer}}}"), timeout_seconds=_limit()))


def _parse(text: str) -> list[Any]:
    """The last expression in `text` as [SymPy object, string]; [] if there is none."""
    from math_verify import parse

    return parse(text, parsing_timeout=_limit())  # None is documented


def _limit() -> int | None:
    return SECONDS if threading.current_thread() is threading.main_thread() else None
