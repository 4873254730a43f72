"""How questions become requests, whoever answers: look into the ledger, ask for what is missing, write it down, judge it.

A question is answered by draws 0, 1, 2, ...; each draw is asked for once, ever. The answer is the first n draws that can
be used; a draw that cannot (a refusal, an echo) is replaced by the next one, as often as `redraws` allows. A question
that still lacks some goes unanswered: its record is left out and counted, never filled up.

Whoever knows of a question before it is time to ask can say so (`expect`): what comes waits in the ledger.
"""

import asyncio
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from potstill import chat
from potstill.errors import BudgetEnded, PotstillError, TeacherError
from potstill.ledger import Answer, Ledger, Question
from potstill.models import Tokens, written_ids
from potstill.seeds import derive
from potstill.teachers.continuation import judge
from potstill.teachers.keys import Key
from potstill.teachers.line import Line, Purse, Reply
from potstill.types import Ask, Feedback, Finish, Usage, Wants

SLACK = 1.5
"""Teacher tokens asked for per student token, where the tokenizers differ: text is cut afterwards, not before."""
SEEDS = 2**31
"""Seeds that every server takes."""
DRAWS = 1024
"""Of one question, at most."""
AHEAD = 4
"""Steps like the last that must be affordable for questions to be asked early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A question in the words of one kind of teacher."""

    ask: Ask
    question: Question
    body: Any
    """What is sent: messages, or token ids."""
    limit: int
    """Tokens that the teacher may write."""
    read: int
    """About how many tokens it reads."""


def address(ask: Ask) -> str:
    """Names a question by what it is about, whoever is asked: the conversation, the answer so far, and what is wanted."""
    r = ask.rollout
    what: list[Any] = [[dict(m) for m in ask.view.messages], ask.length, ask.unit, int(ask.wants), ask.k]
    if ask.wants is Wants.TEXT:
        what.append(r.text(0, ask.start))
    else:
        what += [list(r.response_ids), ask.start]
    return digest(what)


def digest(what: Any) -> str:
    """A name for a JSON value."""
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


def first_seed(run: int, question: str) -> int:
    """Seed of draw 0, from those of the run and the question's key; draw i has the i-th after it.

    Several answers may come to one question, and which of them is first depends on the network. So it is not theirs.
    """
    return derive(run, "teacher", question) % (SEEDS - DRAWS)


def runs(draws: Sequence[int]) -> list[list[int]]:
    """Ascending numbers in groups without a gap: [0, 1, 3] -> [[0, 1], [3]]."""
    out = [[draws[0]]] if draws else []
    for before, draw in pairwise(draws):
        if draw == before + 1:
            out[-1].append(draw)
        else:
            out.append([draw])
    return out


class Asking:
    """The part that all remote teachers share. They say how to prepare a question and how to send it."""

    asks = True
    """Whether there is anybody to send to."""
    advice = (
        "Look at them with `potstill ledger RUN --export FILE`; then change the teacher or the prompts, or raise "
        "max_unanswered or redraws"
    )

    def __init__(self, name: str, student: Tokens, ledger: Ledger, *, redraws: int, max_unanswered: float):
        self.name, self.student, self.ledger = name, student, ledger
        self.redraws, self.max_unanswered = redraws, max_unanswered
        self.temperature = 1.0
        self.key = Key(None)
        self.notes: Counter[str] = Counter()
        """accepted, repaired: ..., rejected: ..., unanswered; since the start of the process."""
        self.ended = ""
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._begun = set[asyncio.Task[None]]()
        self._stack = AsyncExitStack()
        self._opened: asyncio.Task[Line | None] | None = None
        self._spent: list[tuple[int, float]] = []  # in tokens and money, before this step and before the last

    @property
    def offers(self) -> Wants:
        """Text."""
        return Wants.TEXT

    def prepare(self, ask: Ask) -> Prepared:
        """The question as this teacher gets it."""
        raise NotImplementedError

    async def fetch(self, line: Line | None, prepared: Prepared, draws: Sequence[int]) -> None:
        """Ask for these draws and write down what comes, which may be fewer."""
        raise NotImplementedError

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line | None]:
        """Open for the requests of one step."""
        yield None

    def _joined(self) -> asyncio.Task[Line | None]:
        """One line for all who ask in a step."""
        if self._opened is None:
            self._opened = asyncio.create_task(self._stack.enter_async_context(self.line()))
        return self._opened

    async def _leave(self) -> None:
        """Hang up."""
        stack, self._stack, self._opened = self._stack, AsyncExitStack(), None
        self._locks.clear()
        await stack.aclose()

    def expect(self, asks: Sequence[Ask]) -> None:
        """Begin with questions about one rollout that `feedback` will be asked soon. Problems come up again then.

        Not where the budget might end with this step: what is left of it would go to the answers that end first.
        """
        if self.asks and asks:
            task = asyncio.create_task(self._begin(asks, first=not self._begun and self._opened is None))
            self._begun.add(task)
            task.add_done_callback(self._begun.discard)

    async def forget(self) -> None:
        """Give up the questions that were only expected."""
        begun = list(self._begun)
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
        if self._opened is not None:
            await self._leave()

    async def _begin(self, asks: Sequence[Ask], *, first: bool) -> None:
        with suppress(PotstillError):
            line = await self._joined()
            assert line is not None
            if first:
                self._spent = [(line.purse.tokens, line.purse.cost), *self._spent[:1]]
            if not self._affords(line.purse):
                return
            for ask in sorted(asks, key=lambda a: a.start):
                await self._drawn(line, self.prepare(ask))

    def _affords(self, purse: Purse) -> bool:
        """Whether there is enough for several steps like the last."""
        if not purse.limited or len(self._spent) < 2:
            return not purse.limited
        (tokens, cost), (tokens_before, cost_before) = self._spent
        return purse.has(AHEAD * (tokens - tokens_before), AHEAD * (cost - cost_before))

    async def feedback(self, asks: Sequence[Ask]) -> list[Feedback]:
        """One answer per question that got one, in the order of the questions.

        The questions about one rollout are asked in ascending order, so that each finds the last one's prefix in the
        server's cache; those about different rollouts at once.

        Raises:
            TeacherError: A request failed for good, or too many questions went unanswered.
            BudgetEnded: The recipe's limit is reached; it carries the answers that are complete.
        """
        about: dict[Any, list[Ask]] = defaultdict(list)
        for ask in asks:
            about[ask.view.id, *ask.rollout.key].append(ask)
        said: dict[int, Feedback] = {}

        async def in_order(line: Line | None, mine: Sequence[Ask]) -> None:
            for ask in sorted(mine, key=lambda a: a.start):
                if (answer := await self._one(line, ask)) is not None:
                    said[id(ask)] = answer

        try:
            line = await self._joined()
            done = await asyncio.gather(*(in_order(line, mine) for mine in about.values()), return_exceptions=True)
            await asyncio.gather(*self._begun, return_exceptions=True)  # whatever was sent is paid for, and so kept
        finally:
            await self._leave()
        if self.asks:
            self.ledger.settle()
        complete = [said[id(ask)] for ask in asks if id(ask) in said]
        problems = [e for e in done if isinstance(e, BaseException)]
        if worst := next((e for e in problems if not isinstance(e, BudgetEnded)), None):
            raise worst
        if problems:
            self.ended = str(problems[0])
            raise BudgetEnded(self.ended, complete)
        self._enough(asks, complete)
        return complete

    def _enough(self, asks: Sequence[Ask], said: Sequence[Feedback]) -> None:
        missing = len(asks) - len(said)
        self.notes["unanswered"] += missing
        later = all(ask.first for ask in asks)  # of what is asked again the first answers stand
        if missing > self.max_unanswered * len(asks) and not later:
            why = "; ".join(
                f"{count} {what}" for what, count in self.notes.most_common() if what.startswith("rejected")
            )
            raise TeacherError(
                f"teacher {self.name!r} left {missing} of {len(asks)} questions without the answers they need "
                f"(since the start: {why or 'none rejected'}), more than teacher.max_unanswered = {self.max_unanswered:g}. "
                f"{self.advice}"
            )

    async def _drawn(self, line: Line | None, prepared: Prepared) -> tuple[list[Answer], list[tuple[Answer, str]]]:
        """The draws of a question, asked for where they are missing; and those that can be used, with their text."""
        key, n, limit = prepared.question.key, *self._draws(prepared.ask)
        async with self._locks[key]:  # two rollouts may have come to the same prefix; it is paid for once
            while True:
                known = self.ledger.answers(key)
                drawn = [known[d] for d in range(limit) if d in known]
                good = [(a, text) for a in drawn if (text := self._text(prepared, a)) is not None][:n]
                wanted = [d for d in range(limit) if d not in known][: n - len(good)]
                if not wanted or not self.asks:
                    return drawn, good
                await self.fetch(line, prepared, wanted)

    def _draws(self, ask: Ask) -> tuple[int, int]:
        """How many are needed, and how many are made for them at most."""
        if ask.wants is not Wants.TEXT:
            return 1, 1
        n = ask.first + ask.n
        return n, n * (1 + self.redraws)

    async def _one(self, line: Line | None, ask: Ask) -> Feedback | None:
        prepared, (n, limit) = self.prepare(ask), self._draws(ask)
        drawn, good = await self._drawn(line, prepared)
        if ask.wants is not Wants.TEXT:
            return self._feedback(prepared, good) if good else None
        past = good[ask.first - 1][0].draw if 0 < ask.first <= len(good) else -1
        last = good[-1][0].draw if len(good) == n else limit
        self.notes.update(judge(a, prepared.question).verdict for a in drawn if past < a.draw <= last)
        if len(good) < n:
            return None
        return self._feedback(prepared, good[ask.first :])

    def _text(self, prepared: Prepared, answer: Answer) -> str | None:
        """The text to use, "" for scores, None for an answer that cannot be used."""
        return "" if answer.scores else judge(answer, prepared.question).text

    def _feedback(self, prepared: Prepared, good: Sequence[tuple[Answer, str]]) -> Feedback:
        ask, key = prepared.ask, prepared.question.key
        read, cached, written = self.ledger.paid(key, asker(ask))
        feedback = Feedback(
            ask=ask,
            teacher=self.name,
            temperature=self.temperature,
            usage=Usage(read=read, cached=cached, written=written),
        )
        if ask.wants is not Wants.TEXT:
            scores: dict[str, Any] = dict(good[0][0].scores)
            return replace(feedback, **scores)
        texts, finishes, ids = [], [], []
        for answer, text in good:
            cut = text
            if prepared.question.parameters["cut"] and ask.unit == "student" and ask.length is not None:
                cut = chat.cut(self.student.tokenizer, text, ask.length)
            ends: Finish = "stop" if answer.finish == "stop" and cut == text else "length"
            texts.append(cut)
            finishes.append(ends)
            ids.append(written_ids(self.student, cut, ends)[: ask.length] if ask.ids else ())
        given = tuple(ids) if ask.ids else ()
        return replace(feedback, texts=tuple(texts), finishes=tuple(finishes), ids=given)

    def keep(self, prepared: Prepared, reply: Reply, request: Any, draws: Sequence[int]) -> None:
        """Write down what came for these draws. More than was asked for is left out, less is asked for again."""
        question = prepared.question
        kept: list[Answer] = []
        if reply.scores:
            kept = [Answer(draw=draws[0], scores=reply.scores)]
        for draw, text, finish in zip(draws, reply.texts, reply.finishes, strict=False):
            answer = Answer(draw=draw, text=self.key.scrub(text), finish=finish)
            kept.append(replace(answer, verdict=judge(answer, question).verdict))
        self.ledger.keep(question, request, kept)


def asker(ask: Ask) -> str:
    """For whom a request is made: names rollout and anchor within a run, and the round where there are several."""
    return f"{ask.rollout.seed}/{ask.start}" + f"+{ask.first}" * (ask.first > 0)
