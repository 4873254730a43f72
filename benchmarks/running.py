"""Run cases: ours, peer, ours, peer, ... each time in a fresh process of one thread."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan
from pathlib import Path
from typing import Any

from benchmarks.case import ENVIRONMENT, LIMITS, ROOT, Case

PEERS = ROOT / ".venv-peers/bin/python"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}
LIMIT_S = 1800
Found = dict[str, list[dict[str, Any]]]
"""Per side, what each repeat returned."""


class NotEqual(Exception):
    """Two sides did different work, so their times cannot be compared."""


class Failed(Exception):
    """A measurement ended with an error."""


def python(side: str) -> Path | None:
    """The interpreter of a side; None if its environment was not made."""
    if ENVIRONMENT[side] == "own":
        return Path(sys.executable)
    return PEERS if PEERS.is_file() else None


def build(cases: Sequence[Case], out: Path) -> None:
    """Make the models that the cases need, in a process of its own, so that this one stays small."""
    names = dict.fromkeys(name for case in cases for name in case.models)
    _call([sys.executable, "-m", "benchmarks.models", str(out), *names])


def run(case: Case, out: Path, repeats: int, tell: Callable[[str], None]) -> Found:
    """All repeats of all sides that can run here. Raises NotEqual or Failed."""
    sides = [side for side in case.sides if python(side)]
    found: Found = {side: [] for side in sides}
    given = {**case.params, "transcript": "{out}/" + case.name + ".transcript.json"}
    path = out / f"{case.name}.case.json"
    path.write_text(json.dumps(given).replace("{out}", str(out)), encoding="utf-8")
    for repeat in range(repeats):
        for side in sides:
            tell(f"{case.name}: {side}, {repeat + 1} of {repeats}")
            command = [str(python(side)), "-m", "benchmarks.worker", case.subject, side, str(path)]
            found[side].append(json.loads(_call(command).strip().splitlines()[-1]))
        compare(case, {side: found[side][-1]["value"] for side in sides if side not in LIMITS})
    return found


def _call(command: Sequence[str]) -> str:
    env = os.environ | SETTINGS | {"BENCHMARK_STARTED": str(time.time())}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command[1:])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def compare(case: Case, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Everybody did the same work. Raises NotEqual."""
    mine = values["ours"]
    for side, theirs in values.items():
        for name, tolerance in case.equal.items():
            if not (found := difference(mine[name], theirs[name])) <= tolerance:  # nan is no agreement
                raise NotEqual(
                    f"{case.name}: {name} of ours and {side} differ by {found:.2g} (allowed: {tolerance:g}): "
                    f"{mine[name]} and {theirs[name]}"
                )


def difference(a: Any, b: Any) -> float:
    """Largest relative difference of two numbers or lists of numbers; below 1e-3 in size it is taken relative to that.

    A policy gradient's loss is a sum of terms around 1 that cancel: what is left of it in float32 may be rounding alone.
    """
    xs, ys = (v if isinstance(v, list) else [v] for v in (a, b))
    if len(xs) != len(ys):
        return inf
    found = [abs(x - y) / max(abs(x), abs(y), 1e-3) for x, y in zip(xs, ys, strict=True)]
    return float(sum(found) if any(map(isnan, found)) else max(found, default=0.0))
