"""Our training run, watched from outside: the whole of `potstill.train`, nothing left out."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.case import Params
from benchmarks.transcript import Line, write
from benchmarks.worker import Clock, one_thread, peak_mb, result


class Watched:
    """Notes the time of each step's end, its row, and what was written in it."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.rows: list[Mapping[str, Any]] = []
        self.steps: list[list[Any]] = []
        self.rss_mb = 0.0
        self.see: Callable[[], Any] | None = None
        self.seen: list[Any] = []
        """What `see` returned after each step."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A step has ended."""
        self.ends.append((time.process_time(), time.perf_counter()))
        self.rows.append(row)
        self.rss_mb = peak_mb()
        if self.see:
            self.seen.append(self.see())

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """There is none."""

    def sampler(self, inner: Any) -> Any:
        """The sampler, with what it writes noted."""
        watched = self

        class Noting:
            async def sample(self, prompts: Any, n: int, turn: Any, **more: Any) -> Any:
                groups = await inner.sample(prompts, n, turn, **more)
                watched.steps.append([r for group in groups for r in group])
                return groups

        return Noting()


def train(
    params: Params, prepare: Callable[[Any], None] | None = None, seen: Callable[[], Any] | None = None
) -> tuple[Watched, list[list[Line]]]:
    """Run `params["recipe"]`, and write the transcript that the peer follows. `prepare` is given the parts before it."""
    one_thread()
    from potstill.recipes import parse

    loop: Any = import_module("potstill.loop")

    watched, build = Watched(), loop.build
    watched.see = seen

    def building(config: Any, folder: Path | None = None) -> Any:
        parts = build(config, folder)
        if prepare:
            prepare(parts)
        return replace(parts, sampler=watched.sampler(parts.sampler))

    config = parse(params["recipe"])
    loop.build = building
    try:
        with TemporaryDirectory() as root:
            loop.train(config, Path(root), watch=watched)
    finally:
        loop.build = build
    steps = [[_line(r, config) for r in step] for step in watched.steps]
    if "transcript" in params:
        write(params["transcript"], steps)
    return watched, steps


def _line(r: Any, config: Any) -> Line:
    """Verdicts are given after sampling, so they are asked for again here."""
    verdict = None if r.prompt.answer is None else config.task.verifier()(r)
    return Line(
        messages=[dict(m) for m in r.prompt.messages],
        prompt_ids=list(r.prompt_ids),
        ids=list(r.response_ids),
        verdict=0.0 if verdict is None else float(verdict),
    )


def between(ends: Sequence[tuple[float, float]]) -> Clock:
    """Per step, from the end of the first to the end of the last."""
    clock, count = Clock(), len(ends) - 1
    clock.cpu_s = (ends[-1][0] - ends[0][0]) / count
    clock.wall_s = (ends[-1][1] - ends[0][1]) / count
    return clock


def steps(params: Params) -> dict[str, Any]:
    """CPU seconds of a step, the first left out; losses and gradient norms of all."""
    watched, lines = train(params)
    written = [len(line.ids) for step in lines[1:] for line in step]
    return result(
        between(watched.ends),
        watched.rss_mb,
        losses=[row["loss"] for row in watched.rows],
        grad_norms=[row["grad_norm"] for row in watched.rows],
        tokens_per_step=sum(written) / (len(lines) - 1),
        parts={
            name: sum(row[f"time/{name}"] for row in watched.rows[1:]) / (len(lines) - 1)
            for name in ("sample", "teacher", "learn")
        },
    )
