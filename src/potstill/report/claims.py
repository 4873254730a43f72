"""The page of `potstill lab claims`: every claim of the paper with its verdict, and the tables behind them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.report import _environment
from potstill.run import write_whole

MARKS = {"reproduced": "good", "not reproduced": "bad"}
"""Verdict -> class; all others stand without colour."""


def render(rows: Sequence[Mapping[str, str]], tables: Sequence[Any]) -> str:
    """The page as HTML: one file, no network."""
    return _environment().get_template("claims.html").render(rows=rows, tables=tables, marks=MARKS)


def write(path: Path, rows: Sequence[Mapping[str, str]], tables: Sequence[Any]) -> None:
    """Write the page (see `render`) to `path`, whole or not at all. Raises TrainingError when the disk is full."""
    write_whole(path, render(rows, tables))
