"""A chat model behind an API as teacher: Claude, Gemini, GPT, or any OpenAI-compatible endpoint. It returns text.

It goes on from the student's answer in one of two ways. *Prefill*: the answer so far is put in its mouth, as the
beginning of its own message. *Instruction*: it gets the answer so far as its last message and is told to continue it.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any, Literal

from potstill.errors import require
from potstill.ledger import Ledger, Question
from potstill.models import Tokens
from potstill.teachers.asking import SLACK, Asking, Prepared, address, asker, digest, runs
from potstill.teachers.continuation import END
from potstill.teachers.http import client, spending
from potstill.teachers.keys import Key, read_key
from potstill.teachers.line import Failed, Line, Purse, Reply
from potstill.teachers.prices import Price
from potstill.teachers.providers.base import Access, Features, Provider, Turns
from potstill.teachers.settings import Chat
from potstill.types import Ask

PROVIDERS = {
    "anthropic": ("anthropic", "Anthropic"),
    "google": ("google.genai", "Google"),
    "openai": ("openai", "OpenAI"),
}
"""Provider: the package of its SDK, and our class in `providers/`."""

INSTRUCTION = (
    "Your last message was cut off. Continue it, beginning with the very next character. Write only what comes next: "
    "repeat nothing, do not start over, and put no introduction, comment, quotation marks or code fence around it. "
    "It ended with:\n{tail}\nIf nothing is missing, write " + END
)
TAIL = 60
"""Characters of the prefix that the instruction repeats."""
ROOM = 24
"""Tokens for what may come before a continuation, where it is told to continue."""
LEAST = 16
"""Tokens below which some providers refuse."""
CACHEABLE = 1024
"""Tokens from which providers keep a prompt: then one request goes ahead of the others, which find it kept."""


class ChatTeacher(Asking):
    """Continues with a chat model, N requests at a time where the provider has no n."""

    def __init__(
        self, settings: Chat, student: Tokens, ledger: Ledger, *, key: Key | None = None, price: Price | None = None
    ):
        super().__init__(
            settings.model, student, ledger, redraws=settings.redraws, max_unanswered=settings.max_unanswered
        )
        package, name = PROVIDERS[settings.provider]
        require(package.partition(".")[0], settings.provider, f"teacher.provider = {settings.provider!r}")
        adapter = import_module(f"potstill.teachers.providers.{settings.provider}")
        self._make, self.most = getattr(adapter, name), adapter.MOST
        self.settings, self.price = settings, price
        own_server = settings.provider == "openai" and settings.base_url is not None
        self.key = key or read_key(settings.key_env, settings.key_file, adapter.KEYS, needed=not own_server)
        self.temperature = settings.temperature
        self.features = Features()
        self._provider: Provider
        self._mode: Literal["prefill", "instruction"] | None = (
            None if settings.continues == "auto" else settings.continues
        )

    def prepare(self, ask: Ask) -> Prepared:
        """The conversation: the prompt, the student's answer so far, and how to go on from it."""
        assert self._mode is not None and ask.length is not None
        s, prefix = self.settings, ask.rollout.text(0, ask.start)
        messages = [dict(m) for m in ask.view.messages]
        told = self._mode == "instruction" and bool(prefix.strip())
        if told:
            tail = prefix[-TAIL:]
            messages += [
                {"role": "assistant", "content": prefix},
                {"role": "user", "content": INSTRUCTION.format(tail=tail)},
            ]
        limit = ask.length if ask.unit == "teacher" else max(round(SLACK * ask.length) + ROOM * told, LEAST)
        limit += s.thinking_tokens
        how: dict[str, Any] = {"continues": self._mode, "max_tokens": limit, "cut": True}
        how |= {"temperature": s.temperature, "top_p": s.top_p, "thinking_tokens": s.thinking_tokens}
        prefill = "" if told else prefix.rstrip()
        question = Question(
            key=digest(["chat", s.provider, s.base_url, s.model, how, messages, prefill]),
            address=address(ask),
            provider=s.provider,
            model=s.model,
            parameters=how,
            messages=ask.view.messages,
            prefix=prefix,
        )
        body = (messages, prefill)
        size = sum(len(m["content"]) for m in messages) + len(prefill)
        return Prepared(ask=ask, question=question, body=body, limit=limit, read=size // 4 + 32)

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line | None]:
        """With one client of the provider's SDK for all requests of a step."""
        s = self.settings
        spent = spending(self.ledger, s.provider, s.model, self.price)
        purse = Purse(spent, s.max_teacher_tokens, s.max_cost, self.price)
        who = (s.provider, s.model)
        line = Line(who, ledger=self.ledger, purse=purse, key=self.key, in_flight=s.in_flight, retries=s.retries)
        async with client(Key(None), s.timeout, s.in_flight, line) as http:
            self._provider = self._make(Access(settings=s, key=self.key, http=http, features=self.features))
            if self._mode is None:
                self._mode = await self._find_mode(line)
            yield line

    async def _find_mode(self, line: Line) -> Literal["prefill", "instruction"]:
        """Prefill for Claude models that take it, which one small request shows; the ledger remembers."""
        s = self.settings
        if s.provider != "anthropic" or s.thinking_tokens:
            return "instruction"
        fact = f"prefill {s.provider} {s.base_url} {s.model}"
        known = self.ledger.fact(fact)
        if known is None:
            known = "yes" if await self._takes_prefill(line) else "no"
            self.ledger.learn(fact, known)
        return "prefill" if known == "yes" else "instruction"

    async def _takes_prefill(self, line: Line) -> bool:
        refused = False
        turns = Turns(
            messages=({"role": "user", "content": "Count from one to four in words."},),
            prefill="one two",
            max_tokens=LEAST,
            shared="prefill",
        )

        async def ask_once() -> Reply:
            nonlocal refused
            try:
                return await self._provider.ask(turns)
            except Failed as failed:
                if failed.status == 400 and "prefill" in failed.message.lower():
                    refused = True
                    return Reply()
                raise

        _, request = await line.send(ask_once, read=32, written=LEAST, key="prefill", asker="")
        if not refused:
            self.ledger.spent_on(request)
        return not refused

    async def fetch(self, line: Line | None, prepared: Prepared, draws: Sequence[int]) -> None:
        """As many draws to a request as the provider allows; a long prompt goes ahead once, so that it is cached."""
        assert line is not None
        most = 1 if "n" in self.features.refused else self.most
        groups = [run[i : i + most] for run in runs(draws) for i in range(0, len(run), most)]
        if len(groups) > 1 and prepared.read >= CACHEABLE:
            await self._request(line, prepared, groups.pop(0), reused=True)
        done = await asyncio.gather(
            *(self._request(line, prepared, group, reused=len(groups) > 1) for group in groups), return_exceptions=True
        )
        for problem in done:
            if isinstance(problem, BaseException):
                raise problem

    async def _request(self, line: Line, prepared: Prepared, draws: Sequence[int], *, reused: bool) -> None:
        messages, prefill = prepared.body
        turns = Turns(
            messages=messages,
            prefill=prefill,
            max_tokens=prepared.limit,
            n=len(draws),
            shared=digest([*map(str, prepared.ask.rollout.key)]),
            reused=reused,
        )

        async def ask_once() -> Reply:
            return await self._provider.ask(turns)

        reply, request = await line.send(
            ask_once,
            read=prepared.read,
            written=prepared.limit * len(draws),
            key=prepared.question.key,
            asker=asker(prepared.ask),
        )
        if len(reply.texts) < len(draws):
            self.features.refused.add("n")
        self.keep(prepared, reply, request, draws)
