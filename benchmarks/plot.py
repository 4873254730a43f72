"""The table as a picture: how many times cheaper ours is, and what was to be reached."""

from pathlib import Path

from benchmarks.case import NAMES, UNITS
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
