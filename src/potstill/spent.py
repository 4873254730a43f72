"""What a run has spent, and how much of its budget that is."""

from collections.abc import Mapping, Sequence
from typing import Any

from potstill.config import Config

Row = dict[str, Any]


class Spent:
    """What the training steps of a run have cost so far, over all the processes that took part in it."""

    def __init__(self, config: Config, rows: Sequence[Mapping[str, Any]]):
        self.limit = ("steps", float(config.steps)) if config.steps else config.budget.given
        self.steps = self.rollout_tokens = self.teacher_tokens = 0
        self.cpu_s = 0.0
        self.ended = ""
        """Why the run is over before its own end: what the teacher may cost is spent."""
        for row in rows:
            self.add(row, 0.0)
            self.cpu_s = row["cpu_s"]

    def add(self, row: Mapping[str, Any], seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.rollout_tokens += row["tokens"] + row["dropped"]
        self.teacher_tokens += row["teacher/read"] + row["teacher/written"]
        self.cpu_s += seconds

    @property
    def share(self) -> float:
        """Of the budget, 0 .. 1."""
        assert self.limit is not None
        name, most = self.limit
        if self.ended:
            return 1.0
        return min(1.0, (self.cpu_s if name == "cpu_seconds" else getattr(self, name)) / most)

    def summary(self) -> Row:
        """What a finished run says of itself."""
        assert self.limit is not None
        counts = {"rollout_tokens": self.rollout_tokens, "teacher_tokens": self.teacher_tokens}
        return {
            "step": self.steps,
            **counts,
            "cpu_s": round(self.cpu_s, 3),
            "why": self.ended or self.limit[0],
            "early": bool(self.ended),
        }
