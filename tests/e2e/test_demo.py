"""The demo: its summary from two small runs, and (slow) the whole of it."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.e2e.small import OVERRIDES, parsed

from potstill import demo, load_run, loop
from potstill.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("demo")
    return {name: loop.train(parsed(f"name={name}", *OVERRIDES[name]), Path(root)) for name in demo.METHODS}


def test_summary(runs: dict[str, Run]):
    summary = json.loads(json.dumps(demo.summarise(runs, seed=3)))
    assert (summary["seed"], summary["split"], summary["questions"]) == (3, "validation", 8)
    for name, run in runs.items():
        method = summary["methods"][name]
        first, last = run.evals[0], run.evals[-2]
        assert method["start"]["sampled"] == first["avg@2"]
        assert method["end"]["sampled"] == last["avg@2"]
        gain = method["gain"]["sampled"]
        assert gain["value"] == pytest.approx(last["avg@2"]["value"] - first["avg@2"]["value"], abs=1e-6)
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert method["teacher_tokens"]["read"] == sum(row["teacher/read"] for row in run.metrics)
        assert method["steps"] == 2
        assert method["cpu_seconds"] == run.metrics[-1]["cpu_s"]
    opd, omniopd = (summary["methods"][name]["teacher_tokens"] for name in demo.METHODS)
    assert opd["written"] == 0 < omniopd["written"]


def test_table(runs: dict[str, Run]):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(demo.table(demo.summarise(runs, seed=3)))
    text = console.export_text()
    for word in ("opd", "omniopd", "sampled", "greedy", "8 unseen questions", "seed 3", "bootstrap"):
        assert word in text


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path):
    folder = tmp_path / "demo"
    summary = demo.run(folder, 0, Console(quiet=True))
    opd, omniopd = (summary["methods"][name] for name in demo.METHODS)
    assert opd["gain"]["sampled"]["value"] >= 0.5
    assert opd["cpu_seconds"] <= 90
    assert omniopd["gain"]["sampled"]["low"] > 0
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text())["methods"].keys() == set(demo.METHODS)
    assert load_run(folder / "opd").latest() is not None
