"""The gradient of a loss over tokens, some tokens at a time, so that the vocabulary is never held for all of them.

    h = body(ids)  of the trained tokens, [N, H], no padding
    for some tokens at a time:   l = loss(softmax(head(h_n)), ...),   dl/dh_n and dl/dhead are added up at once
    then                         dl/dbody from all dl/dh

What a method says of its loss stays as it is: it is given the tokens as a batch of one answer. Memory for logits is bounded
whatever V and N, and logits are computed once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.learners.policy import Context, Slice, View
from potstill.methods.base import Method, Metrics
from potstill.split import Head, Split, Text
from potstill.types import Batch


class Slices:
    """The hidden states of a batch's trained tokens."""

    def __init__(self, split: Split, batch: Batch, *, packed: bool):
        self._split, self._batch, self._packed = split, batch, packed
        lengths = [int(n) for n in batch.mask.sum(1)]
        self._texts = [
            Text([*prompt, *labels[: n - 1]], len(prompt) - 1)
            for prompt, labels, n in zip(batch.prompt_ids, batch.labels.tolist(), lengths, strict=True)
            if n
        ]
        here, trained = batch.mask.flatten().nonzero()[:, 0], batch.trained.flatten() != 0
        if not trained.any():
            trained[here[:1]] = True  # a loss of nothing still has its metrics
        self._kept = trained[here]  # which of the response tokens, one answer behind the other
        self._where = here[self._kept]  # and where they are in [B, T]
        self._hidden = self._read(split) if self._texts else torch.zeros(0)

    def _read(self, split: Split) -> Tensor:
        hidden = split.hidden(self._texts, packed=self._packed)
        return hidden if bool(self._kept.all()) else hidden[self._kept]

    def backward(self, method: Method, around: Context, initial: "Initial | None" = None) -> Iterator[Metrics]:
        """Add the gradient of the loss to that of the weights, and tell loss and metrics of each slice."""
        if not self._texts:
            return
        reference = _Frozen(self._read, initial) if initial else None
        sums = _Sums(self._split.head)
        leaf, at_once = self._hidden.detach().requires_grad_(), sums.head.at_once
        for start in range(0, len(leaf), at_once):
            here = slice(start, start + at_once)
            yield self._one(leaf[None, here], sums.head, here, method, around, reference)
        sums.close()
        assert leaf.grad is not None
        if self._hidden.requires_grad:
            self._hidden.backward(leaf.grad)

    def _one(
        self,
        hidden: Float[Tensor, "1 n H"],
        head: Head,
        here: slice,
        method: Method,
        around: Context,
        reference: "_Frozen | None",
    ) -> Metrics:
        """A slice, of which nothing but its metrics is left in memory."""
        with around():
            policy = Slice(hidden, head, reference=partial(_FrozenSlice, reference, here) if reference else None)
            loss, seen = method.loss(policy, self._batch.only(self._where[here]))
        loss.backward()
        return {"loss": loss.detach(), **seen}


@dataclass(frozen=True, slots=True)
class Initial:
    """The student as it was at the start."""

    split: Split
    around: Context
    """To be entered while the body reads."""


class _Frozen:
    """The initial weights' view of the tokens of a batch, which they read when a method first asks."""

    def __init__(self, read: Callable[[Split], Tensor], initial: Initial):
        self._read, self._initial = read, initial

    @cached_property
    def _hidden(self) -> Float[Tensor, "N H"]:
        with self._initial.around():
            return self._read(self._initial.split)

    @torch.no_grad()
    def logits(self, here: slice) -> Float[Tensor, "1 n V"]:
        """Of some tokens."""
        return self._initial.split.head(self._hidden[None, here])


class _FrozenSlice(View):
    """Some tokens of them."""

    def __init__(self, frozen: _Frozen, here: slice):
        super().__init__(None)
        self._frozen, self._here = frozen, here

    @cached_property
    def logits(self) -> Float[Tensor, "1 n V"]:
        return self._frozen.logits(self._here)


class _Sums:
    """The gradient of an output layer's weights over slices: one sum in float32, whatever their type, added to in place.

    Autograd would make a matrix as large for each slice. Layers that are more than a matrix and a bias, such as an adapter
    on one, are left to it.
    """

    def __init__(self, head: Head):
        module = head.module
        plain = type(module) is torch.nn.Linear and module.weight.requires_grad
        self._weight = module.weight if plain else None
        self._sum = torch.zeros_like(module.weight, dtype=torch.float32) if plain else None
        # No method of this object: the two would keep each other, and the sum, alive.
        self.head = replace(head, project=partial(_product, module.weight, module.bias, self._sum)) if plain else head

    def close(self) -> None:
        """Give the sum to the weights."""
        if self._weight is not None and self._sum is not None:
            before = self._weight.grad
            total = self._sum if before is None else self._sum.add_(before)
            self._weight.grad = total.to(self._weight.dtype)


def _product(
    weight: Float[Tensor, "W H"],
    bias: Float[Tensor, " W"] | None,
    total: Tensor | None,
    hidden: Float[Tensor, "*batch H"],
) -> Float[Tensor, "*batch W"]:
    z: Tensor = _Product.apply(hidden, weight, total)
    return z if bias is None else z + bias


class _Product(torch.autograd.Function):
    """h W', whose gradient for W goes into a sum."""

    @staticmethod
    def forward(ctx: Any, h: Float[Tensor, "*batch H"], w: Float[Tensor, "W H"], total: Tensor) -> Tensor:
        ctx.save_for_backward(h, w)
        ctx.total = total
        return h @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Float[Tensor, "*batch W"]) -> tuple[Tensor, None, None]:
        (h, w), [g] = ctx.saved_tensors, grads
        ctx.total.addmm_(g.flatten(0, -2).T.to(ctx.total.dtype), h.flatten(0, -2).to(ctx.total.dtype))
        return (g @ w.to(g.dtype)).to(h.dtype), None, None  # of other types under autocast
