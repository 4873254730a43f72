"""Prompts from files with one JSON object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from potstill.errors import DataError
from potstill.tasks.rows import Part, Row, Rows


class Jsonl(Rows, frozen=True):
    """Rows of a JSON Lines file. Example: ``{"prompt": "473*6=", "answer": "2838"}``."""

    kind: Literal["jsonl"] = "jsonl"
    path: Path
    """Training prompts; held-out ones too, unless they have a file of their own."""
    validation_path: Path | None = None
    test_path: Path | None = None

    def has(self, part: Part) -> bool:
        """Whether a file was given for this part."""
        return self._file(part) is not None

    def rows(self, part: Part) -> Iterator[Row] | None:
        """The objects of one file, each with `file:line`; see `Rows.rows`."""
        path = self._file(part)
        return None if path is None else _read(path)

    def _file(self, part: Part) -> Path | None:
        return {"train": self.path, "validation": self.validation_path, "test": self.test_path}[part]


def _read(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; give the path of a JSON Lines file in UTF-8") from error
    if not any(map(str.strip, lines)):
        raise DataError(f'{path} is empty; write one object a line, such as {{"prompt": "473*6=", "answer": "2838"}}')
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON ({error}); write one object a line: {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise DataError(f'{place}: {line[:80]!r} is not an object; write {{"prompt": ..., "answer": ...}}')
        yield place, row
