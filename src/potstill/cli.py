"""The command line: one verb per job. Exit codes: 0 done, 1 our fault, 2 yours, 130 interrupted.

Heavy modules are imported inside the verbs, so that --help, methods and report start without torch.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from potstill.errors import ConfigError, PotstillError, unknown

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="On-policy distillation: a small student learns on what it writes itself, corrected by a teacher.",
)
lab_app = typer.Typer(no_args_is_help=True, help="The bundled models.")
app.add_typer(lab_app, name="lab")
out = Console()

Recipe = Annotated[str, typer.Argument(help="A TOML file, or a recipe that comes with potstill.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as learner.lr=1e-4", show_default=False)]
Variant = Annotated[str | None, typer.Option(help="An entry of the recipe's [variants].", show_default=False)]
Root = Annotated[Path, typer.Option(help="Folder of the runs.")]


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


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A run, a checkpoint, a model folder, a hub name or lab/NAME.")],
    task: Annotated[
        str | None, typer.Option(help="A task's kind, or a recipe that has one; a run knows its own.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the task: name=chain_sum", show_default=False)
    ] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "test",
    questions: Annotated[int, typer.Option(min=1)] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Answers per question: k.")] = 4,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: the run's, else 48.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the row instead of a table.")] = False,
) -> None:
    """avg@k, pass@k, maj@k and how answers fail, each with its 95 % interval over questions."""
    import asyncio

    from potstill import checks, models, progress
    from potstill.decode import Decoding
    from potstill.evaluate import evaluate as ask

    path, recipe = _model_of(checkpoint)
    questioner = _task_of(checkpoint, recipe, task, overrides or [])
    if split not in ("validation", "test"):
        raise ConfigError(f"--split {split!r}: there are validation and test. Training prompts are never evaluated on")
    if temperature == 0 and samples > 1:
        raise ConfigError(
            f"--samples {samples} at --temperature 0 would give the same answer {samples} times. Add --samples 1"
        )
    asked = questioner.questions(split, questions)
    loaded = models.load(path, device=checks.device("auto"))
    how = Decoding(temperature=temperature, top_p=top_p)
    room = max_tokens or recipe.get("rollouts", {}).get("max_tokens", 48)
    name, verifier = ("sampled" if temperature else "greedy"), questioner.verifier()
    row, _ = asyncio.run(ask(loaded, asked, verifier, name=name, samples=samples, max_tokens=room, how=how, seed=seed))
    if as_json:
        out.print_json(json.dumps(row | {"split": split, "checkpoint": checkpoint}))
    else:
        out.print(progress.evaluations([row], f"{checkpoint} on {split}"))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name or lab/NAME.")],
    prompts: Annotated[list[str], typer.Argument(help="What to answer.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Answers to each.")] = 1,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write answers to prompts."""
    import asyncio

    from potstill import checks, models
    from potstill.decode import Decoding
    from potstill.samplers.hf import HFSampler
    from potstill.types import Prompt, Turn

    path, _ = _model_of(model)
    loaded = models.load(path, device=checks.device("auto"))
    sampler = HFSampler(loaded, decoding=Decoding(temperature=temperature, top_p=top_p))
    asked = [Prompt(id=p, messages=({"role": "user", "content": p},)) for p in prompts]
    turn = Turn(seed=seed, step=0, max_tokens=max_tokens)
    for group in asyncio.run(sampler.sample(asked, n, turn)):
        for rollout in group:
            out.print(rollout.prompt.id, style="bold", end=" ", markup=False, highlight=False)
            out.print(rollout.text(), markup=False, highlight=False, soft_wrap=True)


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


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name or lab/NAME.")],
    host: Annotated[str, typer.Option(help="Where to listen. Beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8123,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of weights and arithmetic.")] = "float32",
    batch_cells: Annotated[int, typer.Option(min=1, help="Rows times tokens at once: the bound on memory.")] = 65_536,
) -> None:
    """Serve a model as a teacher of hidden states (teacher.kind = "potstill"), until Ctrl-C.

    If the environment variable POTSTILL_KEY is set, only those who send it are answered.
    """
    from potstill import checks, config, models, wire
    from potstill import serve as http
    from potstill.teachers.keys import read_key

    key = read_key(None, None, wire.KEYS, needed=False)
    http.check_host(host, key)
    known: tuple[config.DType, ...] = get_args(config.DType)
    kind = next((name for name in known if name == dtype), None)
    if kind is None:
        raise ConfigError(unknown("dtype", dtype, known))
    path, _ = _model_of(model)
    served = http.Served(models.load(path, dtype=kind, device=checks.device(device)), cells=batch_cells)
    server = http.listen(served, host, port, key)
    about, weight = served.about, served.split.head.module.weight
    size = f"{weight.shape[1]} numbers a token in place of {about.vocab}"
    for line in (
        f"{model} ({dtype} on {weight.device}; {size}) listens at {server.url}",
        f'teacher = {{ kind = "potstill", base_url = "{server.url}", tokenizer = "{path}" }}',
    ):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    server.run()
    out.print("Stopped.")


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


@lab_app.command(name="build")
def lab_build(
    to: Annotated[Path, typer.Option("--out", help="Folder of the models; must not exist.")] = Path("models/lab"),
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the bundled teacher, student and foreign teacher again."""
    from potstill.lab.build import build

    build(to, seed, log=lambda line: out.print(line, markup=False, highlight=False))


@lab_app.command(name="claims")
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


def _cost(row: dict[str, Any], price: Any) -> str:
    """Of a row of the ledger's summary, in the currency of its price."""
    used = [row[name] for name in ("read", "cached", "stored", "written")]
    return f"{price.cost(*used):,.4f}" if price else "no price listed"


def _model_of(path: str) -> tuple[str, dict[str, Any]]:
    """A model's path, and the recipe behind it if it is a run, which stands for its latest checkpoint."""
    from potstill.run import Run

    if not (Path(path) / "resolved.json").is_file():
        return path, {}
    run = Run.open(Path(path))
    latest = run.latest()
    if latest is None:
        raise ConfigError(f"{path} has no checkpoint yet, so there is no model to use. Let it reach save.every steps")
    return str(latest[1]), run.resolved


def _task_of(path: str, recipe: dict[str, Any], task: str | None, overrides: Sequence[str]) -> Any:
    """The task that is named, or the one that the run was trained on."""
    from potstill import recipes, registry
    from potstill.tasks import TASKS

    raw = recipe.get("task")
    if task is not None:
        raw = {"kind": task} if task in TASKS else recipes.read(task)[0].task.model_dump(mode="json")
    if raw is None:
        raise ConfigError(
            f"{path} is no run, so it does not say which questions to ask. "
            f"Add --task KIND ({', '.join(TASKS)}) or --task RECIPE.toml"
        )
    return recipes.parse_part(registry.task_class(raw["kind"]), raw, overrides, "task")


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C. Were it Python's own handler, asyncio would put its in place, which waits for a pause that never comes."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit. The user's mistakes are one message; ours keep their traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for small models on a shared CPU, two threads are slower than one
    try:
        app(arguments, prog_name="potstill")
    except PotstillError as error:
        Console(stderr=True).print(f"[bold red]potstill:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
