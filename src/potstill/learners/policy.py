"""The student as a method sees it: the readable definition on whole answers, and the fast one on some tokens of them."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.divergence import jsd
from potstill.learners.fused import matched
from potstill.split import Head
from potstill.types import Batch

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class View(ABC):
    """What a model thinks of B T tokens, computed when it is first asked."""

    def __init__(self, reference: "Callable[[], View] | None"):
        self._refer = reference

    @property
    @abstractmethod
    def logits(self) -> Float[Tensor, "B T V"]:
        """Of the distributions that produced the tokens."""

    def divergence(
        self, teacher_logp: Float[Tensor, "B T V"], beta: float, temperature: float = 1.0
    ) -> Float[Tensor, "B T"]:
        """`jsd` of the student's distribution at a temperature and the teacher's, nats per token."""
        return jsd(self._all / temperature, teacher_logp, beta)

    @cached_property
    def _all(self) -> Float[Tensor, "B T V"]:
        return self.logits.log_softmax(-1)

    def logp(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """log pi(ids_t | h_t)."""
        return self._all.gather(-1, ids[..., None])[..., 0]

    def logp_at(self, ids: Int[Tensor, "B T K"]) -> Float[Tensor, "B T K"]:
        """log pi(ids_tk | h_t)."""
        return self._all.gather(-1, ids)

    def logp_all(self) -> Float[Tensor, "B T V"]:
        """log pi(. | h_t)."""
        return self._all

    @cached_property
    def reference(self) -> "View":
        """The initial weights' view of the same tokens, without gradient."""
        return self._refer() if self._refer else Nobody(None)


class Nobody(View):
    """In the place of a reference that there is not."""

    @property
    def logits(self) -> Float[Tensor, "B T V"]:
        """None."""
        raise AssertionError("the method did not declare that it needs the reference")


class LocalPolicy(View):
    """A batch as it is. The forward pass runs once, inside `around`."""

    def __init__(
        self,
        model: Any,
        vocab: int,
        batch: Batch,
        *,
        around: Context = contextlib.nullcontext,
        reference: Callable[[], View] | None = None,
    ):
        super().__init__(reference)
        self._model, self._vocab, self._batch, self._around = model, vocab, batch, around

    @cached_property
    def logits(self) -> Float[Tensor, "B T V"]:
        """Row t is the distribution that produces labels[:, t]; prompts are padded on the left, responses on the right."""
        device = self._model.device
        width = max(len(p) for p in self._batch.prompt_ids)
        pads = [width - len(p) for p in self._batch.prompt_ids]
        prompts = torch.tensor(
            [[0] * n + list(p) for n, p in zip(pads, self._batch.prompt_ids, strict=True)], device=device
        )
        ids = torch.cat([prompts, self._batch.labels], 1)
        column = torch.arange(ids.shape[1], device=device)
        start = torch.tensor(pads, device=device)[:, None]
        read = torch.cat([column[:width] >= start, self._batch.mask.bool()], 1)
        with self._around():
            out = self._model(
                input_ids=ids[:, :-1],
                attention_mask=read[:, :-1],
                position_ids=(read[:, :-1].long().cumsum(1) - 1).clamp(min=0),
                logits_to_keep=self._batch.labels.shape[1],
                use_cache=False,
            )
        return out.logits[..., : self._vocab].float()


class Slice(View):
    """Some tokens, [1, n], from the hidden states that produced them."""

    def __init__(self, hidden: Float[Tensor, "1 n H"], head: Head, *, reference: Callable[[], View] | None = None):
        super().__init__(reference)
        self._hidden, self._head = hidden, head

    @cached_property
    def logits(self) -> Float[Tensor, "1 n V"]:
        """Of the distributions that produced the tokens."""
        return self._head(self._hidden)

    def divergence(
        self, teacher_logp: Float[Tensor, "1 n V"], beta: float, temperature: float = 1.0
    ) -> Float[Tensor, "1 n"]:
        """In one pass over the vocabulary."""
        if temperature != 1:
            logits = self.logits / temperature
            return matched(logits, logits.detach().log_softmax(-1), teacher_logp, beta)
        return matched(self.logits, self._all.detach(), teacher_logp, beta)
