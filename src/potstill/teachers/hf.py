"""A Hugging Face model as teacher: it scores tokens, and it goes on from where the student was.

With the student's tokenizer it reads the student's token ids after its own rendering of the prompt. With another one it
is a foreign teacher: it reads and writes text, which is cut to the asked length in the student's tokens. Its scores are
then of use only through `potstill.align`.

`ModelTeacher` turns questions into texts to read and rows to write, and what comes of them into feedback; where the model
is does not matter to it. `HFTeacher` has it in this process, `potstill.teachers.served` behind `potstill serve`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from potstill import chat
from potstill.align import Aligner, Written
from potstill.decode import Decoding, Row, write
from potstill.decode import Written as Said
from potstill.models import Loaded, Tokens, same_tokenizer, written_ids
from potstill.seeds import derive
from potstill.split import Head, Split, Text
from potstill.types import Ask, Feedback, Usage, Wants

SLACK = 1.5
"""Teacher tokens asked for per student token, where the tokenizers differ: text is cut afterwards, not before."""
LOGITS = 1 << 27
"""Logits held at once where a model gives nothing else: half a GiB in float32, whatever the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is to be scored for a question, in the teacher's tokens."""

    ask: Ask
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    written: Written | None = None
    """How its tokens lie to the student's, where they are others."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@runtime_checkable
class Halves(Protocol):
    """A model's two parts, wherever they are: `split.Split` is one."""

    @property
    def head(self) -> Head:
        """Makes logits of hidden states."""
        ...

    def hidden(self, texts: Sequence[Text]) -> Float[Tensor, "N H"]:
        """The wanted hidden states of all texts, one text behind the other."""
        ...


class ModelTeacher:
    """Scores and continues with one model.

    `share` off reads every prefix anew: slow, and the reference for tests. With `hides` whole distributions are told by the
    hidden states behind them.
    """

    def __init__(
        self,
        own: Tokens,
        split: Halves | None,
        student: Tokens,
        *,
        decoding: Decoding,
        text_only: bool = False,
        align: bool = False,
        share: bool = True,
        shuffled: bool = False,
        hides: bool = False,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.notes, self.ended = Counter[str](), ""
        self.name, self.shuffled, self.around = own.name, shuffled, around
        self.own, self.student, self.how, self.share = own, student, decoding, share
        self.foreign = text_only or same_tokenizer(student, own) is not None
        self.alike = not self.foreign and chat.alike(student.tokenizer, own.tokenizer)
        self.aligner = Aligner(student, own) if align else None
        self.hides, self.split = hides, split

    @property
    def offers(self) -> Wants:
        """Everything with the student's tokenizer or aligned to it, text with another one."""
        return Wants.TEXT if self.foreign and not self.aligner else Wants.FULL

    async def feedback(self, asks: Sequence[Ask]) -> list[Feedback]:
        """Scores and continuations, in the order of the questions."""
        with self.around():
            scored = self._score([a for a in asks if a.wants is not Wants.TEXT])
            written = self._continue([a for a in asks if a.wants is Wants.TEXT])
        written = _shuffled(written) if self.shuffled else written
        by_ask = {id(f.ask): f for f in [*scored, *written]}
        return [by_ask[id(a)] for a in asks]

    # --- scores -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _score(self, asks: Sequence[Ask]) -> list[Feedback]:
        out: list[Feedback] = []
        for group in self._micro([self._reading(a) for a in asks]):
            out += [self._scored(r, rows) for r, rows in zip(group, self._read(group), strict=True)]
        return out

    def _read(self, group: Sequence[Reading]) -> Sequence[Float[Tensor, "s W"]]:
        """What the model has in front of each answer's S tokens and behind the last: hidden states, or logits."""
        assert self.split
        hidden = self.split.hidden([Text([*r.prompt, *r.answer], len(r.prompt) - 1) for r in group])
        return hidden.split([len(r.answer) + 1 for r in group])

    def _logp(self, rows: Float[Tensor, "n W"]) -> Float[Tensor, "n V"]:
        logits = self.split.head(rows) if self.split else rows.float()
        return logits.log_softmax(-1).cpu()

    def _reading(self, ask: Ask) -> Reading:
        known = self.alike and ask.view is ask.rollout.prompt  # to lay it out again takes a tiny model's time
        prompt = ask.rollout.prompt_ids if known else chat.prompt_ids(self.own.tokenizer, ask.view)
        if self.aligner is None:
            return Reading(ask=ask, prompt=prompt, answer=ask.rollout.response_ids)
        written = self.aligner.written(ask.rollout)
        return Reading(ask=ask, prompt=prompt, answer=written.theirs, written=written)

    def _micro(self, readings: Sequence[Reading]) -> list[list[Reading]]:
        """Consecutive questions whose tokens fit into one forward pass."""
        room = self.how.cells if self.split else min(self.how.cells, LOGITS // self.own.vocab)
        groups: list[list[Reading]] = []
        longest = 0
        for reading in readings:
            longest = max(longest, len(reading))
            if not groups or (len(groups[-1]) + 1) * longest > room:
                groups.append([])
                longest = len(reading)
            groups[-1].append(reading)
        return groups

    def _scored(self, r: Reading, rows: Float[Tensor, "s W"]) -> Feedback:
        """As much as was asked for of what the model thinks of an answer of S tokens of its own."""
        ask = r.ask
        length = len(ask.rollout.response_ids) - ask.start if ask.length is None else ask.length
        mine = slice(ask.start, ask.start + length)
        known = Feedback(ask=ask, teacher=self.name, usage=Usage(read=len(r.prompt) + ask.start + length))
        if r.written is not None and self.aligner is not None:
            theirs = self._logp(rows)
            logp, sampled, aligned = self.aligner.scores(r.written, theirs)
            if ask.wants is Wants.SAMPLED:
                sampled, aligned = self.aligner.with_spans(r.written, theirs, sampled, aligned)
            scores: dict[str, Any] = _scores(ask, logp[mine], torch.tensor(ask.rollout.response_ids[mine]))
            scores |= {"sampled": sampled[mine].numpy(), "aligned": aligned[mine].numpy()}
            return replace(known, usage=Usage(read=len(r)), **scores)
        rows = rows[mine]
        if self.hides and self.split and ask.wants is Wants.FULL:
            return replace(known, hidden=rows.float().cpu().numpy(), head=self.split.head)
        size = self.split.head.at_once if self.split else max(length, 1)
        ids = torch.tensor(ask.rollout.response_ids[mine]).split(size)
        parts = [_scores(ask, self._logp(h), i) for h, i in zip(rows.split(size), ids, strict=True)]
        joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return replace(known, **joined)

    # --- continuations ------------------------------------------------------------------------------------------

    def _write(self, trunks: Sequence[tuple[int, ...]], rows: Sequence[Row]) -> list[Said]:
        """`decode.write` with the model."""
        raise NotImplementedError

    def _continue(self, asks: Sequence[Ask]) -> list[Feedback]:
        tokenizer = self.own.tokenizer
        prefixes = [self._prefix(a) for a in asks]
        trunks, trunk_of = self._trunks(asks, prefixes)
        rows = [
            Row(trunk=t, prefix=p, limit=self._limit(a), seed=derive(a.rollout.seed, _stream(a), a.start, i))
            for a, p, t in zip(asks, prefixes, trunk_of, strict=True)
            for i in range(a.first, a.first + a.n)
        ]
        written = iter(self._write(trunks, rows))
        computed = [0] * len(trunks)  # tokens of each trunk that have been paid for
        out: list[Feedback] = []
        for ask, prefix, trunk in zip(asks, prefixes, trunk_of, strict=True):
            mine = [next(written) for _ in range(ask.n)]
            texts = [tokenizer.decode(list(w.ids), **chat.PLAIN) for w in mine]
            ends = [w.finish for w in mine]
            if self.foreign and ask.unit == "student" and ask.length is not None:
                whole, texts = texts, [chat.cut(self.student.tokenizer, text, ask.length) for text in texts]
                ends = [e if a == b else "length" for e, a, b in zip(ends, whole, texts, strict=True)]
            ids = [w.ids for w in mine]
            if self.foreign and ask.ids:
                ids = [written_ids(self.student, t, e)[: ask.length] for t, e in zip(texts, ends, strict=True)]
            new = max(mine[0].shared - computed[trunk], 0)
            computed[trunk] += new
            usage = Usage(
                read=len(prefix) * ask.n,
                cached=sum(w.shared for w in mine) - new,
                written=sum(len(w.ids) for w in mine),
            )
            out.append(
                Feedback(
                    ask=ask,
                    teacher=self.name,
                    temperature=self.how.temperature,
                    texts=tuple(texts),
                    finishes=tuple(ends),
                    ids=tuple(ids) if ask.ids else (),
                    usage=usage,
                )
            )
        return out

    def _trunks(
        self, asks: Sequence[Ask], prefixes: Sequence[tuple[int, ...]]
    ) -> tuple[list[tuple[int, ...]], list[int]]:
        """What is read once, and which of it each question continues: a rollout's longest prefix holds the others."""
        trunks: list[tuple[int, ...]] = []
        place: dict[tuple[str | int, ...], int] = {}
        for ask, prefix in zip(asks, prefixes, strict=True):
            t = place.setdefault(self._trunk(ask), len(trunks))
            if t == len(trunks):
                trunks.append(prefix)
            elif len(prefix) > len(trunks[t]):
                trunks[t] = prefix
        return trunks, [place[self._trunk(ask)] for ask in asks]

    def _trunk(self, ask: Ask) -> tuple[str | int, ...]:
        return ask.rollout.key if self.share else ask.key

    def _prefix(self, ask: Ask) -> tuple[int, ...]:
        """What the teacher reads: its own rendering of the prompt, then the student's answer up to `start`."""
        tokenizer = self.own.tokenizer
        prompt = chat.prompt_ids(tokenizer, ask.view)
        if self.foreign:
            return (*prompt, *tokenizer.encode(ask.rollout.text(0, ask.start), add_special_tokens=False))
        return (*prompt, *ask.rollout.response_ids[: ask.start])

    def _limit(self, ask: Ask) -> int:
        assert ask.length is not None
        return round(SLACK * ask.length) if self.foreign and ask.unit == "student" else ask.length


class HFTeacher(ModelTeacher):
    """With a model in this process; one that is no body and head tells its logits. Options are those of `ModelTeacher`."""

    def __init__(self, loaded: Loaded, student: Tokens, *, decoding: Decoding, **options: Any):
        split = Split.of(loaded.model, loaded.tokens.vocab)
        super().__init__(loaded.tokens, split, student, decoding=decoding, **options)
        self.loaded = loaded

    def _read(self, group: Sequence[Reading]) -> Sequence[Float[Tensor, "s W"]]:
        if self.split:
            return super()._read(group)
        rows = [torch.tensor([*r.prompt, *r.answer]) for r in group]
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        device = self.loaded.device
        shortest = min(len(r.prompt) for r in group)
        keep = ids.shape[1] - shortest + 1  # logits from the last token of the shortest prompt on
        logits = self.loaded.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=keep
        ).logits[..., : self.own.vocab]
        return [z[len(r.prompt) - shortest :][: len(r.answer) + 1] for z, r in zip(logits, group, strict=True)]

    def _write(self, trunks: Sequence[tuple[int, ...]], rows: Sequence[Row]) -> list[Said]:
        return write(self.loaded.model, trunks, rows, vocab=self.own.vocab, eos=self.own.eos, how=self.how)


def _stream(ask: Ask) -> str:
    """The student asked about itself must not draw what a teacher with its weights draws."""
    return "own" if ask.of == "student" else "teacher"


def _shuffled(said: Sequence[Feedback]) -> list[Feedback]:
    """A control: every question gets the continuations of another prompt's, of the same rank among that prompt's."""
    prompts = list(dict.fromkeys(f.ask.rollout.prompt.id for f in said))
    of = {p: [f for f in said if f.ask.rollout.prompt.id == p] for p in prompts}
    other = dict(zip(prompts, [*prompts[1:], *prompts[:1]], strict=True))
    out: list[Feedback] = []
    for prompt in prompts:
        for i, f in enumerate(of[prompt]):
            theirs = of[other[prompt]]
            other_one = theirs[i % len(theirs)]
            out.append(replace(f, texts=other_one.texts, finishes=other_one.finishes, ids=other_one.ids))
    return out


def _scores(ask: Ask, logp: Float[Tensor, "n V"], ids: Int[Tensor, " n"]) -> dict[str, np.ndarray]:
    """As much of log pi_T as was asked for."""
    known = {"sampled": logp.gather(-1, ids[:, None])[:, 0].numpy()}
    if ask.wants is Wants.TOPK:
        values, indices = logp.topk(min(ask.k, logp.shape[-1]), -1)
        known |= {"topk_ids": indices.numpy(), "topk_logp": values.numpy()}
    if ask.wants is Wants.FULL:
        known |= {"logp": logp.numpy()}
    return known
