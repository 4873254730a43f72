"""A run as a person watches it. Quiet when nobody does: without a terminal only the last table is printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = Mapping[str, Any]


class Bar:
    """Steps, tokens per second, time left, accuracy and teacher tokens."""

    def __init__(self, console: Console, steps: int):
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=steps, note="")
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
        self.progress.update(self.task, completed=row["step"], note=note)

    def evaluation(self, row: Row) -> None:
        """Questions were asked."""
        value = accuracy(row)
        if row["name"] == "sampled":
            self.accuracy = f" · {row['split']} {value['value']:.1%}"


def accuracy(row: Row) -> dict[str, float]:
    """avg@k of an evaluation, with its interval."""
    return row[f"avg@{row['samples']}"]


def percent(interval: Mapping[str, float]) -> str:
    """`61.2 % [57.9, 64.4]`."""
    return f"{interval['value']:.1%} [{interval['low'] * 100:.1f}, {interval['high'] * 100:.1f}]".replace("%", " %")


def evaluations(rows: Sequence[Row], title: str = "") -> Table:
    """A table of evaluations, each figure with its 95 % interval over questions."""
    figures = [n for n, v in rows[0].items() if isinstance(v, dict) and "low" in v]
    names = list(dict.fromkeys(n.split("@")[0] for n in figures))
    table = Table(title=title or None, caption="95 % intervals: bootstrap over questions")
    for column in ("step", "how", *names):
        table.add_column(column, justify="left" if column == "how" else "right")
    for row in rows:
        cells = [str(row.get("step", "")), f"{row['name']} x{row['samples']}, {row['questions']} questions"]
        for name in names:
            value = next(v for n, v in row.items() if n.split("@")[0] == name)
            cells.append(f"{value['value']:.1f}" if name == "length" else percent(value))
        table.add_row(*cells)
    return table
