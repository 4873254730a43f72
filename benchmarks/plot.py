"""The table as pictures: how many times cheaper ours is, and memory against length."""

from pathlib import Path
from statistics import median

from benchmarks.case import NAMES, UNITS, Case
from benchmarks.running import Found
from benchmarks.table import Row


def ratios(rows: list[Row], path: Path) -> None:
    """One line a ratio: the median of all, the range of single pairs, the goal as a tick."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "potstill"
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.ratio and row.theirs and row.goal.peer]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.32 * len(shown)), layout="constrained")
    for y, row in enumerate(reversed(shown)):
        assert row.ratio
        assert row.theirs
        colour = "#888888" if row.goal.at_least is None else "#1b7f4d" if row.reached.startswith("yes") else "#b3541e"
        axes.plot([min(row.ratio.values), max(row.ratio.values)], [y, y], color=colour, lw=2)
        axes.plot(row.theirs.middle / row.ours.middle, y, "o", color=colour)
        if row.goal.at_least is not None:
            axes.plot(row.goal.at_least, y, "|", color="black", ms=12)
    axes.axvline(1.0, color="#bbbbbb", lw=1)
    axes.set_xscale("log")
    axes.set_yticks(
        range(len(shown)),
        [f"{r.case.title}: {UNITS[r.goal.measure][0]}, {NAMES[r.goal.peer or 'ours']}" for r in reversed(shown)],
        fontsize=8,
    )
    axes.set_xlabel("peer's number over ours (right of 1: ours is cheaper); tick: the goal")
    axes.grid(axis="x", which="both", alpha=0.2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def memory(cases: list[Case], found: dict[str, Found], path: Path) -> None:
    """Peak memory of a step against the length of its answers, every repeat as a point."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "potstill"
    import matplotlib.pyplot as plt

    shown = [case for case in cases if case.subject == "memory" and case.name in found]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for side, colour in (("ours", "#1b7f4d"), ("trl", "#b3541e")):
        points = [
            (case.params["recipe"]["rollouts"]["max_tokens"], repeat["rss_mb"])
            for case in shown
            for repeat in found[case.name].get(side, [])
        ]
        middles = {x: median(y for at, y in points if at == x) for x, _ in points}
        axes.plot([x for x, _ in points], [y for _, y in points], "o", ms=3, color=colour, alpha=0.5)
        axes.plot(list(middles), list(middles.values()), color=colour, label=NAMES[side])
    axes.set_xlabel("tokens of an answer")
    axes.set_ylabel("peak memory of the process, MB")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.2)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
