"""Targets -> one padded Batch. The only place that knows about padding and about the divisor."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from potstill.types import Batch, Target


def count_tokens(targets: Sequence[Target]) -> float:
    """Tokens that carry a loss, of any term: the one divisor of a batch, at least 1."""
    return max(float(sum(_trained(t).sum().item() for t in targets)), 1.0)


def collate(targets: Sequence[Target], n_tokens: float | None = None) -> Batch:
    """Pad targets to [B, T]. `n_tokens` is the divisor of the *whole* batch where this is one micro-batch of it."""

    def pad(name: str, fill: float = 0.0) -> Tensor | None:
        rows = [getattr(t, name) for t in targets]
        return None if rows[0] is None else pad_sequence(rows, batch_first=True, padding_value=fill)

    labels = [torch.tensor(t.rollout.response_ids, dtype=torch.long) for t in targets]
    old = [t.rollout.old_logp for t in targets]
    weight = pad("weight")
    assert weight is not None
    return Batch(
        prompt_ids=tuple(t.rollout.prompt_ids for t in targets),
        labels=pad_sequence(labels, batch_first=True, padding_value=0),
        mask=pad_sequence([torch.ones(len(row)) for row in labels], batch_first=True, padding_value=0.0),
        weight=weight,
        old_logp=None
        if any(row is None for row in old)
        else pad_sequence([torch.tensor(row) for row in old], batch_first=True, padding_value=0.0),
        anchor=pad("anchor"),
        advantage=pad("advantage"),
        teacher_ids=pad("teacher_ids"),
        teacher_logp=pad("teacher_logp"),
        n_tokens=count_tokens(targets) if n_tokens is None else n_tokens,
    )


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    tensors: dict[str, Any] = {
        f.name: v.to(device) for f in fields(batch) if torch.is_tensor(v := getattr(batch, f.name))
    }
    return replace(batch, **tensors)


def info_means(targets: Sequence[Target]) -> dict[str, float]:
    """Every `info` number averaged over the tokens of all targets; nan, "does not apply", is left out."""
    names = dict.fromkeys(name for t in targets for name in t.info)
    means = {n: torch.cat([t.info[n] for t in targets if n in t.info]).nanmean().item() for n in names}
    return {name: mean for name, mean in means.items() if mean == mean}


def _trained(target: Target) -> Float[Tensor, " T"]:
    return ((target.weight != 0) | (target.anchor != 0 if target.anchor is not None else False)).float()
