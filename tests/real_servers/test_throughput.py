"""64 requests in flight against a server that takes a second: what our own side costs. Wants a machine with a core to spare."""

import asyncio
import os
import time
from pathlib import Path

import pytest
from tests import tiny
from tests.real_servers.test_paid_once import faulty, teacher

from potstill.types import Ask, Wants

pytestmark = pytest.mark.servers

REQUESTS, IN_FLIGHT, LATENCY = 1280, 64, 1.0


def test_sixty_four_in_flight(tmp_path: Path) -> None:
    student = tiny.tokens(tiny.byte_level(), "student")
    prompts = [tiny.prompt(f"{i}?", id=f"p{i}") for i in range(REQUESTS)]
    rollouts = [tiny.rollout(student, "the dog sat on the mat", ask=p, seed=7919 * i) for i, p in enumerate(prompts)]
    asks = [Ask(rollout=r, view=r.prompt, wants=Wants.TEXT, start=4, length=4, n=1) for r in rollouts]
    with faulty(tmp_path / "log", LATENCY, 0.0) as url:
        by = teacher(url, tmp_path / "ledger.sqlite")
        began, cpu = time.monotonic(), time.process_time()
        assert len(asyncio.run(by.feedback(asks))) == REQUESTS
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    share = REQUESTS / IN_FLIGHT * LATENCY / seconds
    said = f"{share:.1%} of the ideal throughput, {1000 * cpu / REQUESTS:.1f} ms of CPU a request, load {os.getloadavg()[0]:.1f}"
    print(said)
    assert share >= 0.9, said
