"""The nouns. Every stage of a run consumes one of these and returns the next one.

    Prompt -> Rollout -> Ask -> Feedback -> Reviewed -> Target -> Batch -> (loss, metrics)

Each record holds the one it was made from, so nothing is ever matched up by position.
Shapes: P prompt tokens, T response tokens, L asked tokens, K teacher alternatives, B rows, V vocabulary.
Log-probabilities and entropies are in nats, never raw logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

Author = Literal["student", "teacher", "data"]
Finish = Literal["stop", "length"]


HeadOf = Callable[[Tensor], Tensor]
"""A model's output layer: hidden states [..., H] -> logits [..., V]."""


class Wants(IntEnum):
    """How much of the teacher a method needs to see; a larger value includes the smaller ones."""

    NOTHING = 0
    TEXT = 1  # the teacher's own words
    SAMPLED = 2  # log-prob of each token of the rollout
    TOPK = 3  # log-probs of the K likeliest tokens at each position
    FULL = 4  # the whole distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question.

    Example: ``Prompt(id="lab-17", messages=({"role": "user", "content": "473*6="},), answer="2838")``.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str | None = None
    """Read by verifiers and privileged teachers, never shown to the student."""
    completion: str | None = None
    """A worked answer to imitate (`sft` with `source = "data"`)."""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What is known of a step before anything is written in it."""

    seed: int
    """Of the run."""
    step: int
    """Counted from 1; -1 in evaluations."""
    done: float = 0.0
    """Share of the run's budget spent before this step, 0 .. 1: what schedules go by."""
    max_tokens: int
    """Longest answer, in student tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer cost, in teacher tokens."""

    read: int = 0
    """Logical input: prompt and prefix, once per request."""
    cached: int = 0
    """The part of `read` that was served from a shared prefix."""
    written: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            read=self.read + other.read, cached=self.cached + other.cached, written=self.written + other.written
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One answer to one prompt, token by token, in the student's vocabulary."""

    prompt: Prompt
    sample: int
    """0 .. group-1, among the answers to the same prompt."""
    author: Author = "student"
    prompt_ids: tuple[int, ...]
    """[P] as the student saw the prompt."""
    response_ids: tuple[int, ...]
    """[T], the end-of-sequence token included when the author wrote one."""
    pieces: tuple[str, ...]
    """[T] the text of each token; "" for special tokens and for all but the last token of a split character."""
    old_logp: tuple[float, ...] | None = None
    """[T] log pi_old(y_t | h_t), nats, of the policy that sampled; None if the student did not write it."""
    entropy: tuple[float, ...] | None = None
    """[T] over the whole vocabulary, nats, of the distribution that produced y_t."""
    finish: Finish
    policy_version: int = 0
    seed: int = 0
    """Every random number that concerns this rollout derives from it."""
    verdict: float | None = None
    """The verifier's score, 0 .. 1."""
    usage: Usage = Usage()
    """What a teacher's writing for this prompt cost, rejected tries included; on one rollout of a group."""
    tries: int = 0
    """Answers the teacher wrote to this prompt, on one rollout of a group;"""
    right: int = 0
    """and how many of them were accepted."""
    guided: int = 0
    """Leading tokens that the teacher wrote and the student went on from. Their old_logp and entropy are 0."""

    def __post_init__(self) -> None:
        for name in ("pieces", "old_logp", "entropy"):
            got = getattr(self, name)
            if got is not None and len(got) != len(self.response_ids):
                raise ValueError(
                    f"rollout {self.key}: {len(got)} {name} for {len(self.response_ids)} response tokens; "
                    "the sampler must return one per sampled token"
                )

    @property
    def key(self) -> tuple[str, int]:
        """Names the rollout within its step: (prompt id, sample)."""
        return self.prompt.id, self.sample

    def text(self, start: int = 0, length: int | None = None) -> str:
        """The text of `length` tokens from `start`. Never cuts inside a character."""
        return "".join(self.pieces[start:][:length])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question to a teacher about one rollout, as seen after `view` and `response[:start]`.

    Either: what do you think of the next `length` tokens (scores)? Or: how would you go on, `n` times (TEXT)?
    """

    rollout: Rollout
    view: Prompt
    """The prompt as the teacher is to see it; a privileged teacher sees more than the student."""
    wants: Wants
    start: int = 0
    length: int | None = None
    """Tokens to score or to write; None scores to the end of the response."""
    n: int = 1
    """Continuations to write (TEXT),"""
    first: int = 0
    """after so many that an earlier question about the same place has brought."""
    ids: bool = False
    """Whether continuations are wanted in the student's tokens too."""
    k: int = 0
    """Alternatives per position (TOPK)."""
    unit: Literal["student", "teacher"] = "student"
    """Whose tokens `length` counts, for TEXT."""
    of: Literal["teacher", "reference", "student"] = "teacher"
    """Who is asked: the teacher, the model that extrapolation starts from, or the student as it is now."""

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """Names the question within its step: (who, prompt id, sample, start, first)."""
        return self.of, *self.rollout.key, self.start, self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """The teacher's answer to one Ask. Fields that were not asked for stay None or empty."""

    ask: Ask
    teacher: str
    temperature: float = 1.0
    sampled: Float32[np.ndarray, " L"] | None = None
    """log pi_T(y_t | h_t)."""
    topk_ids: Int[np.ndarray, "L K"] | None = None
    topk_logp: Float32[np.ndarray, "L K"] | None = None
    """Largest first."""
    logp: Float32[np.ndarray, "L V"] | None = None
    hidden: Float32[np.ndarray, "L H"] | None = None
    """In the place of `logp`, with the `head` that makes logits of them; `sampled` is then left out."""
    head: HeadOf | None = None
    aligned: Bool[np.ndarray, " L"] | None = None
    """False where the teacher's view of the position is not known (another tokenizer); the values there mean nothing."""
    texts: tuple[str, ...] = ()
    """n continuations, each cut to `length` tokens."""
    finishes: tuple[Finish, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    """The texts in the student's tokens, at most `length`, with its end token where the teacher ended; if asked for."""
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviewed:
    """A rollout and everything its teachers said about it, possibly nothing (too short to audit)."""

    rollout: Rollout
    feedback: tuple[Feedback, ...] = ()

    def said(self, of: Literal["teacher", "reference"] = "teacher") -> Feedback | None:
        """What one of them said, for methods that ask each at most once."""
        found = [f for f in self.feedback if f.ask.of == of]
        assert len(found) < 2
        return found[0] if found else None

    @property
    def only(self) -> Feedback:
        """The one answer, for methods that ask once."""
        [feedback] = self.feedback
        return feedback


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What a chunk audit saw and decided, for people to read (OmniOPD Eq. 3-5)."""

    start: int
    length: int
    text: str
    continuations: tuple[str, ...]
    similarity: tuple[float, ...]
    k_sem: float
    pi_bar: float
    target: float
    baseline: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What a teacher wrote after the first `start` tokens of a rollout, to be imitated in their context."""

    start: int
    ids: tuple[int, ...]
    """In the student's tokens."""
    share: float = 1.0
    """Weight of each token, and what it counts for in the divisor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Per-token training target of one rollout; all that a method hands to the learner."""

    source: Reviewed
    weight: Float[Tensor, " T"]
    """Of the method's own term; 0 leaves the token out."""
    anchor: Float[Tensor, " T"] | None = None
    """Of the KL to the reference policy."""
    advantage: Float[Tensor, " T"] | None = None
    imitate: Float[Tensor, " T"] | None = None
    """Of the likelihood of tokens that a teacher wrote."""
    teacher_ids: Int[Tensor, "T K"] | None = None
    teacher_logp: Float[Tensor, "T K"] | None = None
    """Of `teacher_ids`, or of the whole vocabulary (K = V) where those are None."""
    teacher_hidden: Float[Tensor, "T H"] | None = None
    """In the place of `teacher_logp`, with the `teacher_head` that makes logits of them."""
    teacher_head: HeadOf | None = None
    info: Mapping[str, Float[Tensor, " T"]] = field(default_factory=dict)
    """Numbers to average over tokens for the metrics; nan where one does not apply."""
    audits: tuple[Audit, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    """Branches off the rollout; each is a row of its own in the batch."""

    @property
    def rollout(self) -> Rollout:
        """The answer this target is about."""
        return self.source.rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Targets padded to one length. Row t of the policy's output is the distribution that produced labels[:, t]."""

    prompt_ids: tuple[tuple[int, ...], ...]
    """B prompts, ragged."""
    labels: Int[Tensor, "B T"]
    mask: Float[Tensor, "B T"]
    """1 on response tokens, 0 on padding."""
    weight: Float[Tensor, "B T"]
    old_logp: Float[Tensor, "B T"]
    """0 on tokens that the student did not write."""
    anchor: Float[Tensor, "B T"] | None = None
    advantage: Float[Tensor, "B T"] | None = None
    imitate: Float[Tensor, "B T"] | None = None
    teacher_ids: Int[Tensor, "B T K"] | None = None
    teacher_logp: Float[Tensor, "B T K"] | None = None
    teacher_hidden: Float[Tensor, "B T H"] | None = None
    teacher_head: HeadOf | None = None
    trained: Float[Tensor, "B T"]
    """1 on tokens that carry a loss, of any term."""
    of_answer: Float[Tensor, "B T"]
    """How many such tokens the token's own answer has, at least 1."""
    n_tokens: float
    """Trained tokens over *all* ranks and micro-batches: the one divisor, shared by every term."""
    n_rollouts: float
    """Rollouts over all ranks and micro-batches: the divisor of a mean over answers."""

    def teacher_all(self) -> Float[Tensor, "B T V"]:
        """log pi_T(. | h_t) over the whole vocabulary."""
        if self.teacher_hidden is None or self.teacher_head is None:
            assert self.teacher_logp is not None and self.teacher_ids is None
            return self.teacher_logp
        with (
            torch.no_grad(),
            torch.autocast(self.labels.device.type, enabled=False),
        ):  # the student's precision, not its own
            return self.teacher_head(self.teacher_hidden).log_softmax(-1).to(self.labels.device)

    def only(self, rows: Int[Tensor, " N"]) -> "Batch":
        """These tokens alone, counted over all of [B, T], as one answer of N tokens: [1, N]."""
        parts: dict[str, Any] = {
            f.name: v.flatten(0, 1)[rows][None] for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))
        }
        return replace(self, prompt_ids=(), **parts)
