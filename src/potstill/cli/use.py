"""Commands that put a model to use: questions, answers, a server."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from potstill.cli.app import app, out
from potstill.errors import ConfigError, unknown


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
    # It listens first, so that a port that is taken is not found out after minutes of loading.
    with http.listen(host, port, key) as server:
        served = http.Served(models.load(path, dtype=kind, device=checks.device(device)), cells=batch_cells)
        about, there = served.about, served.loaded.device
        size = f"{about.width} numbers a token in place of {about.vocab}"
        for line in (
            f"{model} ({dtype} on {there}; {size}) listens at {server.url}",
            f'teacher = {{ kind = "potstill", base_url = "{server.url}", tokenizer = "{path}" }}',
        ):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        server.run(served)
    out.print("Stopped.")


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
