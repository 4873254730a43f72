"""Methods side by side: the same start, questions, seeds and budget, and intervals that say what is known.

    OUT/plan.json                     what was asked for
    OUT/VARIANT/seed-0/               a run like any other; seed-0.json its recipe, seed-0.log what it said
    OUT/comparison.json .md .html     the result      OUT/curves.svg .png

Needs torch only to check recipes that are still to be run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from potstill.comparison import figures, plan, results, running
from potstill.comparison.results import Comparison
from potstill.comparison.running import Job
from potstill.errors import ConfigError, PotstillError, unknown
from potstill.run import Row, locked, write_whole

__all__ = ["Comparison", "compare"]


def compare(
    recipe: str | Path,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = range(5),
    *,
    overrides: Sequence[str] = (),
    budget: str | None = None,
    out: str | Path | None = None,
    jobs: int | None = None,
    against: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """Train every variant with every seed, or what is left of that, and compare them.

    Args:
        recipe: As for `potstill.recipes.read`; its [variants] are what `methods` may name.
        methods: Variants or methods, optionally with fields: `omniopd:beta=0:learner.lr=3e-4`. Empty: all variants.
        seeds: Of the runs; the same for each variant.
        overrides: `key=value` for all variants.
        budget: `steps=N`, `rollout_tokens=N`, `teacher_tokens=N` or `cpu_seconds=N`; None: as the recipe says.
        out: Folder of the comparison; None: runs/compare-NAME. One that is there already goes on.
        jobs: Runs at a time; None: one for each core.
        against: The variant that differences are taken to; None: the first.
        console: Shows where the runs are; None: nobody is told.

    Raises:
        ConfigError: Something cannot be compared; nothing is written, nothing is run.
        TrainingError: Some runs failed; the others are done.
        Interrupted: Ctrl-C; the same call goes on.
    """
    plan.check_seeds(seeds)
    asked = plan.make(recipe, methods, seeds, overrides, budget)
    against = asked.labels[0] if against is None else against
    if against not in asked.labels:
        raise ConfigError(f"--against: {unknown('variant in this comparison', against, asked.labels)}")
    folder = Path("runs") / f"compare-{asked.base.get('name', 'recipe')}" if out is None else Path(out)
    record = _record(asked, folder)
    todo = [Job(label, seed, folder / plan.folder_name(label)) for seed in asked.seeds for label in asked.labels]
    recipes = _check(asked, [job.label for job in todo if not job.run.finished])
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f"another comparison is running in {folder}. Wait until it has ended, or end it"):
        write_whole(folder / "plan.json", json.dumps(record, indent=2) + "\n")
        for job in todo:
            if not job.run.finished:
                job.write(recipes[job.label])
        running.train(todo, jobs or running.cores(), console or Console(quiet=True))
        return _report(asked, todo, against, folder)


def _record(asked: plan.Plan, folder: Path) -> dict[str, Any]:
    """What plan.json will hold. Raises ConfigError if the folder holds something else."""
    path = folder / "plan.json"
    if path.is_file():
        return asked.joined(json.loads(path.read_text(encoding="utf-8")), folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is there already and holds no comparison (it has no plan.json). Give another folder with --out"
        )
    return asked.record()


def _check(asked: plan.Plan, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The whole recipes of these variants, each of which can run. Raises PotstillError that names the one at fault."""
    out: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(labels):
        try:
            out[label] = _checked(asked.variants[label] | {"name": "seed-0", "seed": asked.seeds[0]})
        except PotstillError as error:
            raise type(error)(f"{label}: {error}") from None
    return out


def _checked(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, without the teacher and the reference model if its method asks none."""
    from potstill import checks, recipes

    recipe = recipes.without_unused(tables)
    parsed = recipes.parse(recipe)
    if parsed.eval.questions == 0:
        raise ConfigError("eval.questions = 0 asks nothing, so there is nothing to compare. Set it to 256, say")
    checks.check(parsed)
    return recipe


def _report(asked: plan.Plan, jobs: Sequence[Job], against: str, folder: Path) -> Comparison:
    """Measure the finished runs and write what came out."""
    from potstill.report import comparison as page

    runs = {label: {job.seed: job.run for job in jobs if job.label == label} for label in asked.labels}
    found = results.measure(runs, against) | {"budget": _budget(asked)}
    done = Comparison(folder, found)
    write_whole(folder / "comparison.json", json.dumps(found, indent=2) + "\n")
    write_whole(folder / "comparison.md", done.markdown())
    figures.draw(folder, found)
    settings = {label: next(iter(by_seed.values())).resolved for label, by_seed in runs.items()}
    changes = {label: asked.changes(label) for label in asked.labels}
    page.write(folder / "comparison.html", found, changes, settings, results.caption(found))
    return done


def _budget(asked: plan.Plan) -> Row:
    """The budget that all variants share."""
    tables = next(iter(asked.variants.values()))
    return tables.get("budget") or {"steps": tables["steps"]}
