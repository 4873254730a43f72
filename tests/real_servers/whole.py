"""Whole runs behind a server, and beside one."""

from pathlib import Path
from typing import Any

import pytest
from tests.e2e.small import parsed
from tests.real_servers.serve import Running

from potstill.loop import train
from potstill.run import Run

AUDIT = "method={name='omniopd', chunks=3, continuations=2, chunk_length=3, similarity='exact'}"


def run(at: Path, name: str, *overrides: str, resume: bool = False) -> Run:
    (at / "runs").mkdir(exist_ok=True)
    return train(parsed(f"name={name}", "save.rollouts_every=1", *overrides), at / "runs", resume=resume)


def behind(server: Running, **fields: Any) -> str:
    given = {"kind": "http", "base_url": f"{server.url}/v1", "tokenizer": "lab/teacher", "retries": 1}
    return "teacher={" + ", ".join(f"{k}={v!r}" for k, v in (given | fields).items()) + "}"


def same(far: Run, near: Run) -> None:
    """Every logged number to 1e-3, but times and what the teacher did for it."""
    for a, b in zip(far.metrics, near.metrics, strict=True):
        names = [k for k in b if not k.startswith(("time/", "cpu_s", "teacher/"))]
        assert {k: a[k] for k in names} == pytest.approx({k: b[k] for k in names}, rel=1e-3, abs=1e-3)


def anchors(of: Run) -> list[Any]:
    """Where each rollout was audited, and what the teacher wrote there."""
    rows = [row for step in of.rollout_steps for row in of.rollouts(step)]
    return [[(a["start"], a["length"], a["continuations"]) for a in row["audits"]] for row in rows]
