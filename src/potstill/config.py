"""A recipe: TOML of at most 30 lines, dotted overrides behind it, checked before any model is loaded.

Every default here is a setting that was tested. There are no presets.
"""

import copy
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Discriminator, Field, SerializeAsAny, Tag, ValidationError, model_validator

from potstill import registry
from potstill.errors import ConfigError, unknown
from potstill.teachers import settings

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
    align: bool = False
    """With another tokenizer: carry its scores over to the student's tokens, by the text that both stand for."""
    shuffled: bool = False
    """A control: what it writes for one prompt is shown as its answer to another."""
    batch_cells: int = Field(65_536, gt=0)
    """Rows times tokens held in its cache at once: the bound on memory."""


def _kind(table: object) -> str:
    return str(table.get("kind", "hf") if isinstance(table, dict) else getattr(table, "kind", "hf"))


AnyTeacher = Annotated[
    Annotated[Teacher, Tag("hf")]
    | Annotated[settings.HTTP, Tag("http")]
    | Annotated[settings.Chat, Tag("chat")]
    | Annotated[settings.Potstill, Tag("potstill")]
    | Annotated[settings.Replay, Tag("replay")],
    Discriminator(_kind),
]
"""A model in this process, or one of those that are not."""


class Reference(Part):
    """The model that extrapolation starts from, for `reference = "base"`: the teacher before its RL, say."""

    path: str
    """As student.path; it needs the student's tokenizer."""
    dtype: DType = "float32"
    """Of its weights and arithmetic."""
    device: str = "auto"
    """As student.device."""
    eos: tuple[str, ...] | None = None
    """As student.eos."""


class Horizon(Part):
    """Learn from the beginnings of answers first: H = start + grow * ((step - 1) // every) tokens, at most max_tokens.

    With `grow` = 0 it stays there (TOPD), else it moves on (POPD, arXiv:2605.31490). What is cut off has no verdict.
    """

    start: int = Field(gt=0)
    """Tokens of an answer in the first step."""
    grow: int = Field(0, ge=0)
    """Tokens more, every so often."""
    every: int = Field(1, gt=0)
    """Steps between."""

    def at(self, step: int, max_tokens: int) -> int:
        """H of a step, counted from 1."""
        return min(max_tokens, self.start + self.grow * ((step - 1) // self.every))


class Select(Part):
    """Which tokens learn: the share `keep` of a step's tokens that score highest. The others get weight 0."""

    by: Literal["entropy", "divergence", "gap", "tip", "random"]
    """The student's entropy; an estimate of KL(student || teacher) from the sampled token; how much likelier the student
    finds it than the teacher does; h + d - h d of the first two, scaled to 0..1 (TIP, arXiv:2604.14084); or chance."""
    over: Literal["batch", "answer"] = "batch"
    """Which tokens compete. Those kept of an `answer` weigh as much together as all its tokens did."""
    keep: float = Field(0.5, gt=0, lt=1)
    """Share of tokens that learn."""


class Rollouts(Part):
    """What the student writes in a step. Always at temperature 1 with the whole vocabulary: the policy is the model."""

    prompts: int = Field(32, gt=0)
    """Prompts in a step."""
    group: int = Field(1, gt=0)
    """Answers to each prompt."""
    max_tokens: int = Field(48, gt=0)
    """Longest answer, in student tokens, in training and in evaluation."""
    horizon: Horizon | None = None
    """Shorter answers in training."""
    off_policy: bool = False
    """A control: the teacher writes, the student only says how likely it finds that."""
    resample: int = Field(0, ge=0)
    """How often other prompts take the place of those whose answers all score alike (DAPO's dynamic sampling)."""
    ahead: bool = False
    """Write the answers of the next step while this one is learnt from, on a copy of the student. They are then one update
    old. Token credit corrects for it by its ratio, omniopd by `max_ratio`; opd and dagger learn at the older one's answers.
    What Ctrl-C leaves unread is written anew by --resume."""
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
    micro_tokens: int = Field(0, ge=0)
    """Instead: tokens of prompts and answers in one pass, but at least one rollout; 0: no bound."""
    packed: bool = False
    """Read texts one behind another in one row, without padding. Pays on a GPU; on a CPU texts of like lengths are faster."""
    updates: int = Field(1, gt=0)
    """Optimiser steps on the same rollouts. Those after the first are off-policy: token-credit methods correct that, omniopd with
    `max_ratio`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the student's arithmetic; bfloat16 keeps its weights as they are loaded (autocast)."""

    @model_validator(mode="after")
    def _one_bound(self) -> "Learner":
        if self.micro_batch and self.micro_tokens:
            raise ValueError(
                f"micro_batch = {self.micro_batch} and micro_tokens = {self.micro_tokens} both bound a pass; set one of them"
            )
        return self


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


class Geometry(Part):
    """Keep where the weights go while they train: leading singular vectors of the update, norms and spectra."""

    every: int = Field(0, ge=0)
    """Steps between recordings; 0: none. The first and the last step are recorded too."""
    k: int = Field(64, gt=0)
    """Singular vectors kept of each matrix."""
    matrices: Literal["attention", "linear"] = "attention"
    """Those of attention, which the paper averages over, or of all linear layers but the output."""
    most: float = Field(0.05, gt=0)
    """Largest share of the run's CPU time: a recording that would bring it above is left out."""


class Projection(Part, validate_by_name=True, serialize_by_alias=True):
    """Confine the updates to a subspace of the layers' inputs (arXiv:2606.07082, Sec. 4.2)."""

    basis: str = Field("self", alias="from")
    """`self`: leading right singular vectors of the update so far. `random`. `inputs`: leading eigenvectors of the layer
    inputs' second moment. Else a file: geometry/step_N.npz of another run."""
    k: int = Field(16, ge=0)
    """Its dimension. 0, with mode = "step": the weights stay where they are."""
    mode: Literal["grad", "step", "coord"] = "grad"
    """What is projected: the gradient (the paper), the optimiser's step, or the parameters themselves."""
    matrices: Literal["attention", "linear"] = "linear"
    """Which weights; all others train freely."""
    at: float = Field(0.2, ge=0, lt=1)
    """When it starts, as a share of the run."""

    @model_validator(mode="after")
    def _stops(self) -> "Projection":
        if self.k == 0 and self.mode != "step":
            raise ValueError(
                f"k = 0 stops the weights where they are, but under mode = {self.mode!r} Adam would still move them or have "
                'nothing to move. Set mode = "step"'
            )
        return self


class Budget(Part):
    """When a run ends, if not after a number of steps. At most one of these; the step that reaches it is the last."""

    rollout_tokens: int | None = Field(None, gt=0)
    """Tokens of the answers learnt from."""
    teacher_tokens: int | None = Field(None, gt=0)
    """Tokens the teacher read and wrote, those of shared prefixes counted each time."""
    cpu_seconds: float | None = Field(None, gt=0)
    """CPU seconds of training steps. Such a run ends elsewhere on another machine."""

    @property
    def given(self) -> tuple[str, float] | None:
        """Name and size of the one that is set."""
        return next(((name, float(value)) for name, value in self if value is not None), None)


class Config(Part):
    """A run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run, under runs/."""
    seed: int = Field(0, ge=0)
    """Every random number of the run derives from it."""
    steps: int | None = Field(None, gt=0)
    """Batches of rollouts learnt from. Either this or a budget."""
    budget: Budget = Budget()
    """Ends the run by what it spends instead."""
    student: Student
    teacher: AnyTeacher | None = None
    reference: Reference | None = None
    task: SerializeAsAny[BaseModel]
    method: SerializeAsAny[BaseModel]
    rollouts: Rollouts = Rollouts()
    select: Select | None = None
    learner: Learner = Learner()
    geometry: Geometry = Geometry()
    projection: Projection | None = None
    eval: Evaluation = Evaluation()
    save: Save = Save()

    @model_validator(mode="after")
    def _one_end(self) -> "Config":
        ends = ["steps"] * (self.steps is not None) + [f"budget.{name}" for name, value in self.budget if value]
        if len(ends) != 1:
            said = f"{' and '.join(ends)} contradict each other" if ends else "nothing says when the run ends"
            raise ValueError(f"{said}; give steps, or one of the fields of [budget]: {', '.join(Budget.model_fields)}")
        return self


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def read(recipe: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> tuple[Config, str]:
    """A recipe and its text.

    Args:
        recipe: A TOML file, a JSON file such as a run's resolved.json, or the name of a recipe of the package.
        overrides: `key=value`; they win over the variant.
        variant: An entry of the recipe's [variants], laid over the rest. Unset: the recipe as it stands.

    Raises:
        ConfigError: It cannot be read, or is no recipe.
    """
    raw, variants, text = tables(recipe)
    notes = list(overrides)
    if variant is not None:
        if variant not in variants:
            raise ConfigError(
                f"{recipe} has no [variants], so there is no variant {variant!r}. Leave --variant out, or add the table"
                if not variants
                else f"{recipe}: {unknown('variant', variant, variants)}"
            )
        raw = merged(raw, variants[variant])
        notes.insert(0, f"variant {variant}")
    for override in overrides:
        _apply(raw, override)
    if variant is not None:
        raw = without_unused(raw)
    shown = "".join(f"# {note}\n" for note in notes)
    return parse(raw), (f"{text}\n# chosen on the command line:\n{shown}" if notes else text)


def without_unused(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's tables, without a [teacher] or [reference] that its method does not ask: those are for the others."""
    method = parse(dict(raw)).method
    unused = {"teacher": getattr(method, "teacherless", False), "reference": getattr(method, "refers_to", "") != "base"}
    return {key: value for key, value in raw.items() if not unused.get(key)}


def tables(recipe: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], str]:
    """A recipe's tables as they stand, its variants by name, and its text in TOML. Raises ConfigError."""
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
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a recipe that you may read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}. A recipe is a text file in TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not TOML: {error}. See `potstill check` on one of: {', '.join(recipes())}"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}. Give a whole file, such as a run's resolved.json") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is no recipe: it holds no tables. Give a TOML file or a run's resolved.json")
    if path.suffix == ".json":
        text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in flat(raw).items())
    variants = raw.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise ConfigError(
            f'{path}: [variants] should hold a table for each name, such as sft = {{method.name = "sft"}}'
        )
    return raw, variants, text


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, table by table; a method of another name takes nothing from the base's."""
    out = copy.deepcopy(dict(base))
    for key, value in over.items():
        there = out.get(key)
        other = key == "method" and "name" in value and isinstance(there, dict) and there.get("name") != value["name"]
        nested = isinstance(there, dict) and isinstance(value, Mapping) and not other
        out[key] = merged(there or {}, value) if nested else copy.deepcopy(value)
    return out


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and their values; those that are None are left out, as TOML has no word for them."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            out[f"{prefix}{key}"] = value
    return out


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
        table, *inside = e["loc"] or ("",)
        kinded = cls is Config and table == "teacher"  # pydantic puts the kind of teacher between table and field
        loc = (table, *inside[kinded:])
        where = ".".join(str(part) for part in (prefix, *loc) if part != "")
        if e["type"] == "union_tag_invalid":
            kinds = [kind.strip("' ") for kind in e["ctx"]["expected_tags"].split(",")]
            yield f"{where}.kind: {unknown('kind', str(e['ctx']['tag']), kinds)}"
        elif e["type"] == settings.SECRET:
            yield f"{where}: {e['msg']}"
        elif e["type"] == "extra_forbidden":
            fields = _fields_at(cls, e["loc"][:-1])
            yield f"{where}: {unknown('field', str(e['loc'][-1]), fields)}"
        elif e["type"] == "missing":
            yield f"{where}: missing, and it has no default"
        else:
            message = e["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            about_table = isinstance(e["input"], dict) and e["type"] == "value_error"  # no single value is at fault
            yield ": ".join(filter(None, (where if about_table else f"{where} = {e['input']!r}", message)))


def _fields_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    options: list[type[BaseModel]] = [cls]
    for part in map(str, loc):
        if len(options) > 1:  # pydantic puts the tag of a tagged union into the location
            options = [o for o in options if any(part == f.default for f in o.model_fields.values())]
        else:
            options = list(_models(options[0].model_fields[part].annotation))
    return [field.alias or name for name, field in options[0].model_fields.items()]


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    """The tables in a type, however deep inside a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in get_args(annotation):
        yield from _models(inside)


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
