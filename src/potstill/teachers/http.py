"""An open model behind a server as teacher: vLLM, SGLang, llama.cpp, through their OpenAI-compatible completions.

Prompts go as token ids, so that nothing is tokenised twice. With the student's tokenizer it reads the student's own ids
and can score them; with another one it is a text-only teacher, or scores spans of text (`potstill.align`). Seeds are the
server's to honour.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import httpx2
import numpy as np

from potstill import chat
from potstill.align import Aligner
from potstill.errors import ModelError, TeacherError
from potstill.ledger import Ledger, Question
from potstill.models import Tokens, same_tokenizer
from potstill.seeds import derive
from potstill.teachers.asking import DRAWS, SLACK, Asking, Prepared, address, asker, digest, first_seed, runs
from potstill.teachers.keys import Key, read_key
from potstill.teachers.line import Failed, Line, Purse, Reply
from potstill.teachers.prices import Price
from potstill.teachers.settings import HTTP
from potstill.types import Ask, Wants

Shows = Literal["text", "sampled", "topk"]
OFFERS = {"text": Wants.TEXT, "sampled": Wants.SAMPLED, "topk": Wants.TOPK}
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Against the samplers that servers switch on by themselves, or read from the model's generation_config.json."""
TOO_MANY = re.compile(r"['\"`]n['\"`]|\bn must\b")
"""How a server complains of n."""
PROBE = "The quick brown fox, 12*34=408"


class HTTPTeacher(Asking):
    """Scores and continues with a model behind one or several servers of the same weights."""

    def __init__(
        self,
        settings: HTTP,
        student: Tokens,
        own: Tokens,
        ledger: Ledger,
        *,
        model: str,
        shows: Shows,
        key: Key,
        price: Price | None = None,
        seed: int = 0,
    ):
        super().__init__(model, student, ledger, redraws=settings.redraws, max_unanswered=settings.max_unanswered)
        self.settings, self.own, self.model, self.shows, self.key, self.price = settings, own, model, shows, key, price
        self.temperature, self.seed = settings.temperature, seed
        self.foreign = settings.text_only or same_tokenizer(student, own) is not None
        self.aligner = Aligner(student, own) if settings.align else None
        self.most = DRAWS
        """Samples that the server gives to one request; llama.cpp has no more than slots."""

    @property
    def offers(self) -> Wants:
        """What the server shows, with the student's tokenizer; with another one text, and sampled tokens if aligned."""
        most = Wants.SAMPLED if self.aligner else Wants.TEXT if self.foreign else Wants.FULL
        return min(most, OFFERS[self.shows])

    def server(self, ask: Ask) -> str:
        """Where the questions about this rollout go: always to the same server, which keeps its prefix."""
        urls = self.settings.base_url
        return urls[derive("server", *ask.rollout.key) % len(urls)]

    def prepare(self, ask: Ask) -> Prepared:
        """Token ids: the teacher's own rendering of the prompt, then the student's answer."""
        prompt = chat.prompt_ids(self.own.tokenizer, ask.view)
        r = ask.rollout
        text = ask.wants is Wants.TEXT
        end = ask.start if text else len(r.response_ids) if ask.length is None else ask.start + ask.length
        if self.aligner and not text:
            ended = r.response_ids[-1] in self.student.eos
            ids = (*prompt, *self.aligner.written(r).theirs, *self.own.eos[: int(ended)])
        elif self.foreign:
            ids = (*prompt, *self.own.tokenizer.encode(r.text(0, end), add_special_tokens=False))
        else:
            ids = (*prompt, *r.response_ids[:end])
        limit = 1
        if text:
            assert ask.length is not None
            limit = round(SLACK * ask.length) if self.foreign and ask.unit == "student" else ask.length
        s = self.settings
        how: dict[str, Any] = {"continues": "completion", "max_tokens": limit, "cut": self.foreign}
        how |= {"temperature": s.temperature, "top_p": s.top_p} if text else {"k": ask.k, "start": ask.start}
        named: list[Any] = ["http", self.model, how, ids, len(prompt)]
        if self.aligner and not text:  # the scores are kept as the student's, which may cut the same text in other ways
            named += ["aligned", r.response_ids]
        question = Question(
            key=digest(named),
            address=address(ask),
            provider="http",
            model=self.model,
            parameters=how,
            messages=ask.view.messages,
            prefix=r.text(0, end),
        )
        return Prepared(ask=ask, question=question, body=list(ids), limit=limit, read=len(ids))

    @asynccontextmanager
    async def line(self) -> AsyncIterator[Line | None]:
        """With one client for all requests of a step."""
        s = self.settings
        spent = spending(self.ledger, "http", self.model, self.price)
        purse = Purse(spent, s.max_teacher_tokens, s.max_cost, self.price)
        line = Line(
            ("http", self.model),
            ledger=self.ledger,
            purse=purse,
            key=self.key,
            in_flight=s.in_flight,
            retries=s.retries,
        )
        async with client(self.key, s.timeout, s.in_flight, line) as self._client:
            yield line

    async def fetch(self, line: Line | None, prepared: Prepared, draws: Sequence[int]) -> None:
        """One request for each run of consecutive draws: a server counts its samples' seeds on from the first one's."""
        assert line is not None
        if prepared.ask.wants is Wants.TEXT:
            groups = [run[i : i + self.most] for run in runs(draws) for i in range(0, len(run), self.most)]
            done = await asyncio.gather(
                *(self._continue(line, prepared, group) for group in groups), return_exceptions=True
            )
            for problem in done:
                if isinstance(problem, BaseException):
                    raise problem
        else:
            await self._score(line, prepared, draws)

    async def _continue(self, line: Line, prepared: Prepared, draws: Sequence[int]) -> None:
        s, ask = self.settings, prepared.ask
        body = {
            "model": self.model,
            "prompt": prepared.body,
            "max_tokens": prepared.limit,
            "n": len(draws),
            "temperature": s.temperature,
            "top_p": s.top_p,
            "seed": first_seed(self.seed, prepared.question.key) + draws[0],
            **PLAIN,
        }

        async def ask_once() -> Reply:
            return continued(await self._choices(self.server(ask), body), prepared.limit)

        reply, request = await line.send(
            ask_once,
            read=prepared.read,
            written=prepared.limit * len(draws),
            key=prepared.question.key,
            asker=asker(ask),
        )
        self.keep(prepared, reply, request, draws)

    async def _choices(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """A completion with n choices, or with as many as the server takes: the others are asked for again."""
        while True:
            body["n"] = n = min(body["n"], self.most)
            try:
                return await post(self._client, url, body)
            except Failed as failed:
                if n == 1 or failed.status not in (400, 422) or not TOO_MANY.search(failed.message):
                    raise
                allowed = [int(number) for number in re.findall(r"<=\s*(\d+)", failed.message)]
                self.most = max(1, min(self.most, n - 1, *(allowed or [n // 2])))

    async def _score(self, line: Line, prepared: Prepared, draws: Sequence[int]) -> None:
        ask = prepared.ask
        k = ask.k if ask.wants is Wants.TOPK else 0
        body = scoring(self.model, prepared.body, self.shows, k)
        length = len(ask.rollout.response_ids) - ask.start if ask.length is None else ask.length
        first = len(prepared.body) - length
        if self.aligner:
            first = len(chat.prompt_ids(self.own.tokenizer, ask.view))

        async def ask_once() -> Reply:
            reply = scored(await post(self._client, self.server(ask), body), prepared.body, first, k)
            if self.aligner is None:
                return reply
            found = self.aligner.spans(self.aligner.written(ask.rollout), reply.scores["sampled"])
            sampled, aligned = (values[ask.start : ask.start + length].numpy() for values in found)
            return replace(reply, scores={"sampled": sampled, "aligned": aligned})

        reply, request = await line.send(
            ask_once, read=prepared.read, written=1, key=prepared.question.key, asker=asker(ask)
        )
        self.keep(prepared, reply, request, draws)


def spending(ledger: Ledger, provider: str, model: str, price: Price | None) -> tuple[int, float]:
    """Tokens and money that this run has spent on a model, in this process and before."""
    read, cached, stored, written = ledger.tokens().get((provider, model), (0, 0, 0, 0))
    return read + written, price.cost(read, cached, stored, written) if price else 0.0


@asynccontextmanager
async def client(
    key: Key, timeout: float, in_flight: int, line: Line | None = None
) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client that shows the line every header, and the key to the server alone."""

    async def observe(response: httpx2.Response) -> None:
        if line is not None:
            line.observe(response.headers)

    secret = key.reveal()
    async with httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {secret}"} if secret else {},
        timeout=httpx2.Timeout(timeout, connect=min(timeout, 30.0)),
        limits=httpx2.Limits(max_connections=in_flight),
        event_hooks={"response": [observe]},
    ) as made:
        yield made


async def post(client: httpx2.AsyncClient, base_url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON that a server answers. Raises Failed."""
    try:
        response = await client.post(f"{base_url}/completions", json=dict(body))
    except httpx2.HTTPError as error:
        raise Failed(f"{base_url}: {type(error).__name__} {error}") from None
    if response.status_code != 200:
        raise Failed(response.text[:400], response.status_code, response.headers)
    try:
        found = response.json()
        assert isinstance(found["choices"], list) and found["choices"], "no choices"
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise Failed(f"{base_url} sent no completion: {type(error).__name__} {error}") from None
    return found


def continued(found: Mapping[str, Any], limit: int) -> Reply:
    """The texts of a completion; part of a character at the end is left out.

    llama.cpp counts the tokens of one choice, whatever n is; each that was cut off at the limit has as many as that.
    """
    choices = sorted(found["choices"], key=lambda c: c.get("index", 0))
    counted = usage(found.get("usage") or {})
    counted["written"] = max(counted["written"], limit * sum(c.get("finish_reason") == "length" for c in choices))
    return Reply(
        texts=tuple(c["text"].rstrip(chat.REPLACEMENT) for c in choices),
        finishes=tuple(_finish(c.get("finish_reason")) for c in choices),
        **counted,
    )


def _finish(reason: str | None) -> str:
    return {"stop": "stop", "eos": "stop", "length": "length", "content_filter": "refusal"}.get(reason or "", "length")


def usage(found: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens as OpenAI-compatible servers count them."""
    details = found.get("prompt_tokens_details") or {}
    return {
        "read": found.get("prompt_tokens") or 0,
        "cached": details.get("cached_tokens") or 0,
        "stored": details.get("cache_write_tokens") or 0,
        "written": found.get("completion_tokens") or 0,
    }


# --- scores ---------------------------------------------------------------------------------------------------------


def scoring(model: str, ids: Sequence[int], shows: str, k: int) -> dict[str, Any]:
    """A request for the log-probs of a prompt: vLLM's prompt_logprobs, or the older echo, which has no token ids."""
    body: dict[str, Any] = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0}
    return body | ({"prompt_logprobs": k} if shows == "topk" else {"echo": True, "logprobs": 1})


def scored(found: Mapping[str, Any], ids: Sequence[int], first: int, k: int) -> Reply:
    """log-probs (nats) of ids[first:], and of the k likeliest tokens there if k > 0. Raises Failed."""
    choice = found["choices"][0]
    try:
        rows = choice.get("prompt_logprobs") or found.get("prompt_logprobs")
        if rows is None:
            values = choice["logprobs"]["token_logprobs"][first : len(ids)]
            scores: dict[str, np.ndarray] = {"sampled": np.array(values, np.float32)}
        else:
            assert len(rows) == len(ids)
            wanted = list(zip(rows[first:], ids[first:], strict=True))
            scores = {"sampled": np.array([row[str(i)]["logprob"] for row, i in wanted], np.float32)}
            if k:
                tops = [
                    sorted(((e["logprob"], -int(i)) for i, e in row.items()), reverse=True)[:k] for row, _ in wanted
                ]
                scores["topk_ids"] = np.array([[-i for _, i in top] for top in tops], np.int64)
                scores["topk_logp"] = np.array([[p for p, _ in top] for top in tops], np.float32)
        assert scores["sampled"].shape == (len(ids) - first,) and not np.isnan(scores["sampled"]).any()
    except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        raise Failed(f"the log-probs are not those of the prompt ({type(error).__name__} {error})", 200) from None
    return Reply(scores=scores, **usage(found.get("usage") or {}))


# --- start-up -------------------------------------------------------------------------------------------------------


async def meet(settings: HTTP, own: Tokens, shared: bool) -> tuple[str, Shows, Key]:
    """Find out the model's name and what the server shows, with at most three requests of one token.

    Raises TeacherError if there is no server, ModelError if its model cannot be told.
    """
    key = read_key(settings.key_env, settings.key_file, (), needed=False)
    url = settings.base_url[0]
    async with client(key, min(settings.timeout, 60.0), 1) as made:
        try:
            model = settings.model or await _only_model(made, url)
            return model, settings.offers or (await _shows(made, url, model, own) if shared else "text"), key
        except Failed as failed:
            said = key.scrub(" ".join(failed.message.split()))
            raise TeacherError(
                f"there is no usable teacher at {url}: {said}. Start the server, or put teacher.base_url right (it ends in /v1)"
            ) from None


async def _only_model(made: httpx2.AsyncClient, url: str) -> str:
    try:
        response = await made.get(f"{url}/models")
        response.raise_for_status()
        names = [m["id"] for m in response.json()["data"]]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        raise Failed(f"{type(error).__name__} {error}") from None
    if len(names) != 1:
        raise ModelError(f"{url} serves {len(names)} models ({', '.join(names)}). Choose one: teacher.model = ...")
    return names[0]


async def _shows(made: httpx2.AsyncClient, url: str, model: str, own: Tokens) -> Shows:
    """Try the most first. A server that does not know a field either says so or leaves the answer out."""
    ids = own.tokenizer.encode(PROBE, add_special_tokens=False)
    for shows in ("topk", "sampled"):
        try:
            found = await post(made, url, scoring(model, ids, shows, 1))
            if (found["choices"][0].get("prompt_logprobs") is not None) == (shows == "topk"):
                scored(found, ids, 1, 1 if shows == "topk" else 0)
                return shows
        except Failed as failed:
            if failed.status in (None, 401, 403, 404):
                raise
    await post(made, url, {"model": model, "prompt": ids, "max_tokens": 1})
    return "text"
