"""The runs of a comparison, each in a process of its own with one thread, a few at a time. Needs no torch."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from potstill.errors import ConfigError, Interrupted, TrainingError
from potstill.progress import accuracy
from potstill.run import Run, write_whole

Process = subprocess.Popen[bytes]
TAIL = 2000
"""Characters of a failed run's log that are shown."""


@dataclass(frozen=True)
class Job:
    """One run: a variant with a seed."""

    label: str
    seed: int
    folder: Path
    """Of the variant; the run is folder/seed-N, its recipe folder/seed-N.json, its output folder/seed-N.log."""

    @property
    def name(self) -> str:
        """Of the run."""
        return f"seed-{self.seed}"

    @property
    def run(self) -> Run:
        """The run, which may not be there yet."""
        return Run(self.folder / self.name)

    @property
    def log(self) -> Path:
        """What the process wrote."""
        return self.folder / f"{self.name}.log"

    @property
    def busy(self) -> bool:
        """Whether a process is training it: one that outlived a comparison that was killed."""
        if not self.run.path.is_dir():
            return False
        try:
            with self.run.locked():
                return False
        except ConfigError:
            return True

    def write(self, tables: dict[str, Any]) -> None:
        """Write its recipe."""
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = tables | {"name": self.name, "seed": self.seed}
        write_whole(self.folder / f"{self.name}.json", json.dumps(recipe, indent=2) + "\n")

    def start(self) -> Process:
        """`potstill train`, going on where the run stands. What it says is added to the log."""
        command = [sys.executable, "-m", "potstill", "train", str(self.folder / f"{self.name}.json")]
        resume = ["--resume"] * self.run.path.is_dir()
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*command, "--root", str(self.folder), *resume],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(jobs: Sequence[Job], at_once: int, console: Console) -> None:
    """Bring every job to its end, `at_once` at a time; those that are finished are left alone.

    Raises TrainingError when all have ended and some have failed; Interrupted on Ctrl-C, when all have saved.
    """
    running: dict[Job, Process] = {}
    board = Board(jobs, console)
    try:
        with board:
            failed = _loop([job for job in jobs if not job.run.finished], running, at_once, board)
    except KeyboardInterrupt:
        for process in running.values():
            process.wait()  # the same Ctrl-C reached them: they finish their step and save it
        raise Interrupted("interrupted; what was done is saved. The same command goes on from there") from None
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
    if failed:
        job, code = next(iter(failed.items()))
        message = job.log.read_text(encoding="utf-8", errors="replace").strip()[-TAIL:]
        raise TrainingError(
            f"{len(failed)} of {len(jobs)} runs failed: {', '.join(f'{j.label} {j.name}' for j in failed)}. The first, "
            f"{job.label} {job.name}, ended with exit code {code}; the end of {job.log}:\n\n{message}\n\n"
            "When that is put right, the same command goes on; the other runs are not repeated"
        )


def _loop(waiting: list[Job], running: dict[Job, Process], at_once: int, board: "Board") -> dict[Job, int]:
    """Start what waits, see what has ended, until there is neither. Returns exit codes of what failed."""
    failed: dict[Job, int] = {}
    while waiting or running:
        for job, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[job]
            if code == 0 and job.run.finished:
                board.finished(job)
            elif job.busy:  # a process that outlived an earlier comparison was faster: wait for it
                waiting.append(job)
            else:
                failed[job] = code
        for job in list(waiting):
            if len(running) < at_once and not job.busy:
                waiting.remove(job)
                if job.run.finished:
                    board.finished(job)
                else:
                    running[job] = job.start()
        board.show(list(running))
        if waiting or running:
            time.sleep(0.2)
    return failed


class Board:
    """Where the runs are: a live table on a terminal, else one line for each run that ends."""

    def __init__(self, jobs: Sequence[Job], console: Console):
        self.jobs, self.console = jobs, console
        self.cells = {job: _state(job) if job.run.finished else "" for job in jobs}
        self.live = Live(console=console, refresh_per_second=1) if console.is_terminal else None
        self.drawn = 0.0

    def __enter__(self) -> "Board":
        """Show it."""
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave it as it stands."""
        if self.live:
            self.live.update(self.table())
            self.live.stop()

    def finished(self, job: Job) -> None:
        """A run has ended."""
        self.cells[job] = _state(job)
        if not self.live:
            self.console.print(f"{job.label} {job.name}: {_end(job)}", highlight=False, markup=False, soft_wrap=True)

    def show(self, running: Sequence[Job]) -> None:
        """Read again where the runs are, at most once a second."""
        if self.live and time.monotonic() - self.drawn > 1:
            self.drawn = time.monotonic()
            self.cells |= {job: _state(job) for job in running}
            self.live.update(self.table())

    def table(self) -> Table:
        """Variants down, seeds across."""
        seeds = list(dict.fromkeys(job.seed for job in self.jobs))
        table = Table("", *[f"seed {seed}" for seed in seeds], box=SIMPLE_HEAD, pad_edge=False)
        for label in dict.fromkeys(job.label for job in self.jobs):
            table.add_row(escape(label), *[self.cells[job] for job in self.jobs if job.label == label])
        return table


def _sampled(job: Job) -> str:
    rows = [row for row in job.run.evals if row["name"] == "sampled"]
    return f"{accuracy(rows[-1])['value']:.1%} right" if rows else ""


def _end(job: Job) -> str:
    finished = job.run.finished
    assert finished
    return f"{_sampled(job)} after {finished['step']} steps, {finished['cpu_s']:.0f} CPU s"


def _state(job: Job) -> str:
    """`step 40, 63%`, and the accuracy so far."""
    if finished := job.run.finished:
        return f"step {finished['step']}, done\n{_sampled(job)}"
    rows = job.run.metrics
    if not rows:
        return "starts"
    return f"step {rows[-1]['step']}, {rows[-1]['done']:.0%}\n{_sampled(job)}"
