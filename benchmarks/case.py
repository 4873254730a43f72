"""What is measured: a case, who takes part in it, what must be equal, and what is to be reached."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Params = dict[str, Any]
ROOT = Path(__file__).parent.parent

UNITS = {
    "cpu_s": ("CPU seconds", "s"),
    "cpu_ms_per_token": ("CPU time per written token", "ms"),
    "wall_s": ("wall time", "s"),
    "rss_mb": ("peak memory of the process", "MB"),
    "extra_mb": ("memory on top of the inputs", "MB"),
    "own_percent": ("share of the step outside passes, loss and optimiser", "%"),
    "own_sampling_percent": ("of that, drawing tokens and keeping rollouts", "%"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A row of the table: one measure of ours, and of a peer if there is one."""

    measure: str
    """A key of UNITS."""
    peer: str | None
    """Whom we are compared with; None: `limit` bounds our own number."""
    at_least: float | None = None
    """Peer's number over ours; None: shown without a goal."""
    limit: float | None = None
    """Ours at most."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """The same work for everybody."""

    name: str
    subject: str
    """The module that does it, benchmarks/SUBJECT.py."""
    title: str
    params: Params
    goals: tuple[Goal, ...]
    equal: dict[str, float] = field(default_factory=dict)
    """Values that must agree between all sides, and the largest relative difference."""
    models: tuple[str, ...] = ()
    """Names of random-weight models to build first (benchmarks/models.py)."""
    needs: str = ""
    """A folder without which the case is left out."""

    @property
    def sides(self) -> list[str]:
        """Ours first: it writes down what the others are to follow."""
        return ["ours", *dict.fromkeys(g.peer for g in self.goals if g.peer)]


LIMITS = ("products",)
"""Sides that do only a part of the work, to show what it costs at least: nothing of theirs is compared."""
ENVIRONMENT = {
    "ours": "own",
    "products": "own",
    "generate": "own",
    "per_place": "own",
    "trl": "peers",
    "liger": "peers",
}
"""Which Python runs a side. `generate` is transformers alone, in the version that both environments have."""
NAMES = {
    "ours": "potstill",
    "generate": "transformers generate",
    "per_place": "generate, a batch per place",
    "trl": "TRL",
    "liger": "Liger",
    "products": "the matrix products alone",
}
