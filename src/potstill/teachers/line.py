"""The line to a teacher: how many requests at once, how fast, how often again, and for how much in all."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from potstill.errors import BudgetEnded, TeacherError
from potstill.ledger import Ledger, Request
from potstill.teachers.keys import Key
from potstill.teachers.prices import Price

PATIENCE = 900.0
"""Seconds that a server may ask us to wait; for longer than that the run rather stops, and is resumed later."""
AGAIN = {408, 409, 425, 429, 529, *range(500, 512)}
"""Statuses after which the same request may succeed. No answer came, so none is paid twice."""


class Failed(Exception):
    """A request that brought no answer."""

    def __init__(self, message: str, status: int | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.message, self.status = message, status
        self.wait = asked_to_wait(headers or {}, datetime.now(UTC)) if status in (408, 429, 503, 529) else None

    @property
    def temporary(self) -> bool:
        """Whether the same request may succeed later: a broken connection (no status), or a server that is busy."""
        patient = self.wait is None or self.wait <= PATIENCE
        return patient and (self.status is None or self.status in AGAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a request brought, in words that all providers share."""

    texts: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()
    """stop, length or refusal, one for each text."""
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    read: int = 0
    """Input tokens, cached and stored ones included."""
    cached: int = 0
    stored: int = 0
    written: int = 0
    """Output tokens, thinking included."""


# --- rate limits ----------------------------------------------------------------------------------------------------


def asked_to_wait(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None if there is none that can be read."""
    lower = {name.lower(): value for name, value in headers.items()}
    if (ms := _number(lower.get("retry-after-ms"))) is not None:
        return ms / 1000
    value = lower.get("retry-after")
    if value is None:
        return None
    if (seconds := _number(value)) is not None:
        return max(0.0, seconds)
    return _until(value, now)


def used_up(headers: Mapping[str, str], now: datetime) -> float:
    """Seconds until a rate limit of which nothing remains is lifted; 0 where something remains.

    Reads x-ratelimit-remaining-X with x-ratelimit-reset-X ("1m30s"), and anthropic-ratelimit-X-remaining with -reset (a
    date).
    """
    lower = {name.lower(): value for name, value in headers.items()}
    wait = 0.0
    for name, value in lower.items():
        if "ratelimit" in name and "remaining" in name and _number(value) == 0:
            reset = lower.get(name.replace("remaining", "reset"), "")
            wait = max(wait, _duration(reset) or _until(reset, now) or 0.0)
    return min(wait, PATIENCE)


def _number(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\s*\d+(\.\d+)?\s*", text) else None


def _duration(text: str) -> float | None:
    """ "6m0s", "20ms", "1.5s" or plain seconds."""
    if (plain := _number(text)) is not None:
        return plain
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text)
    if not parts or "".join(n + u for n, u in parts) != text.strip():
        return None
    return sum(float(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[u] for n, u in parts)


def _until(text: str, now: datetime) -> float | None:
    """Seconds until a date, as in mail or ISO 8601."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            when = read(text)
        except ValueError:
            continue
        return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - now.timestamp())
    return None


# --- money ----------------------------------------------------------------------------------------------------------


class Purse:
    """What the run may still spend. Requests under way hold back what they may come to."""

    def __init__(self, spent: tuple[int, float], tokens: int | None, cost: float | None, price: Price | None):
        assert cost is None or price is not None
        self.tokens, self.cost = spent
        self.max_tokens, self.max_cost, self.price = tokens, cost, price

    @contextmanager
    def holding(self, read: int, written: int) -> Iterator[None]:
        """Hold back an estimate while a request is under way. Raises BudgetEnded if it does not fit any more."""
        cost = self.price.cost(read, 0, 0, written) if self.price else 0.0
        if self.max_tokens is not None and self.tokens + read + written > self.max_tokens:
            raise BudgetEnded(
                f"teacher.max_teacher_tokens = {self.max_tokens:,} is used up: {self.tokens:,} are spent or under way, and "
                f"the next request may take {read + written:,}. All answers are kept; raise it to go on"
            )
        if self.max_cost is not None and self.cost + cost > self.max_cost:
            raise BudgetEnded(
                f"teacher.max_cost = {self.max_cost:g} is used up: {self.cost:.4f} is spent or under way, and the next "
                f"request may cost {cost:.4f}. All answers are kept; raise it to go on"
            )
        self.tokens, self.cost = self.tokens + read + written, self.cost + cost
        try:
            yield
        finally:
            self.tokens, self.cost = self.tokens - read - written, self.cost - cost

    def has(self, tokens: int, cost: float) -> bool:
        """Whether so much more may be spent."""
        enough = self.max_tokens is None or self.tokens + tokens <= self.max_tokens
        return enough and (self.max_cost is None or self.cost + cost <= self.max_cost)

    @property
    def limited(self) -> bool:
        """Whether there is an end to it."""
        return self.max_tokens is not None or self.max_cost is not None

    def pay(self, reply: Reply) -> None:
        """Book what a request really took."""
        self.tokens += reply.read + reply.written
        if self.price:
            self.cost += self.price.cost(reply.read, reply.cached, reply.stored, reply.written)


# --- requests -------------------------------------------------------------------------------------------------------


class Line:
    """Sends the requests of one step. After the first that fails for good no other is begun; those under way arrive."""

    def __init__(
        self, who: tuple[str, str], *, ledger: Ledger, purse: Purse, key: Key, in_flight: int, retries: int
    ) -> None:
        self.provider, self.model = who
        self.ledger, self.purse, self.key = ledger, purse, key
        self.retries = retries
        self.slots = asyncio.Semaphore(in_flight)
        self.clear_at = 0.0
        self.ended: TeacherError | None = None

    def observe(self, headers: Mapping[str, str]) -> None:
        """Slow down as the headers of any answer say."""
        self.hold(used_up(headers, datetime.now(UTC)))

    def hold(self, seconds: float) -> None:
        """Begin no request for so long."""
        self.clear_at = max(self.clear_at, time.monotonic() + seconds)

    async def send(
        self, ask: Callable[[], Awaitable[Reply]], *, read: int, written: int, key: str, asker: str
    ) -> tuple[Reply, Request]:
        """One answer, in several tries if need be. `read` and `written` are what it may take, in tokens.

        Nothing else runs between the arrival of the answer and the return, so that it can be written down at once.
        Raises TeacherError when it fails for good, BudgetEnded when it is not affordable.
        """
        began, tries = time.monotonic(), 0
        try:
            async for attempt in AsyncRetrying(**again(self.retries)):
                with attempt:
                    tries = attempt.retry_state.attempt_number
                    reply = await self._once(ask, read, written)
        except Failed as failed:
            raise self._gave_up(failed, tries, time.monotonic() - began, key, asker) from None
        except BudgetEnded as ended:
            self.ended = ended
            raise
        request = Request(
            key=key,
            asker=asker,
            provider=self.provider,
            model=self.model,
            tries=tries,
            read=reply.read,
            cached=reply.cached,
            stored=reply.stored,
            written=reply.written,
            seconds=time.monotonic() - began,
        )
        return reply, request

    async def _once(self, ask: Callable[[], Awaitable[Reply]], read: int, written: int) -> Reply:
        async with self.slots:
            while (wait := self.clear_at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            if self.ended:
                raise self.ended
            with self.purse.holding(read, written):
                try:
                    reply = await ask()
                except Failed as failed:
                    if failed.wait and failed.temporary:
                        self.hold(failed.wait)
                    raise
            self.purse.pay(reply)
            return reply

    def _gave_up(self, failed: Failed, tries: int, seconds: float, key: str, asker: str) -> TeacherError:
        why = self.key.scrub(" ".join(failed.message.split()))[:400]
        if failed.status is not None:
            why = f"HTTP {failed.status}: {why}"
        self.ledger.spent_on(
            Request(
                key=key,
                asker=asker,
                provider=self.provider,
                model=self.model,
                tries=tries,
                seconds=seconds,
                error=why,
            )
        )
        waits = f" It asks to wait {failed.wait:.0f} s." if failed.wait and failed.wait > PATIENCE else ""
        error = TeacherError(
            f"teacher {self.model!r} gave no answer after {tries} {'try' if tries == 1 else 'tries'}: {why}.{waits} "
            "Answers that came are kept: put it right, then --resume asks only for the others"
        )
        self.ended = self.ended or error
        return error


def again(retries: int) -> dict[str, Any]:
    """tenacity's arguments: which requests are repeated, how often, and after what wait."""
    return {
        "stop": stop_after_attempt(retries + 1),
        "wait": _wait,
        "retry": retry_if_exception(_temporary),
        "reraise": True,
    }


def _temporary(error: BaseException) -> bool:
    return isinstance(error, Failed) and error.temporary


_jitter = wait_random_exponential(multiplier=0.5, max=60)


def _wait(state: RetryCallState) -> float:
    """As long as the server says, else up to twice as long each time; never all at the same moment."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, Failed) else None
    return _jitter(state) if asked is None else asked
