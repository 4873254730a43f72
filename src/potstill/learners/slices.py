"""The gradient of a loss over tokens, some tokens at a time, so that the vocabulary is never held for all of them.

    h = body(ids)  of the trained tokens, [N, H], no padding
    for some tokens at a time:   l = loss(softmax(head(h_n)), ...),   dl/dh_n and dl/dhead are added up at once
    then                         dl/dbody from all dl/dh

What a method says of its loss stays as it is: it is given the tokens as a batch of one answer. Memory for logits is bounded
whatever V and N, and logits are computed once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from potstill.learners.policy import Context, Slice
from potstill.methods.base import Method, Metrics
from potstill.split import Split, Text
from potstill.types import Batch


class Slices:
    """The hidden states of a batch's trained tokens."""

    def __init__(self, split: Split, batch: Batch, *, packed: bool):
        self._split, self._batch, self._packed = split, batch, packed
        lengths = [int(n) for n in batch.mask.sum(1)]
        self._texts = [
            Text([*prompt, *labels[: n - 1]], len(prompt) - 1)
            for prompt, labels, n in zip(batch.prompt_ids, batch.labels.tolist(), lengths, strict=True)
        ]
        here, trained = batch.mask.flatten().nonzero()[:, 0], batch.trained.flatten() != 0
        if not trained.any():
            trained[here[:1]] = True  # a loss of nothing still has its metrics
        self._kept = trained[here]  # which of the response tokens, one answer behind the other
        self._where = here[self._kept]  # and where they are in [B, T]
        self._hidden = self._read(split)
        self._frozen: tuple[Split, Tensor, Context] | None = None

    def _read(self, split: Split) -> Tensor:
        hidden = split.hidden(self._texts, packed=self._packed)
        return hidden if bool(self._kept.all()) else hidden[self._kept]

    def refer(self, split: Split, around: Context) -> None:
        """Let the method see another model's view of the same tokens, without gradient."""
        with around():
            self._frozen = (split, self._read(split), around)

    def backward(self, method: Method, around: Context) -> Iterator[Metrics]:
        """Add the gradient of the loss to that of the weights, and tell loss and metrics of each slice."""
        head, at_once = self._split.head, self._split.head.at_once
        leaf = self._hidden.detach().requires_grad_()
        sums = _Sums(head.module)
        for part in torch.arange(len(leaf), device=leaf.device).split(at_once):
            here = slice(int(part[0]), int(part[-1]) + 1)
            frozen = None
            if self._frozen:
                other, hidden, enter = self._frozen
                frozen = Slice(hidden[None, here], other.head, around=enter)
            with around():
                policy = Slice(leaf[None, here], head, frozen=frozen)
                loss, seen = method.loss(policy, self._batch.only(self._where[here]))
            loss.backward()
            sums.add()
            yield {"loss": loss.detach(), **seen}
        sums.close()
        assert leaf.grad is not None
        if self._hidden.requires_grad:
            self._hidden.backward(leaf.grad)


class _Sums:
    """Gradients of the head over slices, added in float32 where its weights have fewer digits."""

    def __init__(self, module: torch.nn.Module):
        self._short = {p: None for p in module.parameters() if p.requires_grad and p.dtype != torch.float32}
        self._before = {p: p.grad for p in self._short}
        self._sums: dict[Tensor, Tensor] = {}
        for p in self._short:
            p.grad = None

    def add(self) -> None:
        """Take over what the last slice has left."""
        for p in self._short:
            if p.grad is not None:
                self._sums[p] = p.grad.float() if p not in self._sums else self._sums[p].add_(p.grad)
                p.grad = None

    def close(self) -> None:
        """Give the sums back."""
        for p, before in self._before.items():
            total = self._sums.get(p)
            p.grad = before if total is None else total.to(p.dtype) if before is None else (total + before).to(p.dtype)
