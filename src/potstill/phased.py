"""Phased teacher sampling: verified teacher answers among the student's own, fewer and fewer (SG-OPD, arXiv:2606.09304).

    rho(x) = share                                                   x < flat
           = share / 2 (1 + cos(pi (x - flat) / (end - flat)))       flat <= x < end       x: share of the run done
           = 0                                                       end <= x

The paper has three phases, a cosine and an end in pure student sampling. Where its phases end, rho at the start and the
weight of the teacher's answers are not known to us; the defaults here are ours, and so is what a right answer replaces: all
of the student's answers to that prompt, by the first ones that are right.
"""

import math
from typing import Literal

from pydantic import BaseModel, Field, model_validator


class Phased(BaseModel, frozen=True, extra="forbid"):
    """Verified teacher answers at the start of a run. They are learnt by likelihood, never by a ratio."""

    share: float = Field(ge=0, le=1)
    """rho at the start; 0: none. `whole`: of the prompts of a step. `prefix`: of the teacher's answer."""
    flat: float = Field(0.1, ge=0, le=1)
    """Where the cosine starts, as a share of the run."""
    end: float = Field(0.4, ge=0, le=1)
    """Where it arrives at 0."""
    tries: int = Field(4, gt=0)
    """Answers the teacher writes to a prompt; without a right one among them the student writes."""
    mode: Literal["whole", "prefix"] = "whole"
    """`whole`: the teacher's answers replace the student's. `prefix`: the student goes on from where one is cut."""
    loss: Literal["likelihood", "topk"] = "likelihood"
    """On the teacher's tokens: their likelihood, or forward KL over the teacher's `top_k` likeliest and the rest."""
    top_k: int = Field(16, gt=0)
    """K of `topk`."""
    weight: float = Field(1.0, gt=0)
    """mu, of this loss beside the student's own."""
    max_repetition: float = Field(0.5, ge=0, le=1)
    """Teacher answers with a larger share of repeated 4-grams are rejected."""

    @model_validator(mode="after")
    def _phases_in_order(self) -> "Phased":
        if self.flat > self.end:
            raise ValueError(
                f"flat = {self.flat} lies behind end = {self.end}; the cosine runs from the one to the other"
            )
        return self

    def rho(self, done: float) -> float:
        """The share at a point of the run, 0 .. 1."""
        if done < self.flat:
            return self.share
        if done >= self.end:
            return 0.0
        return self.share / 2 * (1 + math.cos(math.pi * (done - self.flat) / (self.end - self.flat)))
