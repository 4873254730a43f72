"""What a provider of chat models is to potstill: one call, and the features it may refuse."""

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2

from potstill.teachers.keys import Key
from potstill.teachers.line import Failed, Reply
from potstill.teachers.settings import Chat

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """A conversation for a model to go on with."""

    messages: Sequence[Message]
    """system, user and assistant; the last one is the user's."""
    prefill: str = ""
    """What the model has begun to say; without white space at its end."""
    max_tokens: int
    n: int = 1
    shared: str
    """Equal for conversations that begin alike: for providers that route by it."""
    reused: bool = False
    """The same conversation will be sent again, so that it pays to cache it."""


class Provider(Protocol):
    """A client of one provider's SDK."""

    async def ask(self, turns: Turns) -> Reply:
        """One request, no retry. Raises Failed."""
        ...


@dataclass
class Features:
    """What a model has refused so far, and is not sent again. A refusal (HTTP 400) costs nothing."""

    refused: set[str] = field(default_factory=set)

    def drop(self, failed: Failed, offered: Mapping[str, str], without: Set[str]) -> bool:
        """Whether the error complains about one of the features offered (name: how errors call it); then it is dropped.

        `without`: what was not in the request that failed. Another one may have been refused the same feature meanwhile.
        """
        if failed.status not in (400, 422):
            return False
        named = [name for name, words in offered.items() if name not in without and re.search(words, failed.message)]
        self.refused.update(named)
        return bool(named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What every provider's client is made from."""

    settings: Chat
    key: Key
    http: httpx2.AsyncClient
    features: Features


NEEDS_THINKING = (
    "{model} does not let thinking be switched off ({said}). "
    "Give it room, which is paid for: teacher.thinking_tokens = 2048"
)


@asynccontextmanager
async def failures(status_error: type[Exception], read: Callable[[Any], Failed]) -> AsyncIterator[None]:
    """Turn whatever an SDK raises for a request that brought no answer into Failed."""
    try:
        yield
    except Failed:
        raise
    except status_error as error:
        raise read(error) from None
    except httpx2.HTTPError as error:
        raise Failed(f"{type(error).__name__} {error}") from None
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # What came is no answer of the promised form: not JSON, cut off, or a page of a proxy.
        raise Failed(f"the answer cannot be read: {type(error).__name__} {error}") from None
