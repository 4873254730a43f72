"""One measurement in a process of its own: `python -m benchmarks.worker SUBJECT SIDE CASE.json`.

Prints one line of JSON: {cpu_s, wall_s, rss_mb, value}. A fresh process each time, because peak memory never falls.
"""

import json
import resource
import sys
import time
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Clock:
    """CPU and wall seconds inside `with`, added up. CPU time counts all threads of the process."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> Self:
        self._began = time.process_time(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cpu_s += time.process_time() - self._began[0]
        self.wall_s += time.perf_counter() - self._began[1]


def peak_mb() -> float:
    """Largest resident memory of this process so far.

    Linux hands the parent's peak on to a child, so the parent of all workers imports nothing large.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def result(clock: Clock, rss_mb: float | None = None, **value: Any) -> dict[str, Any]:
    """What a side returns. `rss_mb`: the peak when the work was done, if not now."""
    return {"cpu_s": clock.cpu_s, "wall_s": clock.wall_s, "rss_mb": rss_mb or peak_mb(), "value": value}


def one_thread() -> None:
    """Two threads are slower for models of this size, and a second core is not always free."""
    import torch

    torch.set_num_threads(1)


def main() -> None:
    """Run one side of one case."""
    subject, side, path = sys.argv[1:]
    params = json.loads(Path(path).read_text(encoding="utf-8"))
    found = import_module(f"benchmarks.{subject}").SIDES[side](params)
    print(json.dumps(found), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    main()
