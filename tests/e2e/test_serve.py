"""`potstill serve` in a process of its own, and runs that learn from it: the numbers of a teacher in the same process."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.small import OVERRIDES, Command, command, parsed, recipe, refused
from tests.servers import hidden

from potstill import loop
from potstill.errors import TeacherError
from potstill.models import load
from potstill.run import load_run


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`potstill serve`, once it listens, and where."""
    server = subprocess.Popen(
        [sys.executable, "-m", "potstill", "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "POTSTILL_KEY"},
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        url = re.search(r"http://\S+:\d+", line)
        assert url, line
        yield server, url.group()
    finally:
        server.kill()
        server.communicate()


def behind(url: str, *overrides: str, **fields: Any) -> Any:
    more = "".join(f", {key}={value!r}" for key, value in fields.items())
    return parsed(f"teacher={{kind='potstill', base_url='{url}', tokenizer='lab/teacher'{more}}}", *overrides)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what no two runs share."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "cpu_s"))} for row in rows]


def assert_alike(far: list[dict[str, Any]], near: list[dict[str, Any]]) -> None:
    assert len(far) == len(near) > 0
    for a, b in zip(untimed(far), untimed(near), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)


def test_a_run_is_that_of_a_teacher_in_the_same_process(tmp_path: Path) -> None:
    with process("lab/teacher") as (server, url):
        for name, overrides in {
            "opd": ("steps=4",),
            "sampled_kl": ("method.name=sampled_kl",),
            "omniopd": OVERRIDES["omniopd"][:1],
        }.items():
            far = loop.train(behind(url, f"name=far-{name}", *overrides), tmp_path)
            near = loop.train(parsed(f"name=near-{name}", *overrides), tmp_path)
            assert_alike(far.metrics, near.metrics)
            assert [row["avg@1"] for row in far.evals if "avg@1" in row] == [
                row["avg@1"] for row in near.evals if "avg@1" in row
            ]
        assert not (tmp_path / "far-opd" / "ledger.sqlite").exists()
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        assert server.stdout is not None
        assert server.stderr is not None
        assert "Stopped." in server.stdout.read()
        assert server.stderr.read() == ""


def test_whole_answers_and_other_tokenizers(tmp_path: Path) -> None:
    """What the teacher writes for `sft`; and scores by `align`, which are those of a foreign teacher here."""
    with hidden(load("lab/teacher")) as server:
        run = loop.train(behind(server.url, "method.name=sft"), tmp_path)
        assert all(row["teacher/written"] > 0 for row in run.metrics)
        assert not server.of("/hidden")
        assert not server.of("/head")
    with hidden(load("lab/foreign")) as server:
        aligned = f"teacher={{kind='potstill', base_url='{server.url}', tokenizer='lab/foreign', align=true}}"
        far = loop.train(parsed("name=far", aligned), tmp_path)
    near = loop.train(parsed("name=near", "teacher={path='lab/foreign', align=true}"), tmp_path)
    assert_alike(far.metrics, near.metrics)
    assert 0 < far.metrics[-1]["aligned"] < 1


def test_a_run_whose_server_goes_away_resumes_to_the_same_end(tmp_path: Path) -> None:
    often = ("steps=4", "save.every=1")
    whole = loop.train(parsed("name=whole", *often), tmp_path)
    with hidden(load("lab/teacher")) as server:
        config, port = behind(server.url, *often, retries=1), server.server_port
        server.faults = lambda i: 0 if i >= 4 else None  # who it is, two steps, and its head
        with pytest.raises(TeacherError, match=r"after 2 tries.*--resume goes on from the last checkpoint"):
            loop.train(config, tmp_path)
    run = load_run(tmp_path / "tiny")
    assert [row["step"] for row in run.metrics] == [1, 2]
    with hidden(load("lab/teacher"), port=port):
        run = loop.train(config, tmp_path, resume=True)
    assert_alike(run.metrics, whole.metrics)


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return command(capsys)


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, potstill: Command) -> None:
    table = "teacher={kind='potstill', base_url='%s', tokenizer='%s'%s}"
    with hidden(load("lab/teacher")) as server:
        url = server.url
        arguments = ("train", "tiny.toml", "student.path=lab/student")
        refused(potstill(*arguments, table % (url, "lab/foreign", "")), "do not share a tokenizer", "align = true")
        assert not server.passed, "that is known without a network"
        text = "method={name='omniopd', chunks=2, continuations=2, chunk_length=2, similarity='exact'}"
        mismatch = potstill(*arguments, text, table % (url, "lab/foreign", ""))
        refused(mismatch, "teacher.tokenizer = 'lab/foreign'", "'lab/teacher' at http", "Set teacher.tokenizer to")
        refused(potstill(*arguments, table % (url, "lab/teacher", ", key_env='UNSET'")), "UNSET is not set")
        refused(potstill(*arguments, table % (url, "lab/teacher", ", model='x'")), "there is no field 'model'")
        assert potstill("check", "tiny.toml", table % ("http://nowhere.invalid:1", "lab/teacher", "")).code == 0
    refused(potstill(*arguments, table % (url, "lab/teacher", "")), "no usable teacher", "potstill serve MODEL")
    refused(potstill(*arguments, table % ("localhost:1", "lab/teacher", "")), "begins with http://")
    refused(potstill(*arguments, table % ("http://a..b", "lab/teacher", "")), "its host is no name", "localhost")
    refused(potstill(*arguments, table % ("http://localhost:99999", "lab/teacher", "")), "its port is no number up to")
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.toml"}


def test_what_cannot_be_served_is_refused(potstill: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POTSTILL_KEY", raising=False)
    refused(potstill("serve", "lab/teacher", "--host", "0.0.0.0"), "--host 0.0.0.0", "POTSTILL_KEY is not set", "SSH")
    refused(potstill("serve", "lab/nobody", "--port", "0"), "nobody")
    refused(potstill("serve", "lab/teacher", "--dtype", "float16"), "float16", "bfloat16")
    with hidden(load("lab/teacher")) as server:
        taken = potstill("serve", "lab/nobody", "--port", str(server.server_port))
        refused(taken, "cannot listen at", "--port")  # before the model is looked for
    monkeypatch.setenv("POTSTILL_KEY", "sécret")
    unsent = potstill("serve", "lab/teacher", "--port", "0")
    refused(unsent, "POTSTILL_KEY holds a key that cannot be sent", "Copy the key again")
    assert "sécret" not in unsent.err
