"""A thousand questions to a server that fails in every way, from a process that is killed: nothing lost, nothing paid twice.

*Answered* is what the server sent whole, by its own log. *Lost* would be an answer that was in the ledger when the process
died and is asked for again. One that arrived in the very moment of the kill, before it could be written, is not lost but
under way, as `docs/teachers.md` says; there are never more of those than requests in flight.
"""

import asyncio
import json
import multiprocessing
import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.real_servers.serve import free_port

from potstill.ledger import Ledger
from potstill.teachers.http import HTTPTeacher
from potstill.teachers.keys import Key
from potstill.teachers.settings import HTTP
from potstill.types import Ask, Wants

pytestmark = pytest.mark.servers

QUESTIONS, N, IN_FLIGHT, PATIENCE = 1000, 2, 64, 4.0
HERE = Path(__file__).parent


def asks() -> list[Ask]:
    """Five about each rollout."""
    student = tiny.tokens(tiny.byte_level(), "student")
    text = "the dog sat on the mat and the cat"
    rollouts = [
        tiny.rollout(student, text, ask=tiny.prompt(f"{i}?", id=f"p{i}"), seed=7919 * i) for i in range(QUESTIONS // 5)
    ]
    return [
        Ask(rollout=r, view=r.prompt, wants=Wants.TEXT, start=start, length=4, n=N)
        for r in rollouts
        for start in range(1, 6)
    ]


def teacher(url: str, ledger: Path) -> HTTPTeacher:
    own = tiny.tokens(tiny.byte_level(), "student")
    how = HTTP(
        base_url=(f"{url}/v1",),
        tokenizer="unused",
        in_flight=IN_FLIGHT,
        retries=14,
        timeout=PATIENCE,
        max_unanswered=1.0,
    )
    return HTTPTeacher(how, own, own, Ledger(ledger, "run"), model="x", shows="text", key=Key(None))


def ask_all(url: str, ledger: Path, out: Path) -> None:
    """What the process does that is killed."""
    by, began = teacher(url, ledger), time.monotonic()
    texts = [len(f.texts) for f in asyncio.run(by.feedback(asks()))]
    out.write_text(json.dumps({"texts": texts, "notes": by.notes, "seconds": time.monotonic() - began}))


def asking(*arguments: Any) -> multiprocessing.process.BaseProcess:
    """Such a process, begun."""
    process = multiprocessing.get_context("fork").Process(target=ask_all, args=arguments)
    process.start()
    return process


@contextmanager
def faulty(log: Path, seconds: float, faults: float) -> Iterator[str]:
    port = free_port()
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, HERE / "faulty.py", str(port), str(seconds), str(faults)], stdout=out
        )
    try:
        while not log.read_text():
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def answered(log: Path) -> list[tuple[str, int]]:
    """Every sample that the server sent whole: prompt and seed."""
    rows = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    return [(json.dumps(prompt), seed + i) for prompt, seed, n in rows for i in range(n)]


def kept(ledger: Path) -> set[tuple[str, int]]:
    """Questions and draws."""
    with sqlite3.connect(ledger) as db:
        return set(db.execute("select key, draw from answers"))


def whole(out: Path) -> dict[str, Any]:
    """Exactly N samples for every question but those that were dropped and counted."""
    found: dict[str, Any] = json.loads(out.read_text())
    assert set(found["texts"]) == {N}
    assert len(found["texts"]) + found["notes"].get("unanswered", 0) == QUESTIONS
    assert 0.9 * QUESTIONS < len(found["texts"]) < QUESTIONS
    return found


def test_thirty_faults_in_a_hundred(tmp_path: Path) -> None:
    ledger, log, out = tmp_path / "ledger.sqlite", tmp_path / "log", tmp_path / "out"
    with faulty(log, 0.05, 0.3) as url:
        asking(url, ledger, out).join()
    found = whole(out)
    with sqlite3.connect(ledger) as db:
        counts = "select count(*), sum(tries - 1), sum(error is not null) from requests"
        requests, faults, failed = db.execute(counts).fetchone()
    print(f"{requests} requests, {faults} faults, {found['notes']}, {found['seconds']:.1f} s")
    assert faults > 0.3 * requests
    assert failed == 0
    sent = Counter(answered(log))
    assert max(sent.values()) == 1, "an answer that came was asked for again"
    assert len(sent) == len(kept(ledger)) > N * len(found["texts"])


def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    """What the ledger has after a kill the server is never asked for again."""
    moments, ledger, log, out = random.Random(0), tmp_path / "ledger.sqlite", tmp_path / "log", tmp_path / "out"
    with faulty(log, 0.05, 0.3) as url:
        keys = {json.dumps(p.body): p.question.key for p in map(teacher(url, ledger).prepare, asks())}
        Ledger(ledger, "run").settle()
        first: dict[str, int] = {}
        growth = [0]
        for kill in range(11):
            before, lines = kept(ledger), len(log.read_text().splitlines())
            process = asking(url, ledger, out)
            if kill < 10:
                until = len(before) + moments.randrange(40, 180)
                while len(kept(ledger)) < until:
                    time.sleep(0.02)
                process.kill()
            process.join()
            time.sleep(0.3)  # what was under way is sent to nobody
            for line in log.read_text().splitlines()[lines:]:
                prompt, seed, count = json.loads(line)
                base = first.setdefault(json.dumps(prompt), seed)
                draws = {(keys[json.dumps(prompt)], seed - base + i) for i in range(count)}
                assert not draws & before, "an answer of the ledger was asked for again"
            growth.append(len(kept(ledger)))
    found = whole(out)
    under_way = sum(count - 1 for count in Counter(answered(log)).values())
    print(f"answers kept after each kill: {growth}; under way at a kill, and asked for again: {under_way}")
    assert growth == sorted(set(growth))
    assert growth[-1] > N * len(found["texts"])
    assert under_way <= 10 * IN_FLIGHT * N
