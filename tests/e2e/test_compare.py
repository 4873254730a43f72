"""A comparison of real, tiny runs: stopped, killed, started again, and what it then writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tests.e2e.small import RECIPE, Command, command, recipe

import potstill as package
from potstill.comparison import running
from potstill.comparison.running import Job
from potstill.errors import TrainingError
from potstill.metrics import crossed_bootstrap
from potstill.run import Run

VARIANTS = """
[variants]
opd = {}
from-data = {method = {name = "sft", source = "data"}, learner.lr = 1e-4}
"""
ASKED = ("compare", "tiny.toml", "--seeds", "0-1", "--budget", "steps=5", "--jobs", "1", "--out", "out")


@pytest.fixture
def potstill(capsys: pytest.CaptureFixture[str]) -> Command:
    return command(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of two variants, for the tests below in turn."""
    folder = tmp_path_factory.mktemp("compare")
    recipe(folder, RECIPE.replace("every = 2", "every = 3") + VARIANTS)
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def stopped(by: signal.Signals, after: Path) -> "subprocess.Popen[str]":
    """The command as a process group of its own, which gets a signal when there is something in the file `after`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "potstill", *ASKED],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    limit = time.monotonic() + 120
    while not (after.exists() and after.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.005)
    os.killpg(process.pid, by)
    return process


def test_stopped_killed_and_started_again(folder: Path, potstill: Command) -> None:
    out = folder / "out"
    process = stopped(signal.SIGINT, out / "opd" / "seed-0" / "metrics.jsonl")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "The same command goes on" in errors
    assert "Traceback" not in errors
    first = Run.open(out / "opd" / "seed-0")
    saved = first.latest()
    assert saved
    assert saved[0] == first.metrics[-1]["step"], "the step was finished and saved"

    process = stopped(signal.SIGKILL, out / "from-data" / "seed-0" / "metrics.jsonl")
    process.communicate(timeout=120)
    assert first.finished
    assert first.finished["step"] == 5
    files = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in first.path.rglob("*") if p.is_file()}
    assert not (out / "comparison.json").exists()

    ended = potstill(*ASKED)
    assert ended.code == 0, ended.err
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in first.path.rglob("*") if p.is_file()} == files
    for run in (Run.open(out / label / f"seed-{seed}") for label in ("opd", "from-data") for seed in (0, 1)):
        assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5]
        assert run.finished
        assert run.finished["why"] == "steps"
    assert "opd seed-1: " in ended.out
    assert "opd seed-0: " not in ended.out, "it was finished before"
    assert "2 seeds" in ended.out
    assert "winner: " in ended.out


def test_what_it_writes(folder: Path) -> None:
    out = folder / "out"
    figures = json.loads((out / "comparison.json").read_text())
    runs = {label: [Run.open(out / label / f"seed-{s}") for s in (0, 1)] for label in ("opd", "from-data")}
    scores = {
        label: np.array(
            [next(r["scores"] for r in run.evals if (r["name"], r["step"]) == ("sampled", 5)) for run in two]
        )
        for label, two in runs.items()
    }
    for label, values in scores.items():
        assert list(figures["variants"][label]["avg@2"].values()) == pytest.approx(crossed_bootstrap(values), abs=1e-6)
    found = figures["variants"]["from-data"]["difference"]["avg@2"]
    assert list(found.values()) == pytest.approx(crossed_bootstrap(scores["from-data"] - scores["opd"]), abs=1e-6)
    assert runs["from-data"][0].resolved["teacher"] is None
    assert runs["from-data"][0].resolved["learner"]["lr"] == 1e-4
    assert figures["variants"]["from-data"]["teacher_tokens"] == 0 < figures["variants"]["opd"]["teacher_tokens"]
    starts = {tuple(run.evals[0]["scores"]) for run in (runs["opd"][0], runs["from-data"][0])}
    assert len(starts) == 1, "the same start, the same questions, the same random numbers"
    assert [p["x"] for p in figures["curves"]["opd"]["steps"]] == [0, 3, 5]
    page = (out / "comparison.html").read_text()
    assert figures["winner"]["sentence"][3:] in page
    assert "learner.lr = 0.0001" in page
    assert 'src="' not in page
    assert 'href="http' not in page
    assert (out / "comparison.md").read_text().startswith("|  | avg@2 | pass@2 | greedy | avg@2 - opd |")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "curves.svg").read_text()


def test_finished_runs_are_compared_without_torch(folder: Path) -> None:
    for arguments in ((*ASKED, "--against", "from-data"), ("compare", "--help")):
        code = f"""
import sys
from potstill import cli
try:
    cli.main({list(arguments)!r})
except SystemExit as end:
    assert not end.code, end.code
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert json.loads((folder / "out" / "comparison.json").read_text())["against"] == "from-data"


def test_another_budget_is_another_comparison(potstill: Command) -> None:
    ended = potstill(*ASKED, "learner.lr=5e-4")
    assert ended.code == 2
    assert "learner.lr (not set there, 0.0005 now)" in ended.err
    ended = potstill(*ASKED[:4], "--budget", "steps=6", "--out", "out")
    assert ended.code == 2
    assert "steps (5 there, 6 now)" in ended.err
    ended = potstill(*ASKED, "--budget", "cpu_seconds=3")
    assert ended.code == 2
    assert "names two budgets" in ended.err


def test_from_python() -> None:
    done = package.compare("tiny.toml", ["opd"], [1], budget="steps=5", out="out")
    assert done.winner is None
    assert done.figures["seeds"] == [1]
    assert "one seed (1), so seeds were not varied" in (done.folder / "comparison.md").read_text()


# --- processes ----------------------------------------------------------------------------------------------------


def test_a_run_that_another_process_is_busy_with_is_waited_for(tmp_path: Path) -> None:
    """The other one finishes it; a process of ours would fail, because there is no recipe."""
    job = Job("a", 0, tmp_path)
    run = Run.create(job.run.path, config="", resolved={}, env={})
    code = f"""
import time
from pathlib import Path
from potstill import Run
run = Run(Path({str(run.path)!r}))
with run.locked():
    print("held", flush=True)
    time.sleep(0.7)
    run.finish({{"step": 1, "cpu_s": 0.0}})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        other.stdout.readline()
        assert job.busy
        running.train([job], 1, Console(quiet=True))
    assert run.finished
    assert not job.log.exists()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    bad, good = Job("bad", 0, tmp_path / "bad"), Job("good", 0, tmp_path / "good")
    for job, method in ((bad, "odp"), (good, "sft")):
        job.write(
            {
                "steps": 1,
                "student": {"path": "lab/student"},
                "task": {"kind": "arithmetic"},
                "method": {"name": method, "source": "data"},
                "rollouts": {"prompts": 2},
                "eval": {"questions": 0},
            }
        )
    with pytest.raises(TrainingError, match=r"(?s)1 of 2 runs failed: bad seed-0\..*seed-0\.log.*no method 'odp'"):
        running.train([bad, good], 1, Console(quiet=True))
    assert good.run.finished
