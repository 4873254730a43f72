"""`python -m benchmarks [NAMES...]`: measure potstill and its peers side by side."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import plot, running, table
from benchmarks.case import ROOT, Case

SUBJECTS = ("loss", "step", "rollouts", "audits", "cold", "memory", "overhead")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; 1 if a side failed or did other work than the rest."""
    args = _arguments(argv)
    console, out = Console(), Path(args.out).resolve()
    chosen = choose(args.names, smoke=args.smoke)
    cases = [case for case in chosen if not case.needs or (ROOT / case.needs).is_dir()]
    out.mkdir(parents=True, exist_ok=True)
    for case in chosen:
        if case not in cases:
            console.print(f"left out: {case.name}, because there is no {case.needs} (make models)")
    if missing := {side for case in cases for side in case.sides if running.python(side) is None}:
        console.print(f"left out: {', '.join(sorted(missing))}, because there is no .venv-peers (make bench)")
    running.build(cases, out)
    rows: list[table.Row] = []
    raw: dict[str, running.Found] = {}
    problems: list[str] = []
    for case in cases:
        try:
            raw[case.name] = running.run(case, out, args.repeats, lambda text: console.print(f"[dim]{text}[/dim]"))
            rows += table.rows(case, raw[case.name])
        except (running.NotEqual, running.Failed) as problem:
            problems.append(str(problem))
            console.print(str(problem), style="red", markup=False)
        _write(out, rows, raw, problems, args.repeats)
    console.print(_printed(rows))
    for caution in table.CAUTIONS:
        console.print(f"- {caution}", markup=False)
    written = ("table.md", "results.json", "ratios.svg", "memory.svg")
    console.print(f"in {out}: {', '.join(name for name in written if (out / name).is_file())}", markup=False)
    return 1 if problems else 0


def choose(names: Sequence[str], *, smoke: bool) -> list[Case]:
    """Cases of the named subjects, or whose own name begins so; all without a name."""
    every = [case for subject in SUBJECTS for case in import_module(f"benchmarks.{subject}").cases(smoke)]
    for name in names:
        if not any(case.name.startswith(name) for case in every):
            raise SystemExit(f"there is no case {name!r}. There are: {', '.join(case.name for case in every)}")
    chosen = [case for case in every if not names or any(case.name.startswith(name) for name in names)]
    return [_without_goals(case) for case in chosen] if smoke else chosen


def _without_goals(case: Case) -> Case:
    """Tiny sizes say nothing about speed."""
    return replace(case, goals=tuple(replace(goal, at_least=None, limit=None) for goal in case.goals))


def machine() -> str:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next((line.partition(": ")[2] for line in info.read_text().splitlines() if "model name" in line), cpu)
    versions = ", ".join(f"{name} {version(name)}" for name in ("potstill", "torch", "transformers"))
    return f"{cpu}, one thread; {versions}; peers of constraints-peers.txt"


def _write(out: Path, rows: list[table.Row], raw: dict[str, running.Found], problems: list[str], repeats: int) -> None:
    text = {"machine": machine(), "repeats": repeats, "problems": problems, "cases": raw}
    (out / "results.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table.markdown(rows, machine(), repeats), encoding="utf-8")
    plot.ratios(rows, out / "ratios.svg")
    plot.memory([row.case for row in rows if row.goal == row.case.goals[0]], raw, out / "memory.svg")


def _printed(rows: list[table.Row]) -> Table:
    shown = Table(*table.HEAD)
    for row in rows:
        shown.add_row(*row.cells())
    return shown


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"beginnings of case names, such as {', '.join(SUBJECTS)}; all without"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of every side (5)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument(
        "--out", default="runs/benchmarks", help="folder for models, tables and plots (runs/benchmarks)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
