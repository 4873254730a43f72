"""Rollouts by a Hugging Face model in this process: the student, or the teacher writing for it."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from potstill import chat
from potstill.decode import Decoding, Row, Written, write
from potstill.errors import DataError
from potstill.models import Loaded, Tokens, same_tokenizer, written_ids
from potstill.seeds import derive
from potstill.types import Author, Prompt, Rollout, Turn, Usage

Told = Callable[[Rollout], object]
"""Is told of an answer that is over."""


class HFSampler:
    """Samples from a model. The n answers to a prompt share one reading of it.

    It holds the learner's own model object, so it always writes with the newest weights.
    """

    def __init__(self, loaded: Loaded, *, decoding: Decoding = Decoding()):  # noqa: B008 - frozen
        self.loaded, self.how = loaded, decoding

    async def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        turn: Turn,
        *,
        guides: Sequence[tuple[int, ...]] = (),
        apart: bool = False,
        ended: Told | None = None,
    ) -> list[list[Rollout]]:
        """`n` answers to each prompt. Raises DataError for a prompt that leaves no room for an answer.

        With `guides`, one per prompt, every answer starts with these tokens, which this model did not choose. `apart`: a
        thread writes. With `ended` too, and this event loop calls it with each answer as soon as that is over.
        """
        if not apart and ended is None:
            return self._written(prompts, n, turn, guides)
        loop, threads, given_up = asyncio.get_running_loop(), torch.get_num_threads(), threading.Event()
        over = None if ended is None else lambda r: loop.call_soon_threadsafe(ended, r)

        def write() -> list[list[Rollout]]:
            torch.set_num_threads(threads)  # each thread has its own number
            return self._written(prompts, n, turn, guides, over, lambda: not given_up.is_set())

        try:
            return await asyncio.to_thread(write)
        except asyncio.CancelledError:
            given_up.set()  # whoever ends the process would wait for the thread
            raise

    def _written(
        self,
        prompts: Sequence[Prompt],
        n: int,
        turn: Turn,
        guides: Sequence[tuple[int, ...]],
        over: Told | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> list[list[Rollout]]:
        tokens = self.loaded.tokens
        guides = guides or [()] * len(prompts)
        asked = [prompt_within(tokens, p, turn.max_tokens) for p in prompts]
        trunks = [ids + guide for ids, guide in zip(asked, guides, strict=True)]
        seeds = [[derive(turn.seed, turn.step, p.id, i) for i in range(n)] for p in prompts]
        rows = [
            Row(trunk=t, prefix=trunk, limit=turn.max_tokens - len(guides[t]), seed=s)
            for t, trunk in enumerate(trunks)
            for s in seeds[t]
        ]
        place = {id(row): divmod(i, n) for i, row in enumerate(rows)}

        def rollout(row: Row, w: Written) -> Rollout:
            t, i = place[id(row)]
            return self._rollout(prompts[t], i, asked[t], guides[t], w, row.seed)

        written = write(
            self.loaded.model,
            trunks,
            rows,
            vocab=tokens.vocab,
            eos=tokens.eos,
            how=self.how,
            ended=(lambda row, w: over(rollout(row, w))) if over else None,
            wanted=wanted,
        )
        done = iter(map(rollout, rows, written))
        return [[next(done) for _ in range(n)] for _ in prompts]

    def _rollout(
        self, prompt: Prompt, sample: int, asked: tuple[int, ...], guide: tuple[int, ...], w: Written, seed: int
    ) -> Rollout:
        unknown = (0.0,) * len(guide)
        return Rollout(
            prompt=prompt,
            sample=sample,
            prompt_ids=asked,
            response_ids=guide + w.ids,
            pieces=chat.pieces(self.loaded.tokens.tokenizer, guide + w.ids),
            old_logp=unknown + w.logp,
            entropy=unknown + w.entropy,
            finish=w.finish,
            seed=seed,
            guided=len(guide),
        )


class Translated:
    """A model's answers in the student's tokens: what `sft` learns from. The student's log-probs do not exist for them."""

    def __init__(self, sampler: HFSampler, student: Tokens):
        self.sampler, self.student = sampler, student
        self.same = same_tokenizer(student, sampler.loaded.tokens) is None

    async def sample(self, prompts: Sequence[Prompt], n: int, turn: Turn) -> list[list[Rollout]]:
        """`n` answers to each prompt, as if the student had written them."""
        # A foreign teacher may need more tokens for the same text; what is too long for the student is then cut.
        room = turn.max_tokens if self.same else 2 * turn.max_tokens
        groups = await self.sampler.sample(
            prompts, n, replace(turn, seed=derive(turn.seed, "teacher"), max_tokens=room)
        )
        return [[self._translated(r, turn.max_tokens) for r in group] for group in groups]

    def _translated(self, r: Rollout, max_tokens: int) -> Rollout:
        ids = (r.response_ids if self.same else written_ids(self.student, r.text(), r.finish))[:max_tokens]
        mine = foreign_rollout(self.student, r.prompt, ids, sample=r.sample, author="teacher", seed=r.seed)
        return replace(mine, usage=Usage(read=len(r.prompt_ids), written=len(r.response_ids)))


def foreign_rollout(
    tokens: Tokens, prompt: Prompt, ids: Sequence[int], *, sample: int, author: Author, seed: int
) -> Rollout:
    """A rollout that the student did not write, in its tokens."""
    return Rollout(
        prompt=prompt,
        sample=sample,
        author=author,
        prompt_ids=prompt_within(tokens, prompt, len(ids)),
        response_ids=tuple(ids),
        pieces=chat.pieces(tokens.tokenizer, ids),
        finish="stop" if ids and ids[-1] in tokens.eos else "length",
        seed=seed,
    )


def prompt_within(tokens: Tokens, prompt: Prompt, room: int) -> tuple[int, ...]:
    """The prompt's ids. Raises DataError if `room` more tokens do not fit into the model's context."""
    ids = chat.prompt_ids(tokens.tokenizer, prompt)
    if not ids:
        raise DataError(f"prompt {prompt.id!r} is empty, so there is nothing to answer. Remove it from the data set")
    if len(ids) + room > tokens.context:
        raise DataError(
            f"prompt {prompt.id!r} has {len(ids)} tokens and its answer may take {room}, but {tokens.name} reads "
            f"{tokens.context} in all. Shorten or drop the prompt, or lower max_tokens"
        )
    return ids
