"""A recipe: TOML of at most 30 lines, dotted overrides behind it, checked before any model is loaded.

Every default here is a setting that was tested. There are no presets.
"""

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError

from potstill import registry
from potstill.errors import ConfigError, unknown

DType = Literal["float32", "bfloat16"]


class Part(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A table of the recipe."""


class LoRA(Part):
    """Train a low-rank adapter instead of all weights."""

    rank: int = Field(16, gt=0)
    """Rank of the adapter's matrices."""
    alpha: int = Field(32, gt=0)
    """The adapter is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs dropped in training."""
    modules: tuple[str, ...] = ()
    """Names of the layers to adapt; empty: every linear layer but the output."""


class Student(Part):
    """The model that learns."""

    path: str
    """Hugging Face folder, hub name, adapter folder, .gguf file, or lab/NAME for a bundled model."""
    dtype: DType = "float32"
    """Of its weights."""
    device: str = "auto"
    """`auto`: a GPU if there is one, else the CPU."""
    eos: tuple[str, ...] | None = None
    """Tokens that end a response; unset: what the model's own files say."""
    lora: LoRA | None = None


class Teacher(Part):
    """The model that corrects."""

    kind: Literal["hf"] = "hf"
    """`hf`: a Hugging Face model in this process."""
    path: str
    """As student.path."""
    dtype: DType = "float32"
    """Of its weights and arithmetic."""
    device: str = "auto"
    """As student.device."""
    eos: tuple[str, ...] | None = None
    """As student.eos."""
    temperature: float = Field(1.0, ge=0)
    """Of the text it writes. Scores are always at 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of the text it writes: only the likeliest tokens that together have this probability."""
    text_only: bool = False
    """Treat it as a teacher that returns nothing but text, even if it shares the student's tokenizer."""
    batch_cells: int = Field(65_536, gt=0)
    """Rows times tokens held in its cache at once: the bound on memory."""


class Rollouts(Part):
    """What the student writes in a step. Always at temperature 1 with the whole vocabulary: the policy is the model."""

    prompts: int = Field(32, gt=0)
    """Prompts in a step."""
    group: int = Field(1, gt=0)
    """Answers to each prompt."""
    max_tokens: int = Field(48, gt=0)
    """Longest answer, in student tokens, in training and in evaluation."""
    batch_cells: int = Field(65_536, gt=0)
    """Rows times tokens held in the student's cache at once: the bound on memory."""


class Learner(Part):
    """AdamW."""

    lr: float = Field(1e-3, gt=0)
    """Learning rate after warm-up. Policy gradients (sampled_kl, omniopd) want less than opd: 6e-4 and below."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from `lr` after warm-up: not at all, in a line to 0, or along a half cosine to 0."""
    warmup: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled: each step takes lr * weight_decay of every weight."""
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    micro_batch: int = Field(0, ge=0)
    """Rollouts in one forward and backward pass; 0: all. Changes memory, never the gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the student's arithmetic; bfloat16 keeps its weights as they are loaded (autocast)."""


class Evaluation(Part):
    """Held-out questions, asked before the first step, every so often, and after the last."""

    split: Literal["validation", "test"] = "validation"
    """Choose fields on `validation`, report `test`."""
    questions: int = Field(256, ge=0)
    """0: never ask; for data without answers."""
    samples: int = Field(4, gt=0)
    """k of avg@k, pass@k and maj@k, at temperature 1."""
    greedy: bool = True
    """Ask once more at temperature 0."""
    every: int = Field(100, gt=0)
    """Steps between evaluations."""


class Save(Part):
    """What is kept of a run."""

    every: int = Field(100, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints that stay."""
    rollouts_every: int = Field(50, gt=0)
    """Steps between rollouts written to rollouts/."""
    rollouts: int = Field(8, gt=0)
    """Rollouts written each time."""


class Config(Part):
    """A run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run, under runs/."""
    seed: int = Field(0, ge=0)
    """Every random number of the run derives from it."""
    steps: int = Field(gt=0)
    """Optimiser steps."""
    student: Student
    teacher: Teacher | None = None
    task: SerializeAsAny[BaseModel]
    method: SerializeAsAny[BaseModel]
    rollouts: Rollouts = Rollouts()
    learner: Learner = Learner()
    eval: Evaluation = Evaluation()
    save: Save = Save()


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def read(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """A recipe and its text. `recipe` is a file, or the name of one that comes with the package. Raises ConfigError."""
    path = Path(recipe)
    if not path.is_file():
        known = recipes()
        if str(recipe) not in known:
            raise ConfigError(
                f"{unknown('recipe', str(recipe), known)}. Give one of these names, or the path of a TOML file"
            )
        path = known[str(recipe)]
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a recipe that you may read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}. A recipe is a text file in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not TOML: {error}. See `potstill check` on one of: {', '.join(recipes())}"
        ) from None
    for override in overrides:
        _apply(raw, override)
    shown = "".join(f"# {o}\n" for o in overrides)
    return parse(raw), (f"{text}\n# overridden on the command line:\n{shown}" if overrides else text)


def parse(raw: dict[str, Any]) -> Config:
    """A recipe from plain tables. Raises ConfigError that names every field at fault."""
    raw = dict(raw)
    problems: list[str] = []
    for table, key, find in (("method", "name", registry.method_class), ("task", "kind", registry.task_class)):
        given = raw.get(table)
        if not isinstance(given, dict) or key not in given:
            problems.append(f"[{table}] needs {key} = ...")
            continue
        if not isinstance(given[key], str):
            problems.append(f"{table}.{key} = {given[key]!r}: should be a name, in quotes")
            continue
        cls = find(given[key])
        values = {k: v for k, v in given.items() if not (k == key and ".py:" in str(v))}
        try:
            raw[table] = cls.model_validate(values)
        except ValidationError as error:
            problems += _explain(error, cls, table)
            raw[table] = cls.model_construct()
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += [
            p for p in _explain(error, Config, "") if not any(p.startswith(f"{t}:") for t in ("task", "method"))
        ]
        config = None
    if problems or config is None:
        raise ConfigError("the recipe cannot be used:\n" + "\n".join(f"  - {p}" for p in dict.fromkeys(problems)))
    return config


def _apply(raw: dict[str, Any], override: str) -> None:
    """`learner.lr=1e-4`: the value is TOML, or a string where it is not."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{override!r} is no override. Write key=value, such as learner.lr=1e-4 or method.beta=0.5")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *tables, last = key.split(".")
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{override!r}: {table} is a value, not a table, so nothing can be set inside it")
    raw[last] = parsed


def _explain(error: ValidationError, cls: type[BaseModel], prefix: str) -> Iterable[str]:
    for e in error.errors():
        where = ".".join(str(part) for part in (prefix, *e["loc"]) if part != "")
        if e["type"] == "extra_forbidden":
            fields = _fields_at(cls, e["loc"][:-1])
            yield f"{where}: {unknown('field', str(e['loc'][-1]), fields)}"
        elif e["type"] == "missing":
            yield f"{where}: missing, and it has no default"
        else:
            message = e["msg"].removeprefix("Value error, ")
            yield f"{where} = {e['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    options: list[type[BaseModel]] = [cls]
    for part in map(str, loc):
        if len(options) > 1:  # pydantic puts the tag of a tagged union into the location
            options = [o for o in options if any(part == f.default for f in o.model_fields.values())]
        else:
            annotation = options[0].model_fields[part].annotation
            parts = getattr(annotation, "__args__", (annotation,))
            options = [o for o in parts if isinstance(o, type) and issubclass(o, BaseModel)]
    return list(options[0].model_fields)


def parse_part(cls: Any, raw: dict[str, Any], overrides: Sequence[str], table: str) -> Any:
    """One table of a recipe by itself. Raises ConfigError."""
    raw = dict(raw)
    for override in overrides:
        _apply(raw, override)
    try:
        return cls.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"  - {p}" for p in _explain(error, cls, table))
        raise ConfigError(f"[{table}] cannot be used:\n{problems}") from None
