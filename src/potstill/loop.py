"""The run, top to bottom.

prompts -> rollouts -> verdicts -> asks -> feedback -> targets -> one optimiser step -> the record
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from potstill.batch import info_means
from potstill.build import Parts, build, environment
from potstill.config import Config
from potstill.decode import Decoding
from potstill.errors import BudgetEnded, ConfigError, Interrupted, TrainingError
from potstill.evaluate import evaluate
from potstill.record import describe, manners, rollout_means, usage
from potstill.run import Run
from potstill.select import select
from potstill.spent import Spent
from potstill.stop import Stop
from potstill.types import Ask, Feedback, Reviewed, Rollout, Target
from potstill.writing import Writing

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
    if (
        run
        and run.finished
        and run.finished.get("early")
        and (latest := run.latest())
        and latest[0] == run.finished["step"]
    ):
        return run  # its teacher's budget is spent, and nobody went back to an older checkpoint
    parts = build(config, folder)
    run = run or Run.create(folder, config=text, resolved=resolved, env=environment())
    with run.locked(), Stop() as stop:
        asyncio.run(_train(config, parts, run, stop, watch))
    return run


async def _train(config: Config, parts: Parts, run: Run, stop: Stop, watch: Watcher | None) -> None:
    step = 0
    if latest := run.latest():
        step, folder = latest
        parts.learner.restore(folder)
    run.rewind(step)
    spent = Spent(config, run.metrics)
    if step == 0:
        await _evaluate(config, parts, run, 0, spent, watch)
        if stop.asked:
            raise Interrupted(f"interrupted before the first step of {run.path}. Go on with --resume")
    async with aclosing(Writing(config, parts)) as writing:
        while spent.share < 1:
            step += 1
            row, targets = await _step(config, parts, writing, step, spent)
            if not targets:  # the teacher's budget ended before a single answer: the step before was the last
                await _close(config, parts, run, step - 1, spent, watch)
                break
            if last := spent.share >= 1:
                await writing.aclose()
            if parts.recorder:
                row |= parts.recorder.keep(run, step, last=last, cpu_s=spent.cpu_s)
            run.append("metrics", row)
            if watch:
                watch.step(row)
            if step % config.save.rollouts_every == 0 or step == 1 or last:
                kept = targets[: config.save.rollouts]
                run.keep_rollouts(step, [describe(t, step, parts.method.told(t)) for t in kept])
            kept, targets = [], []  # nothing of what the teacher said is held during the next step
            if step % config.eval.every == 0 or last:
                await _evaluate(config, parts, run, step, spent, watch)
            if saved(config, step) or last or stop.asked:
                run.checkpoint(step, parts.learner.save, config.save.keep)
            if stop.asked and not last:
                raise Interrupted(f"interrupted after step {step}, which is saved in {run.path}. Go on with --resume")
    run.finish(spent.summary())


async def _close(config: Config, parts: Parts, run: Run, step: int, spent: Spent, watch: Watcher | None) -> None:
    """Evaluate and save after a step that turned out to be the last, unless that was done."""
    if run.evals and run.evals[-1]["step"] != step:
        await _evaluate(config, parts, run, step, spent, watch)
    latest = run.latest()
    if latest is None or latest[0] != step:
        run.checkpoint(step, parts.learner.save, config.save.keep)


async def _step(config: Config, parts: Parts, writing: Writing, step: int, spent: Spent) -> tuple[Row, list[Target]]:
    method, teacher, began = parts.method, parts.teacher, time.process_time()
    notes = Counter(teacher.notes) if teacher else Counter[str]()
    try:
        written = await writing.of(step, spent.share)
    except BudgetEnded as end:  # of a teacher that writes the answers itself, before it wrote one
        spent.ended = str(end)
        return {}, []
    spent.ended = teacher.ended if teacher else ""
    sampled = time.process_time()
    groups, dropped = written.groups, written.dropped
    if not (saved(config, step) or step == config.steps):
        await writing.begin(step + 1, spent.share)
    rollouts = [r for group in groups for r in group]
    asks, said = [ask for r in rollouts for ask in method.asks(r)], list[Feedback]()
    new, put = asks, set[tuple[Any, ...]]()
    try:
        while new:
            await _ask(parts, new, said)
            put |= {ask.key for ask in new}
            new = [ask for ask in method.more(said) if ask.key not in put]  # what went unanswered is not asked again
    except BudgetEnded as end:  # learn from the answers that were paid for, and let this be the last step
        said += end.said
        spent.ended = str(end)
        groups = answered(groups, asks, said)
    taught = time.process_time()
    targets = [t for group in review(groups, said) for t in method.targets(group)]
    if not targets and spent.ended:
        return {}, []
    if not targets:
        raise TrainingError(
            f"step {step}: none of {len(rollouts)} rollouts can be learnt from; all are empty. "
            "Check that the prompts end where an answer begins, and that the student is not already at an end token"
            if rollouts
            else f"step {step}: the teacher answered none of the prompts. See `potstill ledger {config.name}` for what came"
        )
    if config.select:
        targets = select(targets, config.select.by, config.select.keep, config.select.over)
    learnt = parts.learner.step(targets, method, step, spent.share)
    if parts.recorder or step % config.eval.every == 0:
        await writing.settle()
    ended = time.process_time()
    lost = sum(len(r.response_ids) for r in dropped)
    row = {"step": step, "dropped": lost, **learnt, **info_means(targets)}
    row |= {**rollout_means(parts.verifier, groups), **usage(said, [*rollouts, *dropped])}
    row |= manners(teacher.notes - notes) if teacher else {}
    row |= {"lag": written.lag} if config.rollouts.ahead else {}
    spent.add(row, ended - began)
    times = {"time/sample": sampled - began, "time/teacher": taught - sampled, "time/learn": ended - taught}
    row |= {name: round(t, 4) for name, t in times.items()}
    return row | {"cpu_s": round(spent.cpu_s, 3), "done": round(spent.share, 6)}, targets


async def _ask(parts: Parts, asks: Sequence[Ask], said: list[Feedback]) -> None:
    """Add the answers to `said`. The teacher comes last: its budget may end, and then the others have answered."""
    for of, who in (("student", parts.own), ("reference", parts.reference), ("teacher", parts.teacher)):
        mine = [ask for ask in asks if ask.of == of]
        if mine:
            assert who is not None, f"a question to the {of}, but there is none"
            said += await who.feedback(mine)


async def _evaluate(config: Config, parts: Parts, run: Run, step: int, spent: Spent, watch: Watcher | None) -> None:
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
        row = {"step": step, "split": config.eval.split, **row, "cpu_s": round(spent.cpu_s, 3)}
        run.append("evals", row)
        if watch:
            watch.evaluation(row)


def answered(groups: Sequence[Sequence[Rollout]], asks: Sequence[Ask], said: Sequence[Feedback]) -> list[list[Rollout]]:
    """The rollouts about which every question was answered: half an opinion would count as another one."""
    missing = {id(ask): ask.rollout.key for ask in asks}
    for feedback in said:
        missing.pop(id(feedback.ask), None)
    without = set(missing.values())
    kept = [[r for r in group if r.key not in without] for group in groups]
    return [group for group in kept if group]


def review(groups: Sequence[Sequence[Rollout]], said: Sequence[Feedback]) -> list[list[Reviewed]]:
    """Every rollout with the answers about it, found by key, never by position."""
    about: dict[tuple[str, int], list[Feedback]] = defaultdict(list)
    for feedback in said:
        about[feedback.ask.rollout.key].append(feedback)
    return [[Reviewed(rollout=r, feedback=tuple(about[r.key])) for r in group] for group in groups]


def saved(config: Config, step: int) -> bool:
    """Whether a step ends with a checkpoint wherever the run may end."""
    return step % config.save.every == 0


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> set[str]:
    out: set[str] = set()
    for key in a.keys() | b.keys():
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            out |= _changed(x, y, f"{prefix}{key}.")
        elif x != y:
            out.add(f"{prefix}{key}")
    return out
