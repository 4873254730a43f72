"""Writing with a Hugging Face model: one decoder for student rollouts, teacher rollouts and chunk audits.

Rows that share a beginning share its forward pass. A *trunk* is a sequence that is read once; each row names its trunk,
takes over the cache of as many tokens as its own prefix has in common with it, and goes on from there in one batch with
all others, each at its own position:

    trunk   p p p y y y y y y y y            one prefill
    row 1   p p p y y|u u u u                 N rows per anchor, M anchors, all in one decode
    row 2   p p p y y y y y y|u u u u

A row with a trunk of its own is the naive path; `tests/contract` holds the shared one to it.

Rows of one batch that share different amounts leave unused columns in the cache. A sliding window counts columns, so
with such a model only rows that share equally much decode together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from potstill.divergence import entropy
from potstill.seeds import uniforms
from potstill.types import Finish

WIDE = 1 << 25
"""Rows times vocabulary while drawing tokens: about five float32 tensors of this size, whatever the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sequence to go on with."""

    trunk: int
    """Index of the trunk whose forward pass it shares."""
    prefix: tuple[int, ...]
    limit: int
    """Tokens to write at most."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a model wrote: [T] ids, the end-of-sequence token included, with log-prob and entropy in nats."""

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    entropy: tuple[float, ...]
    finish: Finish
    shared: int
    """Tokens of the prefix that were read as part of the trunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How to draw a token. At temperature 1 and top_p 1 it is the model itself; temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    cells: int = 65_536
    """Rows times columns of the cache held at once: the bound on memory."""


@torch.no_grad()
def write(
    model: Any,
    trunks: Sequence[Sequence[int]],
    rows: Sequence[Row],
    *,
    vocab: int,
    eos: Sequence[int],
    how: Decoding = Decoding(),
) -> list[Written]:
    """Continue every row until it ends or reaches its limit. Same seeds, same text, whatever the tiling."""
    was_training = model.training
    model.eval()
    shared = [_shared(trunks, row) for row in rows]
    narrow = _narrow(model, rows, shared)
    order = sorted(range(len(rows)), key=lambda i: shared[i]) if narrow else list(range(len(rows)))
    out: dict[int, Written] = {}
    try:
        for tile in _tiles(trunks, rows, order, how.cells, max(WIDE // vocab, 1), shared if narrow else None):
            written = _Tile(model, trunks, [rows[i] for i in tile], vocab, eos, how).run()
            out |= zip(tile, written, strict=True)
    finally:
        model.train(was_training)
    return [out[i] for i in range(len(rows))]


def _tiles(
    trunks: Sequence[Sequence[int]],
    rows: Sequence[Row],
    order: Sequence[int],
    cells: int,
    most: int,
    alike: Sequence[int] | None,
) -> list[list[int]]:
    """The rows in `order`, cut where their cache would outgrow `cells`, at `most` rows, or where `alike` changes."""
    tiles: list[list[int]] = []
    columns = 0
    for i in order:
        own = max(len(trunks[rows[i].trunk]), len(rows[i].prefix)) + rows[i].limit
        columns = max(columns, own)
        full = not tiles or (len(tiles[-1]) + 1) * columns > cells or len(tiles[-1]) == most
        if full or (alike and alike[tiles[-1][-1]] != alike[i]):
            tiles.append([])
            columns = own
        tiles[-1].append(i)
    return tiles


def _narrow(model: Any, rows: Sequence[Row], shared: Sequence[int]) -> bool:
    """Whether some layer of the model looks back on fewer columns than the cache may come to have."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    if window is None or not rows:
        return False
    waiting = max(len(r.prefix) - s for r, s in zip(rows, shared, strict=True))
    return window < max(shared) + waiting + max(r.limit for r in rows)


def _shared(trunks: Sequence[Sequence[int]], row: Row) -> int:
    """Tokens that a row takes over. The last one of a prefix is always fed anew: its logits are what we are after."""
    return min(_common(trunks[row.trunk], row.prefix), len(row.prefix) - 1)


class _Tile:
    """Rows that decode together. R rows, S cached columns; rows that end leave the batch."""

    def __init__(
        self,
        model: Any,
        trunks: Sequence[Sequence[int]],
        rows: Sequence[Row],
        vocab: int,
        eos: Sequence[int],
        how: Decoding,
    ):
        self.model, self.rows, self.vocab, self.how = model, rows, vocab, how
        self.device = model.device
        self.eos = torch.tensor(list(eos), device=self.device)
        self.shared = [_shared(trunks, r) for r in rows]
        self.cache, self.valid = self._prefill(trunks)
        longest = max(r.limit for r in rows)
        draws = np.zeros((len(rows), longest), np.float32)
        for i, r in enumerate(rows):
            draws[i, : r.limit] = uniforms(r.seed, r.limit)
        self.draws = torch.from_numpy(draws).to(self.device)
        self.limit = torch.tensor([r.limit for r in rows], device=self.device)
        self.ids = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)
        self.logp = torch.zeros(len(rows), longest, device=self.device)
        self.entropy = torch.zeros(len(rows), longest, device=self.device)
        self.count = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        self.stopped = torch.zeros(len(rows), dtype=torch.bool, device=self.device)

    def _prefill(self, trunks: Sequence[Sequence[int]]) -> tuple[DynamicCache, Bool[Tensor, "R S"]]:
        used = sorted({r.trunk for r in self.rows})
        need = {t: max(s for r, s in zip(self.rows, self.shared, strict=True) if r.trunk == t) for t in used}
        columns = max(need.values())
        cache = DynamicCache()
        shared = torch.tensor(self.shared, device=self.device)
        if columns:
            ids = torch.zeros(len(used), columns, dtype=torch.long, device=self.device)
            for i, t in enumerate(used):
                ids[i, : need[t]] = torch.tensor(list(trunks[t][: need[t]]), device=self.device)
            length = torch.tensor([need[t] for t in used], device=self.device)
            read = torch.arange(columns, device=self.device) < length[:, None]
            self.model(input_ids=ids, attention_mask=read, past_key_values=cache, use_cache=True, logits_to_keep=1)
            place = {t: i for i, t in enumerate(used)}
            cache.batch_select_indices(torch.tensor([place[r.trunk] for r in self.rows], device=self.device))
        return cache, torch.arange(columns, device=self.device) < shared[:, None]

    def run(self) -> list[Written]:
        alive = torch.arange(len(self.rows), device=self.device)
        pending = [list(r.prefix[s:]) for r, s in zip(self.rows, self.shared, strict=True)]
        waiting = max(len(p) for p in pending)  # steps until every row has read its prefix
        token = torch.zeros(len(self.rows), dtype=torch.long, device=self.device)
        position = torch.tensor(self.shared, device=self.device)
        for step in range(10**9):
            if step < waiting:  # the rows' own beginnings, one token each
                given = torch.tensor([p[step] if step < len(p) else -1 for p in pending], device=self.device)
                token = torch.where(given >= 0, given, token)
            logits = self._forward(token, position)
            writes = torch.tensor([step >= len(p) - 1 for p in pending], device=self.device) if step < waiting else None
            token, over = self._draw(alive, logits, writes)
            position = position + 1
            if bool(over.all()):
                break
            if step >= waiting - 1 and int(over.sum()) * 2 >= len(alive):
                keep = (~over).nonzero()[:, 0]
                alive, token, position, self.valid = alive[keep], token[keep], position[keep], self.valid[keep]
                self.cache.batch_select_indices(keep)
        return self._collect()

    def _forward(self, token: Int[Tensor, " R"], position: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        self.valid = torch.cat([self.valid, self.valid.new_ones(len(token), 1)], 1)
        out = self.model(
            input_ids=token[:, None],
            attention_mask=self.valid,
            position_ids=position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1, : self.vocab].float()

    def _draw(
        self, alive: Int[Tensor, " R"], logits: Float[Tensor, "R V"], writes: Bool[Tensor, " R"] | None
    ) -> tuple[Int[Tensor, " R"], Bool[Tensor, " R"]]:
        """Draw a token per row, note it where the row is writing, and say which rows are over."""
        logp = logits.log_softmax(-1)
        at = self.count[alive]
        token = _choose(logp, self.draws[alive, at.clamp(max=self.draws.shape[1] - 1)], self.how)
        open_ = ~self.stopped[alive] & (at < self.limit[alive])
        if writes is not None:
            open_ &= writes
        here, column = alive[open_], at[open_]
        self.ids[here, column] = token[open_]
        self.logp[here, column] = logp[open_].gather(-1, token[open_, None])[:, 0]
        self.entropy[here, column] = entropy(logp[open_])
        self.count[here] += 1
        self.stopped[here] = torch.isin(token[open_], self.eos)
        return token, self.stopped[alive] | (self.count[alive] >= self.limit[alive])

    def _collect(self) -> list[Written]:
        ids, logp, ent = self.ids.tolist(), self.logp.tolist(), self.entropy.tolist()
        count, stopped = self.count.tolist(), self.stopped.tolist()
        return [
            Written(
                ids=tuple(ids[i][: count[i]]),
                logp=tuple(logp[i][: count[i]]),
                entropy=tuple(ent[i][: count[i]]),
                finish="stop" if stopped[i] else "length",
                shared=self.shared[i],
            )
            for i in range(len(self.rows))
        ]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _choose(logp: Float[Tensor, "R V"], draw: Float[Tensor, " R"], how: Decoding) -> Int[Tensor, " R"]:
    """Inverse of the cumulative distribution: one number in [0, 1) decides a token, whatever the batch around it."""
    if how.temperature == 0:
        return logp.argmax(-1)
    probability = (logp / how.temperature).softmax(-1)
    if how.top_p < 1:
        ranked, order = probability.sort(-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= how.top_p
        probability = torch.zeros_like(ranked).scatter(-1, order, ranked.masked_fill(outside, 0.0))
    cdf = probability.cumsum(-1)
    return torch.searchsorted(cdf, (draw * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logp.shape[-1] - 1)
