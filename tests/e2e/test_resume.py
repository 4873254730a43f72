"""A run that was stopped and resumed is, bit for bit, the run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.e2e.small import OVERRIDES, RECIPE, parsed, recipe

from potstill import loop
from potstill.run import Run, load_run

LORA = "student.lora={rank=2, alpha=4, dropout=0.1, modules=['q_proj', 'v_proj']}"
LONG = ("steps=6", "save.every=2", "eval.every=3", "save.rollouts_every=1")
METHODS = ("opd", "sampled_kl", "sft", "omniopd", "sgopd", "grpo", "reopold")
"""Every way of spending, asking and scheduling; the other methods differ in one line of credit."""
KINDS = {name: OVERRIDES[name] for name in METHODS} | {
    "reopold": (*OVERRIDES["reopold"], "budget.rollout_tokens=800"),
    "opd, projected": ("projection={from='self', k=4, mode='coord', at=0.3}", "geometry={every=2, most=9.0}"),
    "opd with lora": (*OVERRIDES["opd"], LORA),
    "omniopd with lora": (*OVERRIDES["omniopd"], LORA),
    "opd in micro-batches, cosine": ("learner={micro_batch=3, schedule='cosine', warmup=2}", "rollouts.group=2"),
}


class Killed(Exception):
    """Stands for a kill between two writes."""


class Killer:
    """Stops a run after the metrics of a step, or after an evaluation of it, are written."""

    def __init__(self, event: str, step: int):
        self.event, self.when = event, step

    def step(self, row: Mapping[str, Any]) -> None:
        self._happen("step", row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        self._happen(row["name"], row)

    def _happen(self, event: str, row: Mapping[str, Any]) -> None:
        if (event, row["step"]) == (self.event, self.when):
            raise Killed


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what no two runs share."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k not in ("cpu_s", "eval_cpu_s")} for row in rows
    ]


def assert_same(a: Run, b: Run) -> None:
    assert untimed(a.metrics) == untimed(b.metrics)
    assert untimed(a.evals) == untimed(b.evals)
    assert a.rollout_steps == b.rollout_steps
    assert all(a.rollouts(step) == b.rollouts(step) for step in a.rollout_steps)
    x, y = (load_file(run.path / "checkpoints" / "step_000006" / "model.safetensors") for run in (a, b))
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
    for run in (a, b):
        assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["latest", "step_000004", "step_000006"]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_straight(kind: str, tmp_path: Path):
    config = parsed(*LONG, *KINDS[kind])
    straight = loop.train(config, tmp_path / "straight")
    moments = [("sampled", 0), ("step", 3), ("greedy", 6)]
    for i, (event, step) in enumerate(moments):
        with pytest.raises(Killed):
            loop.train(config, tmp_path / "stopped", resume=i > 0, watch=Killer(event, step))
    resumed = loop.train(config, tmp_path / "stopped", resume=True)
    assert_same(straight, resumed)
    assert resumed.metrics[-1]["cpu_s"] > resumed.metrics[1]["cpu_s"] > 0


def test_a_finished_run_resumes_to_itself(tmp_path: Path):
    run = loop.train(parsed(), tmp_path)
    before = run.metrics, run.evals
    assert loop.train(parsed(), tmp_path, resume=True).metrics == before[0]
    assert run.evals == before[1]


def test_a_kill_in_the_middle_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The half-written folder is not taken for a checkpoint, and is gone when the run is."""
    config = parsed(*LONG)
    straight = loop.train(config, tmp_path / "straight")
    root = tmp_path / "stopped"
    with pytest.raises(Killed):
        loop.train(config, root, watch=Killer("step", 4))
    checkpoints = root / "tiny" / "checkpoints"
    torn = checkpoints / ".step_000004.1"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    whole_but_not_the_latest = checkpoints / "step_000006"
    whole_but_not_the_latest.mkdir()
    with (root / "tiny" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in load_run(root / "tiny").metrics] == [1, 2, 3, 4]
    assert_same(straight, loop.train(config, root, resume=True))


def test_going_back_to_an_older_checkpoint(tmp_path: Path):
    """What the message about a damaged checkpoint proposes; the newer checkpoints give way."""
    config = parsed(*LONG)
    run = loop.train(config, tmp_path)
    first = untimed(run.metrics)
    (run.path / "checkpoints" / "latest").write_text("step_000004\n")
    with pytest.raises(Killed):
        loop.train(config, tmp_path, resume=True, watch=Killer("step", 5))
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5]
    latest = loop.train(config, tmp_path, resume=True).latest()
    assert latest
    assert latest[0] == 6
    assert untimed(run.metrics) == first


# --- real processes -----------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "potstill", "train", "tiny.toml", *LONG, *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Until there is something at `path`."""
    limit = time.monotonic() + 120
    while not (path.exists() and (path.is_dir() or path.stat().st_size)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_sigkill(tmp_path: Path):
    """Killed at three moments, one of them while a checkpoint is being written."""
    recipe(tmp_path, RECIPE)
    run = tmp_path / "runs" / "tiny"
    arguments: tuple[str, ...] = OVERRIDES["omniopd"]
    straight = loop.train(parsed(*LONG, *arguments), tmp_path / "straight")
    delay = random.Random(0)
    for i, what in enumerate(("metrics.jsonl", "checkpoints/step_000002")):
        process = start(tmp_path, *arguments, *["--resume"] * (i > 0))
        wait_for(run / what, process)
        time.sleep(delay.uniform(0, 0.05))
        process.kill()
        process.communicate()
        record = [row["step"] for row in load_run(run).metrics]
        assert record == list(range(1, len(record) + 1))
    assert_same(straight, loop.train(parsed(*LONG, *arguments), tmp_path / "runs", resume=True))


def test_sigint(tmp_path: Path):
    """Ctrl-C: the step ends, its work is saved, exit code 130."""
    recipe(tmp_path, RECIPE)
    run = tmp_path / "runs" / "tiny"
    process = start(tmp_path, "steps=100000", "save.every=100000", "eval.every=100000")
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted after step" in errors
    assert "--resume" in errors
    latest = load_run(run).latest()
    assert latest
    assert latest[0] == load_run(run).metrics[-1]["step"]


def test_ctrl_c_belongs_to_the_caller_again_after_a_run(tmp_path: Path):
    before = signal.getsignal(signal.SIGINT)
    heard = []

    class Impatient(Killer):
        def evaluation(self, row: Mapping[str, Any]) -> None:
            heard.append(row["name"])
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(loop.Interrupted, match="before the first step"):
        loop.train(parsed("eval.greedy=false"), tmp_path, watch=Impatient("never", 0))
    assert heard == ["sampled"]
    assert signal.getsignal(signal.SIGINT) is before
    assert loop.train(parsed("eval.greedy=false"), tmp_path, resume=True).metrics[-1]["step"] == 2
    assert json.loads((tmp_path / "tiny" / "resolved.json").read_text())["eval"]["greedy"] is False
