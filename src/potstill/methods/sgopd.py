"""The verifier's sign gates every token of the teacher's signal (SG-OPD, arXiv:2606.09304).

    d_t = log pi_T(y_t | h_t) - log pi_old(y_t | h_t)
    a   = (R - mean R) / std R over the answers to the prompt, or 2 R - 1                 R: the verifier's score
    c_t = lam if a d_t > 0 and |d_t| > margin, else beta
    A_t = c_t d_t + w a                                                    reference = "none"
    A_t = d_t + (c_t - 1) (log pi_T - log pi_ref)(y_t | h_t) + w a         reference = "start" or "base"

    L as in methods/token_credit.py: a clipped policy gradient, and likelihood on verified answers of the teacher, of
    which there are rho(x) (potstill/phased.py).

Where verifier and teacher agree, the teacher's signal counts more; where they disagree it counts as it is (beta = 1).
c is computed from sampled, detached numbers, and d is never whitened: that would change signs.

We know the paper by its abstract and by what others report of it. Known: the strict product of signs, lam = 1.8 and
beta = 1.0 as its best values, a sampled-token estimate, phases and a cosine. Not known: what c multiplies. Both readings
are here: without a reference c multiplies d (as the OPDVR paper, arXiv:2608.24696, re-implements it), which moves only
how fast each token goes to the teacher, not where it ends; with one, c extrapolates as G-OPD does (arXiv:2602.12125), from
the initial student ("start") or from the teacher before its RL ("base", table [reference]). Nor is it known whether a is
added to A (w, here 0), or what happens where all answers to a prompt are right or all wrong: a is 0 there, hence c = beta.
An answer cut off by `rollouts.horizon` has no verdict, and its gate is off (c = beta).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from potstill.credit import PerToken, extrapolated, group_advantage, outcome, sign_gate
from potstill.methods.base import Need
from potstill.methods.token_credit import Evidence, TokenCredit
from potstill.phased import Phased
from potstill.seeds import derive


class SGOPD(TokenCredit):
    """The teacher counts more where the verifier agrees with it; its verified answers warm the start."""

    name: Literal["sgopd"] = "sgopd"
    lam: float = Field(1.8, ge=1)
    """c_t where verifier and teacher agree."""
    beta: float = Field(1.0, ge=0)
    """c_t where they do not, or one of them is 0."""
    reference: Literal["none", "start", "base"] = "none"
    """What c scales: d itself, or the step from a reference to the teacher."""
    keep_sign: bool = False
    """With a reference: leave its term out where it points away from d."""
    sign: Literal["auto", "group", "outcome"] = "auto"
    """a: against the other answers to the prompt, or right and wrong; `auto`: the former where there are others."""
    margin: float = Field(0.0, ge=0)
    """Nats; a smaller |d_t| counts as disagreement."""
    verifier: float = Field(0.0, ge=0)
    """w, of the verifier's own credit."""
    gate: Literal["sign", "inverse", "random"] = "sign"
    """Controls: `inverse` swaps agreement and disagreement; `random` shuffles the gate among the tokens of an answer."""
    phased: Phased = Phased(share=0.5)
    """Verified teacher answers at the start of the run; `phased.share` = 0: the gate alone."""

    @model_validator(mode="after")
    def _all_have_an_effect(self) -> "SGOPD":
        if self.keep_sign and self.reference == "none":
            raise ValueError('keep_sign is about the term of a reference, but reference = "none". Set it to "start"')
        if self.margin >= self.limit:
            raise ValueError(f"margin = {self.margin} is not below limit = {self.limit}, so the gate would never open")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """Verdicts, and by `sign` several answers to a prompt."""
        needs: set[Need] = {"verdict", "group"} if self.sign == "group" else {"verdict"}
        return super().needs | needs

    @property
    def refers_to(self) -> Literal["start", "base"] | None:
        """pi_ref."""
        return None if self.reference == "none" else self.reference

    def advantages(self, verdicts: Sequence[float | None]) -> Float[Tensor, " G"]:
        """a."""
        grouped = self.sign == "group" or (self.sign == "auto" and len(verdicts) > 1)
        return group_advantage(verdicts) if grouped else outcome(verdicts)

    def coefficient(self, e: Evidence) -> PerToken:
        """c_t."""
        a = -e.advantage if self.gate == "inverse" else e.advantage
        c = sign_gate(a, e.d, self.lam, self.beta, self.margin)
        if self.gate == "random":
            order = torch.Generator().manual_seed(derive(e.rollout.seed, "gate"))
            c = c[torch.randperm(len(c), generator=order)]
        return c

    def credit(self, e: Evidence) -> PerToken:
        """A_t."""
        c = self.coefficient(e)
        if self.reference == "none":
            scaled = c * e.d
        else:
            gap = torch.where(e.gap * e.d * (c - 1) < 0, 0.0, e.gap) if self.keep_sign else e.gap
            scaled = extrapolated(e.d, gap, c)
        return scaled + self.verifier * e.advantage
