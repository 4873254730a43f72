"""Targets -> one padded Batch. The only place that knows about padding and about the divisor."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from potstill.types import Batch, Continuation, Target


def count_tokens(targets: Sequence[Target]) -> float:
    """Tokens that carry a loss, of any term: the one divisor of a batch, at least 1. Those of a branch count by its share."""
    branches = sum(c.share * len(c.ids) for t in targets for c in t.continuations)
    return max(float(sum(_trained(t).sum().item() for t in targets) + branches), 1.0)


def read_tokens(target: Target) -> int:
    """Tokens of the rows that a target becomes, prompts included."""
    r = target.rollout
    return len(r.prompt_ids) + sum(
        [len(r.response_ids), *(len(r.prompt_ids) + c.start + len(c.ids) for c in target.continuations)]
    )


def collate(targets: Sequence[Target], n_tokens: float | None = None, n_rollouts: int | None = None) -> Batch:
    """Pad targets to [B, T]. `n_tokens` and `n_rollouts` are those of the *whole* batch if this is a part of it.

    Targets come first, then the branches of each. What only some of them have is 0 on the others, and carries no weight
    there. A target without weight of its own, all of whose tokens are in its branches, is left out.
    """
    n_tokens = count_tokens(targets) if n_tokens is None else n_tokens
    n_rollouts = len(targets) if n_rollouts is None else n_rollouts
    branches = [_branch(t, c) for t in targets for c in t.continuations]
    given = [*targets, *branches]
    targets = [t for t in targets if not t.continuations or _trained(t).any()] + branches

    def field(name: str) -> Tensor | None:
        like = next((v for t in given if (v := getattr(t, name)) is not None), None)
        if like is None:
            return None
        rows = [getattr(t, name) for t in targets]
        full = [
            like.new_zeros(n, *like.shape[1:]) if row is None else row for row, n in zip(rows, lengths, strict=True)
        ]
        return pad_sequence(full, batch_first=True)

    lengths = [len(t.rollout.response_ids) for t in targets]
    trained = [_trained(t) for t in targets]
    heads = {t.teacher_head for t in given if t.teacher_head is not None}
    assert len(heads) < 2, "hidden states of several teachers in one batch"
    labels = [torch.tensor(t.rollout.response_ids, dtype=torch.long) for t in targets]
    old = [torch.tensor(t.rollout.old_logp or [0.0] * n) for t, n in zip(targets, lengths, strict=True)]
    return Batch(
        prompt_ids=tuple(t.rollout.prompt_ids for t in targets),
        labels=pad_sequence(labels, batch_first=True),
        mask=pad_sequence([torch.ones(n) for n in lengths], batch_first=True),
        weight=pad_sequence([t.weight for t in targets], batch_first=True),
        old_logp=pad_sequence(old, batch_first=True),
        anchor=field("anchor"),
        advantage=field("advantage"),
        imitate=field("imitate"),
        teacher_ids=field("teacher_ids"),
        teacher_logp=field("teacher_logp"),
        teacher_hidden=field("teacher_hidden"),
        teacher_head=next(iter(heads), None),
        trained=pad_sequence(trained, batch_first=True),
        of_answer=pad_sequence(
            [t.sum().clamp(min=1).expand_as(t) for t in trained], batch_first=True, padding_value=1.0
        ),
        n_tokens=n_tokens,
        n_rollouts=float(n_rollouts),
    )


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    tensors: dict[str, Any] = {
        f.name: v.to(device) for f in fields(batch) if torch.is_tensor(v := getattr(batch, f.name))
    }
    return replace(batch, **tensors)


def info_means(targets: Sequence[Target]) -> dict[str, float]:
    """Every `info` number averaged over the tokens of all targets; nan, "does not apply", is left out.

    Those named *_rms are averaged by the root of the mean of squares.
    """
    names = dict.fromkeys(name for t in targets for name in t.info)
    values = {n: torch.cat([t.info[n] for t in targets if n in t.info]) for n in names}
    means = {
        n: v.square().nanmean().sqrt().item() if n.endswith("_rms") else v.nanmean().item() for n, v in values.items()
    }
    return {name: mean for name, mean in means.items() if mean == mean}


def _branch(target: Target, branch: Continuation) -> Target:
    """A row whose prompt is the prompt and the beginning of the rollout."""
    r, length = target.rollout, len(branch.ids)
    row = replace(
        r,
        author="teacher",
        prompt_ids=(*r.prompt_ids, *r.response_ids[: branch.start]),
        response_ids=branch.ids,
        pieces=("",) * length,
        old_logp=None,
        entropy=None,
        guided=0,
    )
    none = torch.zeros(length)
    return Target(source=replace(target.source, rollout=row), weight=none, imitate=none + branch.share)


def _trained(target: Target) -> Float[Tensor, " T"]:
    terms = [v for v in (target.weight, target.anchor, target.imitate) if v is not None]
    return torch.stack([v != 0 for v in terms]).any(0).float()
