"""The demo: one student, two ways to teach it, one page.

opd sees the teacher's whole distribution; omniopd sees only the text of a teacher with another tokenizer. Each runs in
a process of its own, with one thread, from a recipe that comes with the package.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from potstill.errors import ConfigError, Interrupted, TrainingError
from potstill.metrics import paired_bootstrap
from potstill.progress import CAPTION, accuracy, percent
from potstill.recipes import read
from potstill.report import write
from potstill.run import Run, read_rows, write_whole

METHODS = ("opd", "omniopd")
Row = dict[str, Any]


def run(folder: Path, seed: int, console: Console) -> Row:
    """Train both, print the table, write summary.json and report.html into `folder`. Returns the summary.

    Raises ConfigError if `folder` exists, TrainingError if a run fails, Interrupted on Ctrl-C.
    """
    if folder.exists():
        raise ConfigError(
            f"{folder} exists already, and a run never overwrites another. Give another folder with --out"
        )
    folder.mkdir(parents=True)
    began = time.perf_counter()
    with _running(folder, seed) as processes:
        _watch(folder, processes, console)
    for method, process in processes.items():
        if process.returncode:  # None: ended by us, because the other one failed
            message = (folder / f"{method}.log").read_text(encoding="utf-8").strip()
            raise TrainingError(f"the run {method} ended with exit code {process.returncode}:\n{message[-2000:]}")
    runs = {method: Run.open(folder / method) for method in METHODS}
    summary = summarise(runs, seed) | {"wall_seconds": round(time.perf_counter() - began, 1)}
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write(folder / "report.html", list(runs.values()), summary=summary)
    console.print(table(summary))
    for line in cost(summary):
        console.print(line)
    console.print(
        f"Why: open {folder / 'report.html'} in a browser. Every number: {folder / 'summary.json'}", soft_wrap=True
    )
    return summary


@contextmanager
def _running(folder: Path, seed: int) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Both runs as processes, ended with the block."""
    logs: list[IO[bytes]] = []
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for method in METHODS:
            logs.append((folder / f"{method}.log").open("wb"))
            command = [sys.executable, "-m", "potstill", "train", f"demo-{method}", f"name={method}", f"seed={seed}"]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            processes[method] = subprocess.Popen(
                [*command, "--root", str(folder)], stdout=logs[-1], stderr=subprocess.STDOUT, env=env
            )
        yield processes
    except KeyboardInterrupt:
        for process in processes.values():
            process.wait()  # the same Ctrl-C reached them: they finish their step and save it
        raise Interrupted(
            f"interrupted; both runs are saved. Go on with one of them: potstill train demo-METHOD name=METHOD seed={seed} "
            f"--root {folder} --resume, with METHOD = {' or '.join(METHODS)}; then potstill report {folder}/METHOD"
        ) from None
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
        for log in logs:
            log.close()


def _watch(folder: Path, processes: Mapping[str, subprocess.Popen[bytes]], console: Console) -> None:
    """Show where the runs are until both have ended."""
    steps = {method: read(f"demo-{method}")[0].steps or 0 for method in METHODS}
    if not console.is_terminal:
        while _both(processes):
            time.sleep(0.2)
        return
    with Live(console=console, refresh_per_second=2) as live:
        while _both(processes):
            live.update(_progress(folder, steps))
            time.sleep(0.5)
        live.update(_progress(folder, steps))


def _both(processes: Mapping[str, subprocess.Popen[bytes]]) -> bool:
    """Whether there is something to wait for: a run is under way, and none has failed."""
    codes = [process.poll() for process in processes.values()]
    return None in codes and not any(codes)


def _progress(folder: Path, steps: Mapping[str, int]) -> Table:
    shown = Table("method", "step", "CPU s", "sampled, %", "greedy, %", "teacher wrote", box=SIMPLE_HEAD)
    for method in METHODS:
        rows, evals = read_rows(folder / method / "metrics.jsonl"), read_rows(folder / method / "evals.jsonl")
        last = {row["name"]: percent(accuracy(row)) for row in evals}
        written = sum(row["teacher/written"] for row in rows)
        step, cpu = (rows[-1]["step"], rows[-1]["cpu_s"]) if rows else (0, 0.0)
        cells = [f"{step} / {steps[method]}", f"{cpu:.0f}", last.get("sampled", ""), last.get("greedy", "")]
        shown.add_row(method, *cells, f"{written:,}")
    return shown


def summarise(runs: Mapping[str, Run], seed: int) -> Row:
    """Start, end and gain of each method, with 95 % intervals over the same questions, and what they cost."""
    methods = {method: _summary(method, run) for method, run in runs.items()}
    first = next(iter(runs.values())).evals[0]
    return {"seed": seed, "split": first["split"], "questions": first["questions"], "methods": methods}


def _summary(method: str, run: Run) -> Row:
    evals, metrics = run.evals, run.metrics
    out: Row = {"run": method, "start": {}, "end": {}, "gain": {}}
    for how in dict.fromkeys(row["name"] for row in evals):
        rows = [row for row in evals if row["name"] == how]
        out["start"][how], out["end"][how] = accuracy(rows[0]), accuracy(rows[-1])
        gain = paired_bootstrap(np.array(rows[0]["scores"]), np.array(rows[-1]["scores"]))
        out["gain"][how] = {name: round(value, 6) for name, value in gain._asdict().items()}
    out["steps"] = metrics[-1]["step"]
    out["cpu_seconds"] = metrics[-1]["cpu_s"]
    out["eval_cpu_seconds"] = round(sum(row["eval_cpu_s"] for row in evals), 3)
    out["teacher_tokens"] = {
        what: sum(row[f"teacher/{what}"] for row in metrics) for what in ("read", "cached", "written")
    }
    return out


def table(summary: Mapping[str, Any]) -> Table:
    """The demo's one table: start, end and gain. Fits into 80 columns."""
    title = f"right answers to {summary['questions']} unseen questions, seed {summary['seed']}"
    shown = Table(title=title, caption=f"{CAPTION}; the gain is paired", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("method", "how", "start", "end", "gain, points"):
        shown.add_column(column, no_wrap=True)
    for name, method in summary["methods"].items():
        for i, how in enumerate(method["start"]):
            gain = method["gain"][how]
            points = f"{gain['value'] * 100:+.1f} [{gain['low'] * 100:+.1f}, {gain['high'] * 100:+.1f}]"
            shown.add_row("" if i else name, how, percent(method["start"][how]), percent(method["end"][how]), points)
    return shown


def cost(summary: Mapping[str, Any]) -> Iterator[str]:
    """A line per method: what it took."""
    for name, method in summary["methods"].items():
        tokens = method["teacher_tokens"]
        yield (
            f"{name}: {method['steps']} steps in {method['cpu_seconds']:.0f} CPU seconds; "
            f"the teacher read {tokens['read']:,} tokens and wrote {tokens['written']:,}"
        )
