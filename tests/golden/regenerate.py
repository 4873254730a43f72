"""The first metric rows of three runs, stored. After a change that is meant to move them (or of the bundled models):

python -m tests.golden.regenerate
"""

import json
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = 5
UNSTABLE = ("time/", "cpu_s")
"""Depends on the machine."""

RAW: dict[str, Any] = {
    "steps": STEPS,
    "student": {"path": "lab/student"},
    "teacher": {"path": "lab/teacher"},
    "task": {"kind": "arithmetic"},
    "rollouts": {"prompts": 4},
    "learner": {"lr": 1e-4},
    "eval": {"questions": 8, "samples": 2, "every": 100},
}
"""A small rate: rounding that differs between processors must not grow into another token."""
RECIPES: dict[str, dict[str, Any]] = {
    "opd": RAW | {"name": "opd", "method": {"name": "opd"}},
    "omniopd": RAW
    | {
        "name": "omniopd",
        "teacher": {"path": "lab/teacher", "text_only": True},
        "method": {"name": "omniopd", "chunks": 3, "continuations": 2, "chunk_length": 3},
    },
    "sgopd": RAW | {"name": "sgopd", "method": {"name": "sgopd"}, "rollouts": {"prompts": 4, "group": 2}},
}


def rows(name: str) -> list[dict[str, float]]:
    """What a recipe gives here and now."""
    from potstill import loop, recipes

    with tempfile.TemporaryDirectory() as root:
        metrics = loop.train(recipes.parse(RECIPES[name]), Path(root)).metrics
    return [{k: float(f"{v:.7g}") for k, v in row.items() if not k.startswith(UNSTABLE)} for row in metrics]


def stored(name: str) -> list[dict[str, float]]:
    """What it gave when it was last regenerated."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name in RECIPES:
        lines = ",\n".join(json.dumps(row) for row in rows(name))
        (HERE / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
