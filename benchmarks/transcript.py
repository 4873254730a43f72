"""What our side wrote, step by step, for the peer to do the same work: prompts, answers, verdicts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One answer."""

    messages: list[dict[str, str]]
    prompt_ids: list[int]
    ids: list[int]
    verdict: float


Steps = list[list[Line]]


def write(path: str, steps: Sequence[Sequence[Line]]) -> None:
    """To a file."""
    Path(path).write_text(json.dumps([[asdict(line) for line in step] for step in steps]), encoding="utf-8")


def read(path: str) -> Steps:
    """From the file."""
    found: list[list[dict[str, Any]]] = json.loads(Path(path).read_text(encoding="utf-8"))
    return [[Line(**line) for line in step] for step in found]


def tokens(steps: Sequence[Sequence[Line]]) -> int:
    """Of all answers."""
    return sum(len(line.ids) for step in steps for line in step)
