"""The curves as pictures: curves.svg and curves.png."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.report.numbers import short

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito, which people with colour blindness can tell apart; the lines differ in their marks too."""
MARKS = "osD^vPX"
AXES = {"steps": "training steps", "rollout_tokens": "rollout tokens", "cpu_seconds": "CPU seconds"}


def draw(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write both pictures: sampled accuracy against steps, rollout tokens and CPU seconds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    labels: Sequence[str] = list(figures["curves"])
    rows = -(-len(labels) // 4)
    with mpl.rc_context(
        {"svg.hashsalt": "potstill", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(12, 3.9 + 0.25 * rows), facecolor="white", layout="constrained")
        panels = figure.subplots(1, len(AXES), sharey=True)
        for panel, (axis, name) in zip(panels, AXES.items(), strict=True):
            for i, label in enumerate(labels):
                points = figures["curves"][label][axis]
                x, y = [p["x"] for p in points], [p["y"] for p in points]
                colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
                style = "-" if i < len(COLOURS) else "--"
                panel.plot(x, y, color=colour, marker=mark, markersize=4, linestyle=style, linewidth=1.8, label=label)
                panel.fill_between(
                    x, [p["low"] for p in points], [p["high"] for p in points], color=colour, alpha=0.15, linewidth=0
                )
            panel.set_xlabel(name)
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            panel.grid(color="#dddddd", linewidth=0.6)
        panels[0].set_ylabel(f"right answers, {figures['split']} ({figures['main']})")
        panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panels[0].set_ylim(bottom=0)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        figure.savefig(folder / "curves.svg", metadata={"Date": None})
        figure.savefig(folder / "curves.png", dpi=150)
