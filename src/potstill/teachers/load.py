"""Teachers that are no model in this process: what a recipe asks of them, checked, and then made.

Imported by `potstill.checks` and `potstill.build`; the checks need no network, making them may (see `http.meet`).
"""

import asyncio
from pathlib import Path

from potstill import models
from potstill.errors import ConfigError
from potstill.ledger import NAME, Ledger, ledger_path
from potstill.models import Tokens, same_tokenizer
from potstill.teachers.asking import Asking
from potstill.teachers.chat import ChatTeacher
from potstill.teachers.http import HTTPTeacher, meet
from potstill.teachers.prices import Price, read_prices
from potstill.teachers.replay import ReplayTeacher
from potstill.teachers.settings import HTTP, Chat, Remote, Replay
from potstill.types import Wants


def check(config: Remote | Replay, method: str, wants: Wants) -> None:
    """What can be said without a network. Raises ConfigError."""
    if isinstance(config, Chat) and wants > Wants.TEXT:
        raise ConfigError(
            f"{method} needs the teacher's probabilities, but a chat API (teacher.kind = 'chat') returns only text. Use "
            "method omniopd, or an open model behind a server (kind = 'http') or in this process (kind = 'hf')"
        )
    if isinstance(config, HTTP) and wants is Wants.FULL:
        raise ConfigError(
            f"{method} as set here needs the whole distribution at each position, which no server sends. Set method.top_k to "
            "what the server allows (vLLM: --max-logprobs, 20 unless set), or load the teacher in this process (kind = 'hf')"
        )
    if isinstance(config, HTTP) and config.align and wants is Wants.TOPK:
        raise ConfigError(
            f"{method} as set here needs the likeliest tokens at each position, but the few that a server sends do not say "
            "which the student's would be (teacher.align). Use sampled_kl, or load the teacher in this process (kind = 'hf')"
        )
    if isinstance(config, Remote):
        price_of(config)


def price_of(config: Remote) -> Price | None:
    """What the teacher costs; None where nobody has listed it. Raises ConfigError if a limit in money needs a price."""
    provider = config.provider if isinstance(config, Chat) else "http"
    model = str(getattr(config, "model", None) or "")
    price = read_prices(config.prices).of(provider, model)
    if config.max_cost is not None and price is None:
        raise ConfigError(
            f"teacher.max_cost = {config.max_cost:g} limits the cost of {model!r}, but no price of it is known. Write one into "
            f'a table and name it in teacher.prices: [{provider}] "{model}" = {{ read = 3.0, written = 15.0 }}'
        )
    return price


def load(config: Remote | Replay, student: Tokens, folder: Path, run: str, seed: int) -> Asking:
    """The teacher of a run. Its ledger is in `folder`, the run's, unless the recipe says where. Raises PotstillError."""
    if isinstance(config, Replay):
        return ReplayTeacher(config, student)
    path = folder / NAME if config.ledger is None else ledger_path(config.ledger)
    if config.ledger is not None and not path.parent.is_dir():
        raise ConfigError(f"teacher.ledger = {str(config.ledger)!r}: there is no folder {path.parent}. Make it")
    ledger, price = Ledger(path, run), price_of(config)
    if isinstance(config, Chat):
        return ChatTeacher(config, student, ledger, price=price)
    assert isinstance(config, HTTP)
    own = models.load_tokens(config.tokenizer, config.eos)
    shared = not config.text_only and same_tokenizer(student, own) is None
    model, shows, key = asyncio.run(meet(config, own, shared or config.align))
    return HTTPTeacher(config, student, own, ledger, model=model, shows=shows, key=key, price=price, seed=seed)
