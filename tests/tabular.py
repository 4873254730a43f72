"""A language model that fits on a page: V tokens, T steps, one row of logits per prefix. All its answers can be listed.

row 0           the first token
row 1 + y_0     the second token, after y_0
"""

import itertools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch

from potstill.batch import collate
from potstill.divergence import jsd
from potstill.methods.base import Method
from potstill.types import Ask, Batch, Feedback, Prompt, Reviewed, Rollout, Wants

V, T = 3, 2
LETTERS = "abc"
PROMPT = Prompt(id="p", messages=({"role": "user", "content": "?"},))
ANSWERS = list(itertools.product(range(V), repeat=T))


def table(seed: int) -> torch.Tensor:
    """Random logits [1 + V, V]."""
    return torch.randn(1 + V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(logits: torch.Tensor, y: tuple[int, ...]) -> torch.Tensor:
    """[T, V] log-probs of the distributions that produce the tokens of `y`."""
    logp = logits.log_softmax(-1)
    return torch.stack([logp[0], logp[1 + y[0]]])


class Tabular:
    """The `Policy` of a table on a batch."""

    def __init__(self, logits: torch.Tensor, ys: list[tuple[int, ...]], reference: "Tabular | None" = None):
        self._logits, self._ys, self._reference = logits, ys, reference

    @cached_property
    def all(self) -> torch.Tensor:
        return torch.stack([rows(self._logits, y) for y in self._ys])

    def logp(self, ids: torch.Tensor) -> torch.Tensor:
        return self.all.gather(-1, ids[..., None])[..., 0]

    def logp_at(self, ids: torch.Tensor) -> torch.Tensor:
        return self.all.gather(-1, ids)

    def logp_all(self) -> torch.Tensor:
        return self.all

    def divergence(self, teacher_logp: torch.Tensor, beta: float, temperature: float = 1.0) -> torch.Tensor:
        return jsd(self.all / temperature, teacher_logp, beta)

    @property
    def reference(self) -> "Tabular":
        return self._reference or self


def rollout(logits: torch.Tensor, y: tuple[int, ...], **fields: Any) -> Rollout:
    """`y` as the policy `logits` would have written it."""
    logp = rows(logits.detach(), y)
    return Rollout(
        **{
            "prompt": PROMPT,
            "sample": 0,
            "prompt_ids": (0,),
            "response_ids": y,
            "pieces": tuple(LETTERS[i] for i in y),
            "old_logp": tuple(logp[t, i].item() for t, i in enumerate(y)),
            "entropy": tuple((-logp.exp() * logp).sum(-1).tolist()),
            "finish": "stop",
            **fields,
        }
    )


def scored(ask: Ask, teacher: torch.Tensor) -> Feedback:
    """What the teacher `teacher` says about every token."""
    y = ask.rollout.response_ids
    q = rows(teacher, y).float()
    sampled = q.gather(-1, torch.tensor(y)[:, None])[:, 0].numpy()
    known: dict[str, Any] = {"ask": ask, "teacher": "table", "sampled": sampled}
    if ask.wants is Wants.TOPK:
        values, ids = q.topk(ask.k, -1)
        known |= {"topk_logp": values.numpy(), "topk_ids": ids.numpy()}
    if ask.wants is Wants.FULL:
        known |= {"logp": q.numpy().astype(np.float32)}
    return Feedback(**known)


def double(batch: Batch) -> Batch:
    """The batch in float64, so that gradients can be compared to 1e-6."""
    names = [n for n in Batch.__dataclass_fields__ if torch.is_tensor(getattr(batch, n))]
    values = {n: getattr(batch, n) for n in Batch.__dataclass_fields__}
    return Batch(**{n: v.double() if n in names and v.is_floating_point() else v for n, v in values.items()})


def expected_gradient(
    method: Method, theta: torch.Tensor, answer: Callable[[Ask], Feedback], reference: torch.Tensor | None = None
) -> torch.Tensor:
    """E over y ~ pi_theta of the gradient of the method's loss times its divisor: every answer, by its probability."""
    theta = theta.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for y in ANSWERS:
        written = rollout(theta, y)
        said = tuple(answer(ask) for ask in method.asks(written))
        batch = double(collate(method.targets([Reviewed(rollout=written, feedback=said)])))
        policy = Tabular(theta, [y], Tabular(reference, [y]) if reference is not None else None)
        loss, _ = method.loss(policy, batch)
        total = total + probability(theta, y).detach() * loss * batch.n_tokens
    return torch.autograd.grad(total, theta)[0]


def probability(theta: torch.Tensor, y: tuple[int, ...]) -> torch.Tensor:
    """pi_theta(y)."""
    return Tabular(theta, [y]).logp(torch.tensor([y])).sum().exp()
