"""vLLM on the CPU with the lab's teacher: the same numbers as in this process, each prefix read once, each answer paid once."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from tests import tiny
from tests.real_servers.serve import CONTEXT, Running, free_port, needs, running, widened
from tests.real_servers.whole import AUDIT, anchors, behind, run, same

from potstill.errors import TeacherError
from potstill.ledger import Ledger
from potstill.models import Loaded, load
from potstill.seeds import derive
from potstill.teachers.asking import first_seed
from potstill.teachers.http import PLAIN, HTTPTeacher, meet
from potstill.teachers.settings import HTTP
from potstill.types import Ask, Prompt, Rollout, Wants

pytestmark = pytest.mark.servers

BLOCK = 32
"""Tokens that vLLM keeps or forgets together; the least that its CPU backend takes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    at, port = tmp_path_factory.mktemp("vllm"), free_port()
    command: list[str | Path] = [needs("vllm"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", widened(at / "teacher"), "--served-model-name", "lab", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT)]
    command += ["--max-logprobs", "23", "--enable-prefix-caching", "--block-size", str(BLOCK)]
    command += ["--enable-prompt-tokens-details"]
    with running(command, port, at / "log") as made:
        yield made


@pytest.fixture(scope="module")
def lab() -> Loaded:
    return load("lab/teacher")


def teacher(server: Running, at: Path, lab: Loaded, **fields: Any) -> HTTPTeacher:
    how = HTTP(base_url=(f"{server.url}/v1",), tokenizer="lab/teacher", **fields)
    model, shows, key = asyncio.run(meet(how, lab.tokens, True))
    return HTTPTeacher(
        how, lab.tokens, lab.tokens, Ledger(at / "ledger.sqlite", "run"), model=model, shows=shows, key=key
    )


def long_rollout(lab: Loaded, name: str, length: int) -> Rollout:
    """Digits that no other test has sent."""
    numbers = np.random.default_rng(derive(0, "rollout", name)).integers(10, size=length)
    question = Prompt(id=name, messages=({"role": "user", "content": "12*34+56="},), answer="464")
    return tiny.rollout(lab.tokens, "".join(map(str, numbers)), ask=question, seed=derive(0, "seed", name))


def audits(r: Rollout, chunks: int, n: int) -> list[Ask]:
    starts = np.linspace(len(r.response_ids) // chunks, len(r.response_ids) - 50, chunks).astype(int)
    return [Ask(rollout=r, view=r.prompt, wants=Wants.TEXT, start=int(s), length=50, n=n) for s in starts]


# --- the same as the model in this process ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["name='sampled_kl'", "name='opd', top_k=5", "name='opd', top_k=23"])
def test_losses_are_those_of_the_local_model(server: Running, method: str, tmp_path: Path) -> None:
    how = (f"method={{{method}}}", "steps=6")
    far, near = run(tmp_path, "far", *how, behind(server)), run(tmp_path, "near", *how)
    assert len(far.metrics) == 6
    same(far, near)


def test_audits_are_those_of_the_local_model(server: Running, tmp_path: Path) -> None:
    """Greedily, since two implementations draw differently: the same anchors, similarities and losses."""
    how = (AUDIT.replace("continuations=2", "continuations=1"), "steps=6")
    far = run(tmp_path, "far", *how, behind(server, temperature=0.0))
    near = run(tmp_path, "near", *how, "teacher={path='lab/teacher', temperature=0.0}")
    same(far, near)
    assert sum(row["teacher/written"] for row in far.metrics) > 0
    assert anchors(far) == anchors(near)


# --- what it reads ------------------------------------------------------------------------------------------------------


def test_each_prefix_is_computed_once(server: Running, tmp_path: Path, lab: Loaded) -> None:
    """By the server's own count: little more than the prompt and the last anchor's prefix, of M x N prefixes."""
    by, chunks, n = teacher(server, tmp_path, lab), 8, 2
    rollouts = [long_rollout(lab, f"shared {i}", 3000) for i in range(3)]
    asks = [ask for r in rollouts for ask in audits(r, chunks, n)]
    computed = lambda: server.counter("prompt_tokens_by_source_total", source="local_compute")  # noqa: E731
    before = computed()
    got = asyncio.run(by.feedback(asks))
    shared = computed() - before
    assert [len(f.texts) for f in got] == [n] * len(asks)
    least = sum(len(r.prompt_ids) + max(a.start for a in asks if a.rollout is r) for r in rollouts)
    cached = sum(f.usage.cached for f in got)
    assert cached > 0, "the server reports what it had in its cache"

    before = computed()
    for i, ask in enumerate(asks):
        ids = by.prepare(ask).body
        for j in range(n):
            alone = {"model": "lab", "prompt": ids, "max_tokens": 1, "cache_salt": f"{i}.{j}"}
            httpx2.post(f"{server.url}/v1/completions", json=alone).raise_for_status()
    naive = computed() - before
    print(f"computed {shared}, least {least} ({shared / least:.3f}), naive {naive} ({naive / least:.1f})")
    assert naive == sum(n * len(by.prepare(ask).body) for ask in asks)
    assert shared <= 1.2 * least


# --- chance ---------------------------------------------------------------------------------------------------------------


def test_draws_have_the_seeds_they_are_counted_to_have(server: Running, lab: Loaded) -> None:
    """n samples of one request are those of n requests with consecutive seeds, on which the draws of a question rest."""
    r = long_rollout(lab, "seeds", 40)

    def texts(seed: int, n: int) -> list[str]:
        body = {"model": "lab", "prompt": [*r.prompt_ids, *r.response_ids], "max_tokens": 20, "temperature": 2.0}
        found = httpx2.post(f"{server.url}/v1/completions", json=body | {"seed": seed, "n": n} | PLAIN).json()
        return [c["text"] for c in sorted(found["choices"], key=lambda c: c["index"])]

    together = texts(100, 6)
    assert together == [texts(100 + i, 1)[0] for i in range(6)]
    assert len(set(together)) == 6


def test_no_two_chunks_share_a_stream(server: Running, tmp_path: Path, lab: Loaded) -> None:
    """Twelve questions whose prefixes differ and whose answers hardly depend on it: equal streams would give equal texts."""
    r = replace(long_rollout(lab, "streams", 400), seed=derive(0, "seed", "streams"))
    asks = [Ask(rollout=r, view=r.prompt, wants=Wants.TEXT, start=100 + i, length=30, n=4) for i in range(12)]
    by = teacher(server, tmp_path, lab, temperature=2.0)
    first = [first_seed(by.seed, by.prepare(a).question.key) for a in asks]
    seeds = [seed + i for seed in first for i in range(4 * (1 + by.redraws))]
    assert len(set(seeds)) == len(seeds)
    texts = [text for f in asyncio.run(by.feedback(asks)) for text in f.texts]
    assert len(set(texts)) == len(texts) == 48


# --- the whole way ----------------------------------------------------------------------------------------------------------


def kept(at: Path) -> int:
    """Answers in a ledger."""
    with sqlite3.connect(at) as db:
        count: int = db.execute("select count(*) from answers").fetchone()[0]
        return count


def test_a_run_whose_server_is_killed_asks_for_nothing_twice(server: Running, tmp_path: Path) -> None:
    """The last test: it restarts the server. Answers of both lives together are those of an undisturbed run."""
    how = (AUDIT, "steps=12")
    whole = run(tmp_path, "whole", *how, behind(server, ledger=str(tmp_path / "whole.sqlite")))
    assert len(whole.metrics) == 12
    paid = tmp_path / "paid.sqlite"
    again = (*how, behind(server, ledger=str(paid)))
    served = server.counter("request_success_total")
    enough = kept(tmp_path / "whole.sqlite") // 2

    def assassin() -> None:
        while server.counter("request_success_total") < served + enough:
            time.sleep(0.01)
        server.kill()

    thread = threading.Thread(target=assassin)
    thread.start()
    with pytest.raises(TeacherError, match="--resume"):
        run(tmp_path, "again", *again)
    thread.join()
    had = kept(paid)
    assert 0 < had < kept(tmp_path / "whole.sqlite")
    server.start()
    resumed = run(tmp_path, "again", *again, resume=True)
    probes = 1
    assert server.counter("request_success_total") == kept(paid) - had + probes
    assert kept(paid) == kept(tmp_path / "whole.sqlite")
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in whole.metrics]
