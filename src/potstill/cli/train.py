"""Commands that train: one run, several side by side, the lab's."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from potstill.cli.app import Overrides, Recipe, Root, Variant, app, lab, out


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the demo; must not exist.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of both runs.")] = 0,
) -> None:
    """Distil the bundled student with opd and with omniopd, and show what happened."""
    from potstill.demo import run

    run(out_dir, seed, out)


@app.command()
def check(recipe: Recipe, overrides: Overrides = None, variant: Variant = None) -> None:
    """Check a recipe without loading a weight, and print every field as understood."""
    from potstill import checks, recipes

    parsed, _ = recipes.read(recipe, overrides or [], variant)
    checks.check(parsed)
    out.print_json(parsed.model_dump_json())
    out.print(f"[green]{escape(recipe)} can run.[/green]")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    variant: Variant = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    root: Root = Path("runs"),
) -> None:
    """Train a student as the recipe says."""
    from potstill import loop, progress, recipes

    parsed, text = recipes.read(recipe, overrides or [], variant)
    with progress.Bar(out) as bar:
        run = loop.train(parsed, root, text=text, resume=resume, watch=bar)
    if rows := run.evals:
        out.print(progress.evaluations([row for row in rows if row["step"] in (0, rows[-1]["step"])], str(run.path)))
    if run.finished and run.finished.get("early"):
        out.print(str(run.finished["why"]), markup=False, highlight=False, soft_wrap=True)
    out.print(f"Look inside: potstill report {run.path}")


@app.command()
def compare(
    recipe: Recipe,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Variants of the recipe, or methods, with fields if need be: opd,omniopd:beta=0:learner.lr=3e-4. "
            "Default: all variants.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Such as 0-4 or 0,2,5.")] = "0-4",
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="steps=N, rollout_tokens=N, teacher_tokens=N or cpu_seconds=N. Default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one for each core.", show_default=False)
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Its folder. Default: runs/compare-NAME. One that is there goes on.", show_default=False
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Differences are taken to this variant. Default: the first.", show_default=False)
    ] = None,
) -> None:
    """Compare methods: the same start, questions, seeds and budget; intervals, and a winner only if there is one."""
    from potstill.comparison import compare as run
    from potstill.comparison.plan import parse_seeds, split_methods

    done = run(
        recipe,
        split_methods(methods or ""),
        parse_seeds(seeds),
        overrides=overrides or [],
        budget=",".join(budget) if budget else None,
        out=out_dir,
        jobs=jobs,
        against=against,
        console=out,
    )
    out.print(done.tables())
    out.print(done.figures["winner"]["sentence"], highlight=False, markup=False, soft_wrap=True)
    out.print(f"Curves: open {done.folder / 'comparison.html'} in a browser.", soft_wrap=True)


@lab.command(name="build")
def lab_build(
    to: Annotated[Path, typer.Option("--out", help="Folder of the models; must not exist.")] = Path("models/lab"),
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the bundled teacher, student and foreign teacher again."""
    from potstill.lab.build import build

    build(to, seed, log=lambda line: out.print(line, markup=False, highlight=False))


@lab.command(name="claims")
def lab_claims(
    seeds: Annotated[str, typer.Option(help="Of the five methods.")] = "0-4",
    control_seeds: Annotated[
        str, typer.Option(help="Of the controls and projected runs; the first of --seeds.")
    ] = "0-2",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one for each core.", show_default=False)
    ] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the tables.")] = Path("runs/lab-claims"),
) -> None:
    """Try the claims of "On the Geometry of On-Policy Distillation", each beside its null. Takes about two hours."""
    from potstill.comparison.plan import parse_seeds
    from potstill.lab.claims import claims

    done = claims(parse_seeds(seeds), parse_seeds(control_seeds), out=out_dir, jobs=jobs, console=out)
    table = Table("claim", "paper", "ours", "null", "verdict")
    for row in done.rows:
        table.add_row(*map(escape, row.values()))
    out.print(table)
    out.print(f"With the tables behind it: open {done.folder / 'claims.html'} in a browser.", soft_wrap=True)
