"""A run as a person watches it. Quiet when nobody does: without a terminal only the last table is printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = Mapping[str, Any]


class Bar:
    """How much of the run is done, tokens per second, time left, accuracy and teacher tokens."""

    def __init__(self, console: Console):
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("step {task.fields[step]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=1.0, step=0, note="")
        self.teacher, self.accuracy = 0, ""

    def __enter__(self) -> "Bar":
        """Show the bar."""
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Leave it as it stands."""
        self.progress.stop()

    def step(self, row: Row) -> None:
        """A step was taken."""
        self.teacher += row["teacher/read"] - row["teacher/cached"] + row["teacher/written"]
        seconds = row["time/sample"] + row["time/teacher"] + row["time/learn"]
        speed = row["tokens"] / max(seconds, 1e-9)
        note = f"{speed:,.0f} tokens/s · loss {row['loss']:.3f}{self.accuracy} · teacher {self.teacher:,} tokens"
        self.progress.update(self.task, completed=row["done"], step=row["step"], note=note)

    def evaluation(self, row: Row) -> None:
        """Questions were asked."""
        value = accuracy(row)
        if row["name"] == "sampled":
            self.accuracy = f" · {row['split']} {value['value']:.1%}"


def accuracy(row: Row) -> dict[str, float]:
    """avg@k of an evaluation, with its interval."""
    return row[f"avg@{row['samples']}"]


def percent(interval: Mapping[str, float]) -> str:
    """`61.2 [57.9-64.4]`: per cent."""
    return f"{interval['value'] * 100:.1f} [{interval['low'] * 100:.1f}-{interval['high'] * 100:.1f}]"


SHORT = {
    "avg": "avg@k",
    "pass": "pass@k",
    "maj": "maj@k",
    "format_failure": "no answer",
    "truncated": "cut off",
    "repetition": "repeated",
    "length": "tokens",
}
CAPTION = "per cent, with 95 % intervals: bootstrap over questions"


def evaluations(rows: Sequence[Row], title: str = "") -> Table:
    """Evaluations side by side, each figure with its 95 % interval over questions. Fits four into 80 columns."""
    table = Table(title=title or None, caption=CAPTION, box=SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for row in rows:
        when = f"step {row['step']}" if "step" in row else f"{row['questions']} questions"
        table.add_column(f"{row['name']} x{row['samples']}\n{when}", justify="right", no_wrap=True)
    names = dict.fromkeys(n.split("@")[0] for row in rows for n, v in row.items() if isinstance(v, dict) and "low" in v)
    for name in names:
        cells = [next(v for n, v in row.items() if n.split("@")[0] == name) for row in rows]
        shown = [f"{v['value']:.1f}" if name == "length" else percent(v) for v in cells]
        table.add_row(SHORT.get(name, name), *shown)
    return table
