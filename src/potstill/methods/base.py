"""What a method is: a frozen bundle of hyper-parameters that can answer three questions.

    asks(rollout)              what to ask the teacher about it
    targets(group of Reviewed) what each token is worth, now that the teacher has answered; no gradient
    loss(policy, batch)        the objective; pure and differentiable

Everything a method does not say (sampling, padding, the divisor, resume, logging) belongs to others.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel
from torch import Tensor

from potstill.phased import Phased
from potstill.types import Ask, Author, Batch, Feedback, Prompt, Reviewed, Rollout, Target, Wants

Need = Literal["entropy", "reference", "variety", "verdict", "group"]
"""The entropies of a rollout; the frozen initial student; a teacher whose answers differ (temperature > 0); prompts with
an answer to compare with; several answers to each prompt."""
Metrics = dict[str, Float[Tensor, ""]]
"""Scalars without gradient. Those named *_max are combined over micro-batches by the maximum; all others are sums
over the micro-batch divided by `batch.n_tokens`, so that adding them up gives the figure of the whole batch."""


@runtime_checkable
class Policy(Protocol):
    """The student's forward pass on a batch, computed only as far as it is asked. All in nats."""

    def logp(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """log pi(ids_t | h_t)."""
        ...

    def logp_at(self, ids: Int[Tensor, "B T K"]) -> Float[Tensor, "B T K"]:
        """log pi(ids_tk | h_t) of K tokens at each position."""
        ...

    def logp_all(self) -> Float[Tensor, "B T V"]:
        """log pi(. | h_t) over the whole vocabulary."""
        ...

    def divergence(
        self, teacher_logp: Float[Tensor, "B T V"], beta: float, temperature: float = 1.0
    ) -> Float[Tensor, "B T"]:
        """`divergence.jsd` of the student's distribution at a temperature and the teacher's, nats per token."""
        ...

    @property
    def reference(self) -> "Policy":
        """The same view of the student's frozen initial weights, without gradient."""
        ...


class Method(BaseModel, ABC, frozen=True, extra="forbid"):
    """A distillation method: its equation in the docstring of its file, its fields here, its three answers below."""

    name: str
    per_token: ClassVar[bool] = True
    """Whether `loss` is a sum over tokens, each with its own numbers alone. The learner then computes it on some tokens at
    a time, of whatever answers, as a batch of one answer [1, N]. False: it is always given whole answers."""

    reads_hidden: ClassVar[bool] = False
    """Whether `Feedback.hidden` will do in the place of `logp` where it wants FULL: H numbers a token instead of V."""

    @property
    def wants(self) -> Wants:
        """How much of the teacher the method needs to see."""
        return Wants.NOTHING

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs of the rest of the run."""
        return frozenset()

    def check(self, max_tokens: int, *, group: int, updates: int) -> None:
        """Raise ConfigError if the fields make no sense.

        Args:
            max_tokens: Longest answer.
            group: Answers to each prompt.
            updates: Optimiser steps on each batch, and one more if it is written one step ahead.
        """
        return

    @property
    def author(self) -> Author:
        """Who writes the rollouts it learns from; on-policy methods: the student."""
        return "student"

    @property
    def examples(self) -> Phased | None:
        """A schedule by which verified answers of the teacher come among the student's; none: the student's alone."""
        return None

    @property
    def imitates(self) -> bool:
        """Whether the teacher's continuations are labels, its end token among them."""
        return False

    @property
    def asks_again(self) -> bool:
        """Whether answers can raise more questions (`more`)."""
        return False

    @property
    def stands_age(self) -> bool:
        """Whether answers may be older than the student: their ratio is corrected, or the loss does not ask who wrote them."""
        return True

    @property
    def refers_to(self) -> Literal["start", "base"] | None:
        """Who answers questions to the `reference`: the frozen initial student, or the model of [reference]."""
        return None

    @property
    def corrects(self) -> bool:
        """Whether the teacher is asked about every answer it is to correct, however far the run is."""
        return self.wants > Wants.NOTHING

    @property
    def teacherless(self) -> bool:
        """Whether nobody is asked anything."""
        return self.wants is Wants.NOTHING and self.author != "teacher" and self.examples is None

    def asks(self, rollout: Rollout) -> list[Ask]:
        """What to ask the teacher about one rollout; nothing is fine."""
        return []

    def more(self, said: Sequence[Feedback]) -> list[Ask]:
        """What to ask next, now that all this was said in the step; asked until there is nothing more."""
        return []

    @abstractmethod
    def targets(self, group: Sequence[Reviewed]) -> list[Target]:
        """What each token of one prompt's rollouts is worth."""

    def terms(self, targets: Sequence[Target], step: int) -> tuple[Sequence[Target], Sequence[Target]] | None:
        """The targets with one term of the credit each, where the directions of both are to be compared at this step."""
        return None

    def told(self, target: Target) -> dict[str, Float[Tensor, " T"]]:
        """Per-token numbers for people to read, beside `target.info`: computed only for rollouts that are kept."""
        return {}

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> tuple[Float[Tensor, ""], Metrics]:
        """The objective in nats per trained token, and its metrics."""


def whole(
    rollout: Rollout,
    wants: Wants,
    *,
    k: int = 0,
    view: Prompt | None = None,
    of: Literal["teacher", "reference"] = "teacher",
) -> list[Ask]:
    """One question about the whole response; none about an empty one."""
    if not rollout.response_ids:
        return []
    return [Ask(rollout=rollout, view=view or rollout.prompt, wants=wants, k=k, of=of)]


def weighed(feedback: Feedback | None, rollout: Rollout) -> Float[Tensor, " T"]:
    """1 on the tokens of a rollout of which the teacher's view is known: all, unless its tokenizer is another."""
    if feedback is None or feedback.aligned is None:
        return torch.ones(len(rollout.response_ids))
    return torch.from_numpy(feedback.aligned).float()
