"""Make `generate` write given tokens, so that both sides do exactly the same work.

Forward passes, cache, sampling and stopping are all paid for; only the choice is fixed. The processor's own time is kept
apart and taken off the side that it slows down.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from benchmarks.worker import Clock


class Follow(LogitsProcessor):
    """All probability on the next given token of each row; on `pad` where a row has ended."""

    def __init__(self, rows: Sequence[Sequence[int]], pad: int, *, keep: bool = False):
        self.clock, self.step, self.keep = Clock(), 0, keep
        self.width = max(map(len, rows))
        self.ids = torch.tensor([[*r, *[pad] * (self.width - len(r))] for r in rows])
        self.lengths = torch.tensor([len(r) for r in rows])
        self.logp = torch.zeros(self.ids.shape)
        """Log-prob of each given token, if `keep`: what shows that both decoders computed the same."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """[R, V] -> [R, V]."""
        with self.clock:
            assert self.step < self.width, "the followed rows had ended, but generate went on"
            given = self.ids[:, self.step, None]
            if self.keep:
                self.logp[:, self.step] = scores.float().log_softmax(-1).gather(-1, given)[:, 0]
            self.step += 1
            only = torch.full_like(scores, -torch.inf)
            return only.scatter_(-1, given, 0.0)

    def mean_logp(self) -> float:
        """Over all given tokens."""
        return float(self.summed() / self.lengths.sum())

    def summed(self) -> Tensor:
        """Log-prob of all given tokens together."""
        written = torch.arange(self.width) < self.lengths[:, None]
        return self.logp.double().masked_fill(~written, 0.0).sum()
