"""Commands that look at what there is: runs, updates, ledgers, methods, this machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from potstill.cli.app import app, out
from potstill.errors import ConfigError


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or a folder made by the demo.")],
    to: Annotated[
        Path | None, typer.Option("--out", help="The page; default: report.html in the first folder.")
    ] = None,
) -> None:
    """Write one self-contained page about runs: curves, tables, and rollouts to look into."""
    from potstill.report import write
    from potstill.run import Run

    summary = None
    folders = list(runs)
    if len(runs) == 1 and (runs[0] / "summary.json").is_file():
        summary = json.loads((runs[0] / "summary.json").read_text(encoding="utf-8"))
        folders = [runs[0] / method["run"] for method in summary["methods"].values()]
    page = to or runs[0] / "report.html"
    if to and not page.parent.is_dir():
        raise ConfigError(f"--out {page}: there is no folder {page.parent}. Make it, or give another place")
    write(page, [Run.open(folder) for folder in folders], summary=summary)
    out.print(f"Wrote {page}")


@app.command()
def geometry(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="W0 W1 [W2 ...]: model folders, adapters, hub names, lab/NAME. Or a run alone, which knows its start and "
            "its checkpoints. Or: compare RUN ..., folders that this command has made.",
            show_default=False,
        ),
    ],
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Its folder; must not exist. Default: runs/geometry-NAME. Of compare: the page.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("-k", "--k", help="Leading directions of the weights whose rotation is measured.")
    ] = 512,
    only: Annotated[str, typer.Option(help="attention, as in the paper's averages, or all linear matrices.")] = "all",
    nulls: Annotated[int, typer.Option(help="Draws of each random null.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the nulls.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Where W0's decompositions are kept. Default: ~/.cache/potstill/geometry.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Where an update went in weight space: sparsity, rotation, shape and locking, each beside what chance would give."""
    if paths[0] == "compare":
        from potstill.report import geometry_compare

        compared = geometry_compare.compare([Path(p) for p in paths[1:]])
        page = out_dir or Path("geometry-compare.html")
        if not page.parent.is_dir():
            raise ConfigError(f"--out {page}: there is no folder {page.parent}. Make it, or give another place")
        geometry_compare.write(page, compared)
        out.print(*geometry_compare.tables(compared))
        out.print(f"Curves: open {page} in a browser.", soft_wrap=True)
        return
    from rich.progress import Progress

    from potstill.geometry import measure
    from potstill.report.geometry_numbers import table

    with Progress(console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("reading")
        measured = measure(
            paths[0],
            paths[1:],
            out=out_dir or Path("runs") / f"geometry-{Path(paths[-1]).resolve().name}",
            k=k,
            only=only,
            nulls=nulls,
            seed=seed,
            cache=cache,
            device=device,
            watch=lambda done, of, name: bar.update(task, completed=done, total=of, description=escape(name)),
        )
    out.print(table(measured.figures))
    left = "; ".join(f"{count} {why}" for why, count in measured.figures["left_out"].items())
    out.print(f"Left out: {left or 'nothing'}.", highlight=False, soft_wrap=True)
    for warning in measured.figures["warnings"]:
        out.print(f"Note: {warning}.", style="yellow", highlight=False, markup=False, soft_wrap=True)
    out.print(f"Figures: open {measured.folder}/geometry.html in a browser.", soft_wrap=True)


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a ledger.sqlite.")],
    export: Annotated[
        Path | None, typer.Option(help="Write every answer to this file, one JSON object a line.", show_default=False)
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="A price table of your own (TOML).", show_default=False)] = None,
) -> None:
    """Show what the teacher was asked, what came, and what it cost."""
    from potstill import ledger as file
    from potstill.teachers.prices import read_prices

    path, listed = file.ledger_path(run), read_prices(prices)
    rows = file.summary(path)
    table = Table("", *(escape(f"{row['run']}\n{row['model']}") for row in rows))
    for name in ("requests", "failed", "retried", "answers", "read", "cached", "stored", "written"):
        table.add_row(name, *(f"{row[name]:,}" for row in rows))
    for what in dict.fromkeys(what for row in rows for what in (*row["verdicts"], *row["errors"])):
        table.add_row(escape(what), *(f"{row['verdicts'].get(what, 0) + row['errors'].get(what, 0):,}" for row in rows))
    table.add_row("cost", *(_cost(row, listed.of(row["provider"], row["model"])) for row in rows))
    out.print(table)
    if export:
        if not export.absolute().parent.is_dir():
            raise ConfigError(f"--export {export}: there is no folder {export.parent}. Make it, or give another place")
        with export.open("w", encoding="utf-8") as to:
            to.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in file.rows(path))
        out.print(f"Wrote {export}")


def _cost(row: dict[str, Any], price: Any) -> str:
    """Of a row of the ledger's summary, in the currency of its price."""
    used = [row[name] for name in ("read", "cached", "stored", "written")]
    return f"{price.cost(*used):,.4f}" if price else "no price listed"


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One of them, in full.")] = None) -> None:
    """List the methods, or show one: its equation and its fields."""
    from potstill import catalogue, registry

    if name is None:
        table = Table("method", "what it does")
        for known in registry.methods():
            table.add_row(known, catalogue.describe(known).summary)
        out.print(table)
        out.print("One in full: potstill methods NAME")
        return
    method = catalogue.describe(name)
    out.print(method.equation, markup=False, highlight=False, soft_wrap=True)
    table = Table("field", "type", "default", "meaning", title=escape(f'[method] name = "{name}"'))
    for field in method.fields:
        table.add_row(field.name, escape(field.type), escape(field.default), escape(field.text))
    out.print(table)


@app.command()
def doctor() -> None:
    """Say what this machine has, and what is missing for which feature."""
    from potstill.doctor import findings

    table = Table("", "what", "found", "what to do")
    worst = False
    for ok, what, found, remedy in findings():
        worst |= ok is False
        table.add_row({True: "[green]ok[/]", False: "[red]no[/]", None: "-"}[ok], what, escape(found), escape(remedy))
    out.print(table)
    if worst:
        raise typer.Exit(2)
