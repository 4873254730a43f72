"""The tables of a recipe. Every default here is a setting that was tested; there are no presets."""

from typing import Annotated, Literal

from pydantic import BaseModel, Discriminator, Field, SerializeAsAny, Tag, model_validator

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
