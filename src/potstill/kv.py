"""Keys and values of rows that decode together, each read once and kept where it was written.

A row's past lies in two parts: what it shares with other rows of its trunk, and what is its own,

    out = (1 - w) softmax(s_own) V_own + w softmax(s_trunk) V_trunk      w = sigmoid(lse(s_trunk) - lse(s_own))

which is softmax([s_trunk, s_own]) [V_trunk; V_own], as lse is log sum exp. The trunk's part is stored once; all its rows
meet it in one product, each seeing as much of it as it shares. Where a trunk is short, or has one row, each row gets a copy
of what it shares instead, and there is one part.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from potstill.lean import Lean, known

TOKENS = 4096
"""Tokens of trunks read at once, padding included."""


class Cache:
    """R rows, G trunks, S columns of a trunk, C of a row. Row r has read the first `shared[r]` tokens of `place[r]`."""

    def __init__(
        self,
        lean: Lean,
        trunks: Sequence[Sequence[int]],
        place: Sequence[int],
        shared: Sequence[int],
        steps: int,
        *,
        apart: bool,
    ):
        """`trunks` no longer than needed; `steps` tokens at most will follow; `apart`: in two parts."""
        self.lean, self.apart, self.step = lean, apart, 0
        self.place, self.shared = list(place), list(shared)
        self.device = lean.embedding.device
        self.turns = lean.turns(max(shared) + steps)
        self.own = self._empty(len(place), steps if apart else max(shared) + steps)
        self.trunks = self._empty(len(trunks), max(shared)) if apart else self.own
        self.bias: Tensor | None = None
        self.unlike: Tensor | None = None
        """What is added to scores where rows have come to different columns; and of it the columns in use."""
        self._read(trunks)
        self._arrange()

    def _empty(self, rows: int, columns: int) -> list[Float[Tensor, "2 R K C D"]]:
        shape = (2, rows, self.lean.kv_heads, columns, self.lean.dim)
        like = self.lean.embedding
        return [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in self.lean.layers]

    @property
    def cells(self) -> int:
        """Columns held of all rows and trunks: the memory is so many times that of one token's keys and values."""
        held = (self.own, self.trunks) if self.apart else (self.own,)
        return sum(part[0].shape[1] * part[0].shape[3] for part in held)

    # --- trunks -----------------------------------------------------------------------------------------------------

    def _read(self, trunks: Sequence[Sequence[int]]) -> None:
        """Trunks of like length together, end to end; only for attention are they filled up to the same width."""
        order = sorted((i for i, t in enumerate(trunks) if len(t)), key=lambda i: len(trunks[i]))
        while order:
            width = len(trunks[order[-1]])
            some = order[-max(TOKENS // width, 1) :]
            del order[-len(some) :]
            begin = np.cumsum([0, *(len(trunks[i]) for i in some)])
            at = {i: row for row, i in enumerate(some)}
            into = some if self.apart else [r for r, i in enumerate(self.place) if i in at]
            source = [at[i if self.apart else self.place[i]] for i in into]
            inside = np.concatenate([np.arange(len(trunks[i])) for i in some])
            whole = np.repeat(np.arange(len(some)) * width, np.diff(begin)) + inside
            ragged = None if len(whole) == len(some) * width else self._tensor(whole)
            store = partial(self._store, len(some), width, ragged, self._tensor(into), self._tensor(source))
            ids = self._tensor([token for i in some for token in trunks[i]])
            self.lean.read(ids, self.turns[self._tensor(inside)], store)

    def _store(
        self,
        count: int,
        width: int,
        ragged: Int[Tensor, " N"] | None,
        into: Int[Tensor, " n"],
        source: Int[Tensor, " n"],
        layer: int,
        q: Float[Tensor, "N H D"],
        kv: Float[Tensor, "N K2 D"],
    ) -> Float[Tensor, "N HD"] | None:
        """Attention within `count` sequences of `width` tokens, of which `source` are kept as `into`.

        `ragged`: where each token stands in them. What stands behind the last one is not looked at.
        """
        if ragged is not None:
            q, kv = (t.new_zeros(count * width, *t.shape[1:]).index_copy_(0, ragged, t) for t in (q, kv))
        kv = kv.reshape(count, width, 2, self.lean.kv_heads, self.lean.dim).permute(2, 0, 3, 1, 4)
        self.trunks[layer][:, into, :, :width] = kv[:, source]
        if layer == len(self.own) - 1:
            return None
        q = q.reshape(count, width, self.lean.heads, self.lean.dim).transpose(1, 2)
        many = self.lean.heads != self.lean.kv_heads
        out = F.scaled_dot_product_attention(q, kv[0], kv[1], is_causal=True, scale=1.0, enable_gqa=many)
        out = out.transpose(1, 2).flatten(2).flatten(0, 1)
        return out if ragged is None else out[ragged]

    # --- rows -------------------------------------------------------------------------------------------------------

    def read(self, token: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """One more token of each row; logits of the next."""
        self.width += 1
        if self.bias is not None:
            self.bias.view(-1)[self.next[:, : self.lean.kv_heads]] = 0
        self.unlike = None if self.bias is None else self.bias.narrow(2, 0, self.width)
        x = self.lean.read(token, self.turns[self.position], self._attend)
        assert x is not None
        self.step += 1
        self.position += 1
        self.next += 1
        return self.lean.logits(x)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order. Cheapest where few rows change their place."""
        moved = [(i, r) for i, r in enumerate(rows) if i != r]
        if moved:
            into, source = (self._tensor(part) for part in zip(*moved, strict=True))
            for own in self.own:
                own[:, into, :, : self.width] = own[:, source, :, : self.width]
        self.place, self.shared = ([part[r] for r in rows] for part in (self.place, self.shared))
        left = sorted(set(self.place))
        if self.apart and len(left) * 2 <= self.trunks[0].shape[1]:
            self.trunks = [t[:, self._tensor(left)] for t in self.trunks]
            self.place = [left.index(t) for t in self.place]
        self._arrange()

    def _tensor(self, numbers: Sequence[int] | np.ndarray) -> Int[Tensor, " N"]:
        return torch.as_tensor(numbers, device=self.device)

    def _arrange(self) -> None:
        """Where everything stands, for as long as the rows stay the same."""
        rows, heads = len(self.place), self.lean.kv_heads
        _, places, _, columns, _ = self.own[0].shape
        self.position = self._tensor(self.shared) + self.step
        begun = [0] * rows if self.apart else self.shared
        self.width = max(begun) + self.step
        """Columns in use."""
        filled = self._tensor(begun) + self.step
        cell = torch.arange(places * heads, device=self.device).view(places, heads)[:rows] * columns + filled[:, None]
        self.next = torch.cat([cell, cell + places * heads * columns], 1)
        """[R, 2K] where the next key and value of each head go, counted in heads of one token."""
        self.cells_of = [own.view(-1, self.lean.dim) for own in self.own]
        self.views = [[part[:rows].flatten(0, 1) for part in own] for own in self.own]
        far = torch.finfo(self.own[0].dtype).min / 2  # finite: a row that shares nothing has an empty part, and no 0/0
        self.bias = None
        if len(set(begun)) > 1:
            empty = torch.arange(columns, device=self.device) >= filled[:, None, None]
            zero = torch.zeros(rows, heads, columns, dtype=self.own[0].dtype, device=self.device)
            self.bias = zero.masked_fill_(empty, far).view(rows * heads, 1, columns)
        if self.apart:
            self._arrange_trunks(far)

    def _arrange_trunks(self, far: float) -> None:
        """Rows of a trunk side by side, as many for each trunk; where there are fewer, another row fills the place."""
        groups: list[list[int]] = [[] for _ in range(self.trunks[0].shape[1])]
        for r, trunk in enumerate(self.place):
            groups[trunk].append(r)
        most = max(map(len, groups))
        grid = [r for group in groups for r in (*group, *(0,) * (most - len(group)))]
        at = {r: i for g, group in enumerate(groups) for i, r in enumerate(group, g * most)}
        self.grid = None if grid == list(range(len(self.place))) else self._tensor(grid)
        self.back = self._tensor([at[r] for r in range(len(self.place))])
        columns = torch.arange(self.trunks[0].shape[3], device=self.device)
        unseen = columns >= self._tensor([self.shared[r] for r in grid])[:, None]
        zero = torch.zeros_like(unseen, dtype=self.own[0].dtype)
        self.unseen = zero.masked_fill_(unseen, far).view(len(groups), 1, most, 1, -1)

    def _attend(self, layer: int, q: Float[Tensor, "R H D"], kv: Float[Tensor, "R K2 D"]) -> Float[Tensor, "R HD"]:
        self.cells_of[layer][self.next] = kv
        k, v = (part.narrow(1, 0, self.width) for part in self.views[layer])
        rows, q = q.shape[0], q.reshape(k.shape[0], -1, self.lean.dim)
        if not self.apart:
            s = torch.bmm(q, k.mT) if self.unlike is None else torch.baddbmm(self.unlike, q, k.mT)
            return torch.bmm(s.softmax(-1, dtype=torch.float32).to(v.dtype), v).view(rows, -1)
        own, lse = _part(torch.bmm(q, k.mT), v)
        trunk, trunk_lse = self._of_trunks(layer, q)
        return torch.lerp(own, trunk, torch.sigmoid(trunk_lse - lse)).to(v.dtype).view(rows, -1)

    def _of_trunks(
        self, layer: int, q: Float[Tensor, "RK rep D"]
    ) -> tuple[Float[Tensor, "RK rep D"], Float[Tensor, "RK rep 1"]]:
        """What rows take from their trunks, and lse of its scores."""
        k, v = self.trunks[layer].flatten(1, 2)
        count, _, most, _, _ = self.unseen.shape
        q = q.view(-1, self.lean.kv_heads, *q.shape[1:])
        q = q if self.grid is None else q[self.grid]
        q = q.view(count, most, *q.shape[1:]).transpose(1, 2)
        shape = q.shape[:-1]
        s = torch.bmm(q.reshape(k.shape[0], -1, self.lean.dim), k.mT)
        s.view(*shape, -1).add_(self.unseen)
        parts = (t.view(*shape, -1).transpose(1, 2).flatten(0, 1) for t in _part(s, v))
        out, lse = (t.flatten(0, 1) if self.grid is None else t[self.back].flatten(0, 1) for t in parts)
        return out, lse


def _part(
    s: Float[Tensor, "B n S"], v: Float[Tensor, "B S D"]
) -> tuple[Float[Tensor, "B n D"], Float[Tensor, "B n 1"]]:
    """softmax(s) v and lse(s), in float32. The largest p is exp(max(s) - lse), so lse needs no exp of its own."""
    p = s.softmax(-1, dtype=torch.float32)
    lse = s.amax(-1, keepdim=True).float() - p.amax(-1, keepdim=True).log_()
    return torch.bmm(p.to(v.dtype), v).float(), lse


_VERDICTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def fitting(model: Any, vocab: int) -> Lean | None:
    """A model's weights for `Cache`; None if its forward pass is another than Lean's. Decided by its parts, then by a try."""
    if not known(model):
        return None
    if model not in _VERDICTS:
        _VERDICTS[model] = _agrees(model)
    return Lean(model, vocab) if _VERDICTS[model] else None


def _agrees(model: Any) -> bool:
    """Whether logits after two sequences, half of each read at once, are the model's own up to rounding."""
    size = model.config.vocab_size
    ids = (torch.arange(16, device=model.device).view(2, 8) * 7 + 1) % size
    theirs = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    cache = Cache(Lean(model, size), ids[:, :4].tolist(), [0, 1], [4, 4], 4, apart=False)
    ours = [cache.read(token) for token in ids.T[4:]][-1]
    # Below float32 two of transformers' own kinds of attention differ by up to 5 eps.
    rounding = 1e-4 if model.dtype == torch.float32 else 10 * torch.finfo(model.dtype).eps
    return bool((ours - theirs).abs().max() <= rounding * theirs.abs().max())
