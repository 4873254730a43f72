"""Per-token feedback of a teacher with another tokenizer, through the text that both write.

    y_1 .. y_T      the answer in the student's tokens; y_t writes the characters a_t .. e_t of the text
    z_1 .. z_S      the same text in the teacher's tokens, which end at the boundaries 0 = b_0 < b_1 < .. < b_S
    p_i(v)          pi_T(v | x, z_1 .. z_i), the teacher's next token at b_i
    C_i             log pi_T(z_1 .. z_i | x)

    m_t(s) = sum_{i <= k} exp(C_i - C_k) sum_v p_i(v) [z_1 .. z_i v writes more than text[:a_t], and the student reads it
             as y_1 .. y_{t-1} s ..]                                       b_k: the last boundary at or before a_t
    q_t(s) = m_t(s) / sum_s m_t(s)                                         what stands in for pi_T(s | x, y_<t)

The terms of i < k (and of i = k where b_k < a_t) are tokens that reach over a_t: a teacher that writes `5;` as one token
gives no `;` after a `5` of its own, but it did not mean that none can follow. A token of the teacher counts for the first
token in which the student reads the rest of its text; the teacher's end of sequence is the student's; a token that both
vocabularies spell alike is itself. With the student's own tokenizer q_t is therefore pi_T.

    u_t = sum_{i <= k} exp(C_i - C_k) sum_v p_i(v) [v ends in b_k .. a_t, b_k excluded]  +  tokens without a counterpart

is what one reading of z_1 .. z_S cannot follow up: where a_t lies inside a teacher's token, how the teacher would go on had
it stopped there. A position is *aligned* if sum m_t >= KNOWN (sum m_t + u_t), y_t ends within the teacher's token that holds
a_t, and q_t(y_t) > 0. Up to unusual ways of cutting a text, q_t is exact for a student of single characters wherever
a_t is a boundary, and off by at most 1 - KNOWN in total variation elsewhere. For longer student tokens it is an
approximation: a student's token that spans a boundary of the teacher's alternatives gets nothing of their probability.

Where q_t(y_t) is not known, because y_t spans several of the teacher's tokens or a server shows log pi_T(z_j | ..) alone,
methods that need nothing but the sampled token have the chain rule: C_j - C_i for y_t from b_i to b_j. It is exact for the
text as the teacher cuts it, and so already knows a little of what follows: that the last token did not go on.

Never aligned: characters that the student writes in several tokens, the student's control tokens other than its end, and
the first token where a tokenizer begins a text otherwise than it goes on (a mark for a space). Tokens that hold part of a
character have a counterpart only where both vocabularies spell them alike.
"""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from potstill import chat
from potstill.models import Tokens
from potstill.types import Rollout

KNOWN = 0.9
"""Least share of what the teacher may do at a position that must be known."""
VANISHING = 1e-6
"""A smaller sum m_t is noise: what the teacher would do after something that it never does."""
NEGLIGIBLE = 1e-10
"""A token of less weight is not looked up. Against C_k."""
FLOOR = -25.0
"""Nats: log q of tokens that nothing counts for, so that reverse KL stays finite."""
ANCHOR = "\n"
"""What stands before a text that is read as the continuation of another."""
LAST = chr(0x10FFFF)
"""Behind every other character."""
REMEMBERED = 1 << 16
"""Places in words of which we keep how the student reads on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One answer in both vocabularies."""

    text: str
    mine: tuple[int, ...]
    """[T] y."""
    starts: tuple[int, ...]
    """[T + 1] a_1 .. a_T, e_T."""
    theirs: tuple[int, ...]
    """[S] z."""
    bounds: tuple[int, ...]
    """b_0, b_1, ... without those inside a character, and only as far as the teacher's tokens spell the text."""
    read: tuple[int, ...]
    """Tokens of z before each of them."""
    marked: bool
    """Whether the first of z begins otherwise than it would go on."""


class Aligner:
    """Maps what a teacher thinks of its own tokens to the student's. Made once: it reads both vocabularies (seconds)."""

    def __init__(self, student: Tokens, teacher: Tokens):
        self.student, self.teacher = student, teacher
        self._before = _anchor(student.tokenizer)
        self._mine, self._theirs = _texts(student), _texts(teacher)
        self._first = torch.tensor(self._counterparts())
        whole = [(text, v) for v, text in enumerate(self._theirs) if text and chat.REPLACEMENT not in text]
        self._order = torch.tensor([v for _, v in sorted(whole)], dtype=torch.long)
        self._sorted = [text for text, _ in sorted(whole)]
        self._longest = max(len(text) for text in self._sorted)
        self._spelt: dict[str, list[int]] = defaultdict(list)
        for text, v in whole:
            self._spelt[text].append(v)
        self._onward: dict[tuple[str, tuple[int, ...]], dict[int, int]] = defaultdict(dict)

    # --- vocabularies -------------------------------------------------------------------------------------------

    def _counterparts(self) -> list[int]:
        """[V] for each of the teacher's tokens what the student would write first; V of the student where nothing."""
        ids, nowhere = self.student.tokenizer.get_vocab(), self.student.vocab
        names = self.teacher.tokenizer.convert_ids_to_tokens(list(range(self.teacher.vocab)))
        out: list[int] = []
        for v, (name, text, read) in enumerate(zip(names, self._theirs, self._read(self._theirs), strict=True)):
            alike = ids.get(name, nowhere)
            if v in self.teacher.eos:
                out.append(alike if alike in self.student.eos else self.student.eos[0])
            elif alike < nowhere and self._mine[alike] == text:
                out.append(alike)
            else:
                out.append(read[0] if read and self._begins(text, read[0]) else nowhere)
        return out

    def _read(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The student's tokens of texts that continue another."""
        before = ANCHOR if self._before else ""
        found = self.student.tokenizer([before + t for t in texts], add_special_tokens=False)["input_ids"]
        return [tuple(ids[self._before :]) for ids in found]

    def _begins(self, text: str, token: int) -> bool:
        """Whether a text can begin with a token of the student: it does, or with part of a character."""
        mine = self._mine[token]
        return chat.REPLACEMENT not in text and bool(mine) and (text.startswith(mine) or chat.REPLACEMENT in mine)

    # --- one answer ---------------------------------------------------------------------------------------------

    def written(self, rollout: Rollout) -> Written:
        """An answer in the teacher's tokens, and where both cut it."""
        text, tokenizer = rollout.text(), self.teacher.tokenizer
        ids = tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()
        pieces = chat.pieces(tokenizer, ids)
        whole = "".join(pieces)
        read: dict[int, int] = {}
        for j, end in enumerate(accumulate(map(len, pieces), initial=0)):
            if text[:end] == whole[:end]:
                read.setdefault(end, j)  # of several at one place the first: the others lie inside the next character
        return Written(
            text=text,
            mine=rollout.response_ids,
            starts=tuple(accumulate(map(len, rollout.pieces), initial=0)),
            theirs=ids,
            bounds=tuple(read),
            read=tuple(read.values()),
            marked=bool(pieces and pieces[0]) and self._theirs[ids[0]] != pieces[0],
        )

    def scores(
        self, w: Written, logp: Float[Tensor, "Z V"]
    ) -> tuple[Float[Tensor, "T U"], Float[Tensor, " T"], Bool[Tensor, " T"]]:
        """log q, log q(y_t) and where they are known; 0 where they are not. U is the student's vocabulary, Z = S + 1.

        `logp` are the teacher's log-probs, nats, of its next token after z_1 .. z_j, j = 0 .. S.
        """
        chain = [0.0, *_own(w, logp).double().cumsum(0).tolist()]
        size = len(w.mine), self.student.vocab
        q, sampled, aligned = torch.zeros(size), torch.zeros(size[0]), torch.zeros(size[0], dtype=torch.bool)
        for t, token in enumerate(w.mine):
            if not self._placed(w, t):
                continue
            m = self._next(w, t, logp, chain)
            if m is not None and m[token] > 0:
                row = (m / m.sum()).log().clamp(min=FLOOR).float()
                q[t], sampled[t], aligned[t] = row, row[token], True
        return q, sampled, aligned

    def with_spans(
        self, w: Written, logp: Float[Tensor, "Z V"], sampled: Float[Tensor, " T"], aligned: Bool[Tensor, " T"]
    ) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
        """log q(y_t), and where that is not known the chain rule."""
        others, spanned = self.spans(w, _own(w, logp).numpy())
        return torch.where(aligned, sampled, others), aligned | spanned

    def spans(self, w: Written, sampled: Float[np.ndarray, " S"]) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
        """log pi_T(y_t) by the chain rule and where it is known, from log pi_T(z_j | ..).

        With one value more than z has tokens, that of the teacher's end of sequence, the student's end is known too.
        """
        chain = [0.0, *np.cumsum(sampled, dtype=np.float64).tolist()]
        at = dict(zip(w.bounds, w.read, strict=True))
        out, aligned = torch.zeros(len(w.mine)), torch.zeros(len(w.mine), dtype=torch.bool)
        for t, token in enumerate(w.mine):
            a, e = w.starts[t : t + 2]
            if token in self.student.eos:
                i, j = at.get(a), len(w.theirs) + 1
                known = a == len(w.text) and j < len(chain)
            else:
                i, j = at.get(a), at.get(e, -1)
                known = self._placed(w, t) and j >= 0
            if known and i is not None:
                out[t], aligned[t] = chain[j] - chain[i], True
        return out, aligned

    def _placed(self, w: Written, t: int) -> bool:
        """Whether a token writes whole characters of its own, or ends the answer."""
        a, e = w.starts[t : t + 2]
        if w.mine[t] in self.student.eos:
            return a == len(w.text) == w.bounds[-1]
        split = t > 0 and w.starts[t - 1] == a  # what came before wrote nothing: part of this character
        return a < e and not split and chat.REPLACEMENT not in w.text[a:e]

    def _next(
        self, w: Written, t: int, logp: Float[Tensor, "Z V"], chain: Sequence[float]
    ) -> Float64[Tensor, " U"] | None:
        """m_t up to a factor; None where too little of it is known, or y_t reaches beyond the teacher's token."""
        a, e = w.starts[t : t + 2]
        k = bisect_right(w.bounds, a) - 1
        if e > a and (k + 1 == len(w.bounds) or e > w.bounds[k + 1]):
            return None
        firsts: list[Tensor] = []
        known: list[Tensor] = []  # log of the terms of m_t
        unknown: list[Tensor] = []  # and of u_t
        for i in range(k, -1, -1):
            b, row = w.bounds[i], logp[w.read[i]].double() + (chain[w.read[i]] - chain[w.read[k]])
            if a - b >= self._longest or (i == 0 and w.marked):
                break
            if b == a:
                firsts.append(self._first)
                known.append(row)
                continue
            over, first = self._over(w, b, t, row)
            firsts.append(first)
            known.append(row[over])
            stops = [v for end in range(w.bounds[k] + 1, a + 1) for v in self._spelt.get(w.text[b:end], ())]
            unknown.append(row[stops])
        if not any(map(len, known)):
            return None
        logs = torch.cat(known)
        top = logs.max()
        m = torch.zeros(self.student.vocab + 1, dtype=torch.float64)
        m.index_add_(0, torch.cat(firsts), (logs - top).exp())
        lost = m[-1] + sum((u - top).exp().sum() for u in unknown)
        m, total = m[:-1], m[:-1].sum()
        return m if total.log() + top >= math.log(VANISHING) and total >= KNOWN * (total + lost) else None

    def _over(
        self, w: Written, b: int, t: int, row: Float64[Tensor, " V"]
    ) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """The teacher's tokens from b on that reach over a_t and fit y_1 .. y_{t-1}; the student's next token in each."""
        r = w.text[b : w.starts[t]]
        found = self._order[bisect_right(self._sorted, r) : bisect_left(self._sorted, r + LAST)]
        over = found[row[found] > math.log(NEGLIGIBLE)].tolist()
        start = bisect_left(w.starts, w.starts[bisect_right(w.starts, b) - 1])  # the student's last boundary up to b
        before, mine = w.text[w.starts[start] : b], w.mine[start:t]
        if len(self._onward) > REMEMBERED:
            self._onward.clear()
        onward = self._onward[before, mine]
        new = [v for v in over if v not in onward]
        for v, ids in zip(new, self._read([before + self._theirs[v] for v in new]) if new else (), strict=True):
            rest = self._theirs[v][len(r) :]
            fits = ids[: len(mine)] == mine and len(ids) > len(mine) and self._begins(rest, ids[len(mine)])
            onward[v] = ids[len(mine)] if fits else self.student.vocab
        pairs = [(v, onward[v]) for v in over if onward[v] < self.student.vocab]
        both = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        return both[:, 0], both[:, 1]


def _own(w: Written, logp: Float[Tensor, "Z V"]) -> Float[Tensor, " S"]:
    """log pi_T(z_j | ..)."""
    return logp[: len(w.theirs)].gather(-1, torch.tensor(w.theirs, dtype=torch.long)[:, None])[:, 0]


def _texts(tokens: Tokens) -> list[str]:
    """[V] what each token of a vocabulary adds to a text; "" for control tokens."""
    tokenizer = tokens.tokenizer
    before = tokenizer.encode(ANCHOR, add_special_tokens=False)
    found = tokenizer.batch_decode([[*before, v] for v in range(tokens.vocab)], **chat.PLAIN)
    return [text[len(tokenizer.decode(before, **chat.PLAIN)) :] for text in found]


def _anchor(tokenizer: Any) -> int:
    """Tokens to put before a text so that it is read as a continuation; 0 where a text begins as it goes on."""
    alone, before, after = (tokenizer.encode(t, add_special_tokens=False) for t in ("a", ANCHOR, ANCHOR + "a"))
    return len(before) if after[: len(before)] == before and after[len(before) :] != alone else 0
