"""`transformers serve` as a chat teacher: SmolLM2 if `make models` has fetched it, else the lab's teacher."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.real_servers.serve import ROOT, TEACHER, Running, free_port, needs, running
from tests.real_servers.whole import AUDIT, run

from potstill.errors import TeacherError
from potstill.ledger import rows, summary

pytest.importorskip("openai")
pytestmark = pytest.mark.servers

SMOLLM = ROOT / "models/smollm2-135m-instruct"
MODEL = SMOLLM if SMOLLM.is_dir() else TEACHER


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    at, port = tmp_path_factory.mktemp("transformers"), free_port()
    command: list[str | Path] = [needs("accelerate").with_name("transformers"), "serve", MODEL, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with running(command, port, at / "log") as made:
        yield made


def behind(server: Running, ledger: Path, **fields: object) -> str:
    given = {"kind": "chat", "provider": "openai", "base_url": f"{server.url}/v1", "model": str(MODEL)}
    given |= {"ledger": str(ledger), "retries": 1, "max_unanswered": 1.0, **fields}
    return "teacher={" + ", ".join(f"{k}={v!r}" for k, v in given.items()) + "}"


def test_it_teaches_by_instruction_one_draw_at_a_time(server: Running, tmp_path: Path) -> None:
    """It ignores n with a line in its own log, so the draws that are missing are asked for one by one."""
    ledger = tmp_path / "paid.sqlite"
    how = (AUDIT, "rollouts.prompts=2", "steps=1")
    first = run(tmp_path, "first", *how, behind(server, ledger))
    [row] = summary(ledger)
    assert row["answers"] == row["requests"] > 0
    assert row["written"] >= row["answers"]
    assert (row["failed"], row["read"] > 0) == (0, True)
    assert {r["parameters"]["continues"] for r in rows(ledger)} == {"instruction"}
    again = run(tmp_path, "again", *how, behind(server, ledger))
    assert sum(r["requests"] for r in summary(ledger)) == row["requests"], "nothing is asked twice"
    assert [r["loss"] for r in again.metrics] == [r["loss"] for r in first.metrics]


def test_a_prefill_it_does_not_take_is_said(server: Running, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"HTTP 422.*continue_final_message"):
        run(tmp_path, "prefill", AUDIT, behind(server, tmp_path / "paid.sqlite", continues="prefill"))
