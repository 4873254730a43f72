"""The [teacher] tables of teachers that are no model in this process. Read by `potstill.config`; needs no torch."""

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

SECRET = "secret"
"""Type of an error about a value that must not be shown."""


class Table(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A table of the recipe."""


class Networked(Table):
    """What all teachers behind a network have in common."""

    temperature: float = Field(1.0, ge=0)
    """Of the text it writes. Scores are always at 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of the text it writes."""
    key_env: str | None = None
    """Name of the environment variable that holds the API key, never the key itself."""
    key_file: Path | None = None
    """A file that holds nothing but the API key."""
    retries: int = Field(6, ge=0)
    """How often a request is repeated that got no answer: 408, 409, 429, 5xx, a broken connection."""
    timeout: float = Field(600.0, gt=0)
    """Seconds to wait for an answer."""

    @field_validator("key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise PydanticCustomError(
                SECRET, "is no name of a variable, such as MY_API_KEY. A key itself has no place here"
            )
        return name

    @model_validator(mode="after")
    def _one_key(self) -> "Networked":
        if self.key_env is not None and self.key_file is not None:
            raise ValueError("key_env and key_file both say where the API key is; give one of them")
        return self


class Remote(Networked):
    """Those that are paid for, or may be: what they say is kept."""

    in_flight: int = Field(64, gt=0)
    """Requests under way at once, at most."""
    redraws: int = Field(1, ge=0)
    """Rejected answers that are replaced: at most this many times n to a question, which then goes unanswered."""
    max_unanswered: float = Field(0.1, ge=0, le=1)
    """Share of a step's questions that may go unanswered; the run stops beyond it."""
    max_teacher_tokens: int | None = Field(None, gt=0)
    """Tokens read, cached ones included, and written by the teacher in the whole run."""
    max_cost: float | None = Field(None, gt=0)
    """Money spent on the teacher in the whole run, in the currency of the price table."""
    prices: Path | None = None
    """A price table of your own (TOML), read before the one that comes with potstill."""
    ledger: Path | None = None
    """Where answers are kept; unset: ledger.sqlite in the run's folder. Runs may share one."""


class HTTP(Remote):
    """A server of an open model with the OpenAI-compatible completions endpoint: vLLM, SGLang, llama.cpp."""

    kind: Literal["http"] = "http"
    """`http`: such a server."""
    base_url: tuple[str, ...] = Field(min_length=1)
    """Up to and including /v1, such as http://localhost:8000/v1. Several: an answer's questions all go to one of them."""
    tokenizer: str
    """Folder or hub name of the served model's tokenizer, or lab/NAME: prompts are sent as token ids."""
    model: str | None = None
    """The name the server knows the model by; unset: the only one it serves."""
    eos: tuple[str, ...] | None = None
    """As student.eos."""
    offers: Literal["text", "sampled", "topk"] | None = None
    """How much it shows of itself: text; log-probs of the student's tokens; of the likeliest tokens. Unset: it is tried."""
    text_only: bool = False
    """Treat it as a teacher that returns nothing but text, even if it shares the student's tokenizer."""
    align: bool = False
    """With another tokenizer: carry its scores over to the student's tokens, by the text that both stand for."""

    @field_validator("base_url", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("base_url")
    @classmethod
    def _plain(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(plain_url(url) for url in urls)


class Chat(Remote):
    """A model behind a chat API, which returns text: Claude, Gemini, GPT, or any OpenAI-compatible endpoint."""

    kind: Literal["chat"] = "chat"
    """`chat`: a chat API."""
    provider: Literal["anthropic", "google", "openai"]
    """Whose protocol it speaks. `openai` with a base_url: any compatible endpoint."""
    model: str
    """As the provider names it."""
    base_url: str | None = None
    """Unset: the provider's own."""
    continues: Literal["auto", "prefill", "instruction"] = "auto"
    """How it goes on from the student's answer: the answer is put in its mouth, or it is told to. `auto`: prefill where
    the model takes it, which is tried once."""
    thinking_tokens: int = Field(0, ge=0)
    """Room to think before it writes; paid for, and never shown to the student. 0: thinking is switched off."""

    @field_validator("base_url")
    @classmethod
    def _plain(cls, url: str | None) -> str | None:
        return None if url is None else plain_url(url)


class Potstill(Networked):
    """A model behind `potstill serve`, which tells its hidden states; the output layer is applied here."""

    kind: Literal["potstill"] = "potstill"
    """`potstill`: such a server."""
    base_url: str
    """Where it listens, such as http://127.0.0.1:8123."""
    tokenizer: str
    """Folder or hub name of the served model's tokenizer, or lab/NAME: prompts are sent as token ids."""
    device: str = "auto"
    """Where its output layer is applied; as student.device."""
    eos: tuple[str, ...] | None = None
    """As student.eos."""
    text_only: bool = False
    """Treat it as a teacher that returns nothing but text, even if it shares the student's tokenizer."""
    align: bool = False
    """With another tokenizer: carry its scores over to the student's tokens, by the text that both stand for."""

    @field_validator("base_url")
    @classmethod
    def _plain(cls, url: str) -> str:
        return plain_url(url)


class Replay(Table):
    """Answers that were paid for before, from a ledger. No network."""

    kind: Literal["replay"] = "replay"
    """`replay`: a ledger instead of a teacher."""
    ledger: Path
    """ledger.sqlite of an earlier run, or the run's folder."""
    model: str | None = None
    """Whose answers; needed where the ledger holds those of several teachers."""
    redraws: int = Field(1, ge=0)
    """As for the teacher that answered."""
    max_unanswered: float = Field(0.1, ge=0, le=1)
    """Share of a step's questions that may go unanswered; the run stops beyond it."""


def plain_url(url: str) -> str:
    """The address without a trailing slash. An error for one that could hold a key, which does not repeat it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an address begins with http:// or https:// and names a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise PydanticCustomError(
            SECRET, "holds a user, a password or a query. Leave them out; the API key comes from key_env or key_file"
        )
    try:
        parts.port  # noqa: B018
    except ValueError:
        raise ValueError("its port is no number up to 65535") from None
    if not _a_host(parts.hostname):
        raise ValueError(
            "its host is no name or number of a machine, such as localhost, gpu-box.example.org or 10.0.0.7"
        )
    return url.rstrip("/")


def _a_host(name: str) -> bool:
    """Whether it can be looked up at all: what cannot fails with the first request, and not as a broken connection does."""
    try:
        if ":" in name:
            return bool(ip_address(name))
        return re.fullmatch(r"[\w.-]+", name.encode("idna").decode()) is not None
    except ValueError:  # of a name: a part of it is empty or too long
        return False
