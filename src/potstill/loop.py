"""The run, top to bottom.

prompts -> rollouts -> verdicts -> asks -> feedback -> targets -> one optimiser step -> the record
"""

import asyncio
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import FrameType, TracebackType
from typing import Any, Protocol, runtime_checkable

from potstill.batch import info_means
from potstill.build import Parts, build, environment
from potstill.config import Config
from potstill.decode import Decoding
from potstill.errors import ConfigError, Interrupted, TrainingError
from potstill.evaluate import evaluate
from potstill.metrics import repetition
from potstill.run import Run
from potstill.types import Ask, Feedback, Reviewed, Rollout, Target, Usage

Row = dict[str, Any]


@runtime_checkable
class Watcher(Protocol):
    """Whoever wants to see the run go by: a progress bar, a test."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl was written."""

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """A row of evals.jsonl was written."""


def train(
    config: Config, root: Path = Path("runs"), *, text: str = "", resume: bool = False, watch: Watcher | None = None
) -> Run:
    """Train to the last step and return the run. Raises PotstillError; nothing is written if the set-up is wrong."""
    folder = root / config.name
    if folder.exists() and not resume:
        Run.create(folder, config="", resolved={}, env={})  # says why it refuses, before a model is loaded
    run = Run.open(folder) if resume else None
    resolved = config.model_dump(mode="json")
    if run and (changed := sorted(_changed(run.resolved, resolved))):
        raise ConfigError(
            f"{folder} was started with another recipe: {', '.join(changed)} differ, so its numbers would not go on. "
            "Resume with the recipe as it was, or start a new run under another name"
        )
    parts = build(config)
    run = run or Run.create(folder, config=text, resolved=resolved, env=environment())
    with Stop() as stop:
        asyncio.run(_train(config, parts, run, stop, watch))
    return run


async def _train(config: Config, parts: Parts, run: Run, stop: "Stop", watch: Watcher | None) -> None:
    done = 0
    if latest := run.latest():
        done, folder = latest
        parts.learner.restore(folder)
    run.rewind(done)
    clock = Clock(run)
    if done == 0:
        await _evaluate(config, parts, run, 0, clock, watch)
        if stop.asked:
            raise Interrupted(f"interrupted before the first step of {run.path}. Go on with --resume")
    for step in range(done + 1, config.steps + 1):
        row, targets = await _step(config, parts, step, clock)
        run.append("metrics", row)
        if watch:
            watch.step(row)
        if step % config.save.rollouts_every == 0 or step in (1, config.steps):
            run.keep_rollouts(step, [describe(t, step) for t in targets[: config.save.rollouts]])
        if step % config.eval.every == 0 or step == config.steps:
            await _evaluate(config, parts, run, step, clock, watch)
        if step % config.save.every == 0 or step == config.steps or stop.asked:
            run.checkpoint(step, parts.learner.save, config.save.keep)
        if stop.asked and step < config.steps:
            raise Interrupted(f"interrupted after step {step}, which is saved in {run.path}. Go on with --resume")


async def _step(config: Config, parts: Parts, step: int, clock: "Clock") -> tuple[Row, list[Target]]:
    method, began = parts.method, clock.now()
    prompts = parts.task.draw(config.seed, step, config.rollouts.prompts)
    groups = await parts.sampler.sample(prompts, config.rollouts.group, seed=config.seed, step=step)
    groups = [[_judged(parts, r, step) for r in group] for group in groups]
    sampled = clock.now()
    asks = [ask for group in groups for r in group for ask in method.asks(r)]
    said = await _ask(parts, asks)
    taught = clock.now()
    targets = [t for group in review(groups, said) for t in method.targets(group)]
    if not targets:
        raise TrainingError(
            f"step {step}: none of {sum(map(len, groups))} rollouts can be learnt from; all are empty. "
            "Check that the prompts end where an answer begins, and that the student is not already at an end token"
        )
    learnt = parts.learner.step(targets, method, step)
    clock.add(clock.now() - began)
    rollouts = [r for group in groups for r in group]
    row = {"step": step, **learnt, **info_means(targets), **_rollout_means(rollouts), **_usage(said, rollouts)}
    times = {"time/sample": sampled - began, "time/teacher": taught - sampled, "time/learn": clock.now() - taught}
    return row | {name: round(t, 4) for name, t in times.items()} | {"cpu_s": round(clock.total, 3)}, targets


def _judged(parts: Parts, rollout: Rollout, step: int) -> Rollout:
    """With its verdict, where its prompt has an answer to compare with."""
    verdict = None if rollout.prompt.answer is None else parts.verifier(rollout)
    return replace(rollout, policy_version=step - 1, verdict=verdict)


async def _ask(parts: Parts, asks: Sequence[Ask]) -> list[Feedback]:
    return await parts.teacher.feedback(asks) if asks and parts.teacher else []


async def _evaluate(config: Config, parts: Parts, run: Run, step: int, clock: "Clock", watch: Watcher | None) -> None:
    kinds = [("sampled", config.eval.samples, 1.0)] + [("greedy", 1, 0.0)] * config.eval.greedy
    for name, samples, temperature in kinds if parts.questions else ():
        row, _ = await evaluate(
            parts.learner.loaded,
            parts.questions,
            parts.verifier,
            name=name,
            samples=samples,
            max_tokens=config.rollouts.max_tokens,
            how=Decoding(temperature=temperature, cells=config.rollouts.batch_cells),
            seed=config.seed,
        )
        row = {"step": step, "split": config.eval.split, **row, "cpu_s": round(clock.total, 3)}
        run.append("evals", row)
        if watch:
            watch.evaluation(row)


def review(groups: Sequence[Sequence[Rollout]], said: Sequence[Feedback]) -> list[list[Reviewed]]:
    """Every rollout with the answers about it, found by key, never by position."""
    about: dict[tuple[str, int], list[Feedback]] = defaultdict(list)
    for feedback in said:
        about[feedback.ask.rollout.key].append(feedback)
    return [[Reviewed(rollout=r, feedback=tuple(about[r.key])) for r in group] for group in groups]


def describe(target: Target, step: int) -> Row:
    """A rollout and all that is known about it, as a row of rollouts/step_N.jsonl."""
    r = target.rollout

    def numbers(values: Any) -> list[float | None] | None:
        return None if values is None else [None if x != x else round(float(x), 5) for x in values]

    return {
        "step": step,
        "id": r.prompt.id,
        "sample": r.sample,
        "author": r.author,
        "messages": [dict(m) for m in r.prompt.messages],
        "answer": r.prompt.answer,
        "pieces": list(r.pieces),
        "entropy": numbers(r.entropy),
        "old_logp": numbers(r.old_logp),
        "weight": numbers(target.weight),
        "anchor": numbers(target.anchor),
        "advantage": numbers(target.advantage),
        "verdict": r.verdict,
        "finish": r.finish,
        "policy_version": r.policy_version,
        "info": {name: numbers(values) for name, values in target.info.items()},
        "audits": [{name: getattr(a, name) for name in a.__slots__} for a in target.audits],
    }


class Stop:
    """Inside the block Ctrl-C lets the step end, so that its work can be saved; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._ours = threading.current_thread() is threading.main_thread()  # no other thread may handle signals

    def __enter__(self) -> "Stop":
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Clock:
    """CPU seconds of the training steps of a run, over all the processes that took part in it."""

    def __init__(self, run: Run):
        rows = run.metrics
        self.total: float = rows[-1]["cpu_s"] if rows else 0.0

    def now(self) -> float:
        """CPU seconds of this process."""
        return time.process_time()

    def add(self, seconds: float) -> None:
        """Count a step."""
        self.total += seconds


def _rollout_means(rollouts: Sequence[Rollout]) -> Row:
    entropies = [h for r in rollouts for h in r.entropy or ()]
    row = {
        "tokens": sum(len(r.response_ids) for r in rollouts),
        "length": fmean(len(r.response_ids) for r in rollouts),
        "truncated": fmean(r.finish == "length" for r in rollouts),
        "repetition": fmean(repetition(r.response_ids) for r in rollouts),
    }
    verdicts = [r.verdict for r in rollouts if r.verdict is not None]
    known = {"entropy": entropies, "verdict": verdicts}
    return row | {name: fmean(values) for name, values in known.items() if values}


def _usage(said: Sequence[Feedback], rollouts: Sequence[Rollout]) -> Row:
    total = sum([f.usage for f in said] + [r.usage for r in rollouts], Usage())
    row = {"teacher/read": total.read, "teacher/cached": total.cached, "teacher/written": total.written}
    ends = [end for f in said for end in f.finishes]
    if not ends:
        return row
    asked = sum(f.ask.n * (f.ask.length or 0) for f in said)
    return row | {"teacher/stopped": fmean(e == "stop" for e in ends), "teacher/length_ratio": total.written / asked}


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> set[str]:
    out: set[str] = set()
    for key in a.keys() | b.keys():
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            out |= _changed(x, y, f"{prefix}{key}.")
        elif x != y:
            out.add(f"{prefix}{key}")
    return out
