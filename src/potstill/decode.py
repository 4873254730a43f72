"""Writing with a Hugging Face model: one decoder for student rollouts, teacher rollouts and chunk audits.

Rows that share a beginning share its forward pass. A *trunk* is a sequence that is read once; each row names its trunk,
takes over the cache of as many tokens as its own prefix has in common with it, and goes on from there in one batch with
all others, each at its own position:

    trunk   p p p y y y y y y y y            one prefill
    row 1   p p p y y|u u u u                 N rows per anchor, M anchors, all in one decode
    row 2   p p p y y y y y y|u u u u

A row with a trunk of its own is the naive path; `tests/contract` holds the shared one to it.

Two things can read a batch: `potstill.kv.Cache`, for the models that `potstill.lean` knows, and `Modules`, the model's own
forward pass, for all others and as the reference. In the latter, rows that share different amounts leave unused columns in
the cache. A sliding window counts columns, so with such a model only rows that share equally much decode together.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from potstill.kv import Cache, fitting
from potstill.lean import Lean
from potstill.seeds import uniforms
from potstill.types import Finish

WIDE = 1 << 25
"""Rows times vocabulary while drawing tokens: about five float32 tensors of this size, whatever the model."""
SCORES = 32
"""Scores of attention that weigh as much as one cell, at the least: there is one per head, and in one layer at a time."""
LEAVE = 8
"""Rows that are over leave when they are one in so many."""


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


Ended = Callable[[Row, Written], object]
"""Is told of a row that is over, and what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How to draw a token. At temperature 1 and top_p 1 it is the model itself; temperature 0 takes the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    cells: int = 65_536
    """Rows times columns of the cache held at once: the bound on memory."""


def write(
    model: Any,
    trunks: Sequence[Sequence[int]],
    rows: Sequence[Row],
    *,
    vocab: int,
    eos: Sequence[int],
    how: Decoding = Decoding(),
    fast: bool = True,
    ended: Ended | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> list[Written]:
    """Continue every row until it ends or reaches its limit. Same seeds, same text, whatever the tiling.

    `fast` off: by the model's own forward pass, even where `potstill.lean` knows the model. `ended` is called with each row
    as soon as it is over, while others still are written. Where nothing is `wanted` any more it raises CancelledError.
    """
    if not rows:
        return []
    was_training = model.training
    model.eval()
    out: dict[int, Written] = {}
    try:
        shared = [_shared(trunks, row) for row in rows]
        narrow = _narrow(model, rows, shared)
        lean = fitting(model, vocab) if fast and not narrow else None
        order = sorted(range(len(rows)), key=lambda i: shared[i]) if narrow else list(range(len(rows)))
        apart = lean is not None and _pays(rows, shared)
        with torch.no_grad() if lean is None else torch.inference_mode():
            for tile in cut(rows, order, shared, how.cells, max(WIDE // vocab, 1), apart=apart, alike=narrow):
                some, begun = [rows[i] for i in tile], [shared[i] for i in tile]
                at = reader(model, lean, trunks, some, begun, vocab, apart)
                out |= zip(tile, _Tile(at, some, begun, eos, how, ended, wanted).run(), strict=True)
    finally:
        model.train(was_training)
    return [out[i] for i in range(len(rows))]


def _own(row: Row, shared: int) -> int:
    """Tokens that a row reads by itself."""
    return len(row.prefix) - shared + row.limit


def _pays(rows: Sequence[Row], shared: Sequence[int]) -> bool:
    """Whether trunks are to be held apart from their rows: they are shared, and longer than what comes after them."""
    return len({r.trunk for r in rows}) < len(rows) and max(shared) > max(map(_own, rows, shared))


def cut(
    rows: Sequence[Row],
    order: Sequence[int],
    shared: Sequence[int],
    cells: int,
    most: int,
    *,
    apart: bool,
    alike: bool,
) -> list[list[int]]:
    """The rows in `order`, cut at `most` rows, where they would hold more than `cells`, or where `shared` changes.

    Trunks that are held apart count once; that each row has scores for all of its trunk counts a little too.
    """
    tiles: list[list[int]] = []
    used, longest, tail = set[int](), 0, 0
    for i in order:
        trunk, own = rows[i].trunk, _own(rows[i], shared[i])
        if tiles:
            used, longest, tail = used | {trunk}, max(longest, shared[i]), max(tail, own)
            n = len(tiles[-1]) + 1
            held = len(used) * longest + n * tail + n * longest // SCORES if apart else n * (longest + tail)
        if not tiles or held > cells or n > most or (alike and shared[tiles[-1][-1]] != shared[i]):
            tiles.append([])
            used, longest, tail = {trunk}, shared[i], own
        tiles[-1].append(i)
    return tiles


def _narrow(model: Any, rows: Sequence[Row], shared: Sequence[int]) -> bool:
    """Whether some layer of the model looks back on fewer columns than the cache may come to have."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    return window is not None and window < max(shared) + max(map(_own, rows, shared))


def _shared(trunks: Sequence[Sequence[int]], row: Row) -> int:
    """Tokens that a row takes over. The last one of a prefix is always fed anew: its logits are what we are after."""
    return min(common(trunks[row.trunk], row.prefix), len(row.prefix) - 1)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class Modules:
    """The model's own forward pass and cache: the reference for `potstill.kv`, and the way of models it does not know."""

    def __init__(
        self,
        model: Any,
        trunks: Sequence[Sequence[int]],
        place: Sequence[int],
        shared: Sequence[int],
        vocab: int,
    ):
        """Row r takes over the first `shared[r]` tokens of the trunk `place[r]`."""
        self.model, self.vocab, self.device = model, vocab, model.device
        self.cache = DynamicCache()
        self.position = torch.tensor(shared, device=self.device)
        columns = max(map(len, trunks))
        if columns:
            ids = torch.tensor([[*t, *(0,) * (columns - len(t))] for t in trunks], device=self.device)
            length = torch.tensor([len(t) for t in trunks], device=self.device)
            mask = torch.arange(columns, device=self.device) < length[:, None]
            model(input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache.batch_select_indices(torch.tensor(place, device=self.device))
        self.valid = torch.arange(columns, device=self.device) < self.position[:, None]

    def read(self, token: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """One more token of each row; logits of the next."""
        self.valid = torch.cat([self.valid, self.valid.new_ones(len(token), 1)], 1)
        out = self.model(
            input_ids=token[:, None],
            attention_mask=self.valid,
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.position = self.position + 1
        return out.logits[:, -1, : self.vocab].float()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        at = torch.tensor(rows, device=self.device)
        self.position, self.valid = self.position[at], self.valid[at]
        self.cache.batch_select_indices(at)


def reader(
    model: Any,
    lean: Lean | None,
    trunks: Sequence[Sequence[int]],
    rows: Sequence[Row],
    shared: Sequence[int],
    vocab: int,
    apart: bool,
) -> Cache | Modules:
    """What has read as much of each trunk as some row shares."""
    used = sorted({r.trunk for r in rows})
    need = {t: max(s for r, s in zip(rows, shared, strict=True) if r.trunk == t) for t in used}
    place = [used.index(r.trunk) for r in rows]
    read = [list(trunks[t][: need[t]]) for t in used]
    if lean is None:
        return Modules(model, read, place, shared, vocab)
    return Cache(lean, read, place, shared, max(map(_own, rows, shared)), apart=apart and max(shared) > 0)


class _Tile:
    """Rows that decode together. Row r writes from step `first[r]` to step `last[r]`, and then leaves the batch."""

    def __init__(
        self,
        reader: Cache | Modules,
        rows: Sequence[Row],
        shared: Sequence[int],
        eos: Sequence[int],
        how: Decoding,
        ended: Ended | None,
        wanted: Callable[[], bool],
    ):
        self.reader, self.rows, self.shared, self.eos, self.how = reader, rows, shared, set(eos), how
        self.ended, self.wanted = ended, wanted
        self.pending = [r.prefix[s:] for r, s in zip(rows, shared, strict=True)]
        self.first = [len(p) - 1 for p in self.pending]
        self.last = [f + r.limit - 1 for f, r in zip(self.first, rows, strict=True)]
        self.finish: list[Finish] = ["length"] * len(rows)
        draws = np.zeros((max(self.last) + 1, len(rows)), np.float32)
        for i, r in enumerate(rows):
            draws[self.first[i] : self.last[i] + 1, i] = uniforms(r.seed, r.limit)
        self.draws = torch.from_numpy(draws).to(reader.device)
        self.said: list[tuple[list[int], list[np.ndarray]]] = []
        """Spells in which the batch stayed the same: its rows, and tokens, log-probs and entropies, [steps, rows] each."""

    def run(self) -> list[Written]:
        """Step by step until every row is over."""
        alive, over = list(range(len(self.rows))), set[int]()  # rows; which places among them are idle
        steps: list[tuple[Tensor, ...]] = []
        token = torch.zeros(len(alive), dtype=torch.long, device=self.reader.device)
        draws = self.draws
        for step in range(len(draws)):
            if not self.wanted():
                raise CancelledError
            token = self._given(step, alive, token)
            steps.append(_draw(self.reader.read(token), draws[step], self.how))
            token = steps[-1][0]
            new = []
            for at, (row, t) in enumerate(zip(alive, token.tolist(), strict=True)):
                if at not in over and step >= self.first[row] and (t in self.eos or step == self.last[row]):
                    over.add(at)
                    new.append(row)
                    self.last[row] = step
                    self.finish[row] = "stop" if t in self.eos else "length"
            if new and self.ended:
                steps = self._keep(alive, steps)
                for row, written in zip(new, self._collect(new), strict=True):
                    self.ended(self.rows[row], written)
            if len(over) * LEAVE >= len(alive):
                steps = self._keep(alive, steps)
                keep = _closed(len(alive), over)
                if not keep:
                    break
                self.reader.keep(keep)
                at_ = torch.tensor(keep, device=token.device)
                token, draws, alive, over = token[at_], draws[:, at_], [alive[i] for i in keep], set()
        return self._collect(range(len(self.rows)))

    def _keep(self, alive: list[int], steps: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """Write down the steps of these rows; none are left."""
        if steps:
            self.said.append((alive, [torch.stack(parts).cpu().numpy() for parts in zip(*steps, strict=True)]))
        return []

    def _given(self, step: int, alive: Sequence[int], token: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """The rows' own beginnings, one token at each step, in place of what was drawn."""
        if step > max(self.first):
            return token
        given = {at: self.pending[r][step] for at, r in enumerate(alive) if step <= self.first[r]}
        if given:
            where = torch.tensor(list(given), device=token.device)
            token = token.index_copy(0, where, torch.tensor(list(given.values()), device=token.device))
        return token

    def _collect(self, rows: Sequence[int]) -> list[Written]:
        """What these rows, which are over, came to."""
        size = (max(self.last[r] for r in rows) + 1, len(rows))
        ids, logp, entropy = np.zeros(size, np.int64), np.zeros(size, np.float32), np.zeros(size, np.float32)
        column, end = {r: i for i, r in enumerate(rows)}, 0
        for alive, said in self.said:
            start, end = end, end + len(said[0])
            if here := [(at, column[r]) for at, r in enumerate(alive) if r in column]:
                at, into = map(list, zip(*here, strict=True))
                ids[start:end, into], logp[start:end, into], entropy[start:end, into] = (part[:, at] for part in said)
        return [
            Written(
                ids=tuple(ids[self.first[r] : self.last[r] + 1, i].tolist()),
                logp=tuple(logp[self.first[r] : self.last[r] + 1, i].tolist()),
                entropy=tuple(entropy[self.first[r] : self.last[r] + 1, i].tolist()),
                finish=self.finish[r],
                shared=self.shared[r],
            )
            for i, r in enumerate(rows)
        ]


def _closed(count: int, gone: Collection[int]) -> list[int]:
    """The places that stay, with the last of them in the gaps."""
    left = count - len(gone)
    tail = [i for i in range(left, count) if i not in gone]
    return [tail.pop() if i in gone else i for i in range(left)]


def _draw(
    logits: Float[Tensor, "R V"], draw: Float[Tensor, " R"], how: Decoding
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]:
    """A token for each row, its log-prob and the entropy."""
    logp, probability = logits.log_softmax(-1), logits.softmax(-1)
    entropy = -torch.linalg.vecdot(probability, logp.clamp_min_(torch.finfo(logp.dtype).min))
    token = _choose(logp, probability, draw, how)
    return token, logp.gather(-1, token[:, None])[:, 0], entropy


def _choose(
    logp: Float[Tensor, "R V"], probability: Float[Tensor, "R V"], draw: Float[Tensor, " R"], how: Decoding
) -> Int[Tensor, " R"]:
    """Inverse of the cumulative distribution: one number in [0, 1) decides a token, whatever the batch around it.

    `probability` is used up.
    """
    if how.temperature == 0:
        return logp.argmax(-1)
    if how.temperature != 1:
        probability = (logp / how.temperature).softmax(-1)
    if how.top_p < 1:
        ranked, order = probability.sort(-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= how.top_p
        probability = torch.zeros_like(ranked).scatter(-1, order, ranked.masked_fill(outside, 0.0))
    cdf = probability.cumsum_(-1)
    return torch.searchsorted(cdf, (draw * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logp.shape[-1] - 1)
