"""The procedural tasks of `reasoning-gym`, each with its own scorer."""

import os
import re
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from potstill.errors import DataError, did_you_mean, require
from potstill.seeds import derive
from potstill.tasks.base import Split, Task
from potstill.verifiers.base import Verifier

if TYPE_CHECKING:
    from potstill.types import Prompt

Extract = Literal["tags", "last_line", "last_number", "raw"]

HELD_OUT = 0.2
"""Share of all questions that belongs to each of validation and test."""
CHUNK = 500
"""Questions generated from one reasoning-gym data set; its item i has the seed of the data set plus i."""
SEEDS: dict[Split, int] = {"validation": 2**31, "test": 3 * 2**30}
"""Where the seeds of held-out questions start. Those of training end before, at 2^31; all stay below 2^32."""

INSTRUCTIONS: dict[Extract, str] = {
    "tags": "Give the final answer between <answer> and </answer>.",
    "last_line": "Give the final answer alone on the last line.",
    "last_number": "End with the final answer, a number.",
    "raw": "Reply with the final answer and nothing else.",
}

NUMBER = r"(?:(?<![\w)])[-\u2212])?\d[\d,]*(?:\.\d+)?"
"""A minus sign belongs to a number unless it follows something that one can subtract from."""

HASH_ORDERED = {
    "codeio",
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
}
"""Tasks that go through sets, so that the same seed gives other questions in another process."""

_ARITHMETIC = r"(?!.*\*\*)[\d+\-*/().]*"
_LITERAL = r"[\w\[\],.'\"-]*"
_FORMULA = r"(?:[\w+\-*/^,.)]|(?:^|(?<=[-+*/^(,]))(?:(?:sin|cos|tan|exp|log|sqrt|Abs|asin|acos|atan)?\())*"
EVALUATED = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "binary_matrix": _LITERAL,
    "n_queens": _LITERAL,
    "spiral_matrix": _LITERAL,
    "string_insertion": _LITERAL,
    "polynomial_multiplication": _FORMULA,
    "simple_integration": _FORMULA,
    "intermediate_integration": _FORMULA,
}
"""Tasks whose scorer runs the answer as Python (`eval`, or SymPy's parser, which calls it). A model's text must not be
run, so only answers of these forms, white space left out, reach the scorer: none can call a function of Python's."""


class Scorer(Verifier, frozen=True):
    """`score_answer` of one reasoning-gym task, on the extracted answer; many tasks give partial credit."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    name: str
    options: dict[str, Any]
    extract_from: Extract

    def extract(self, text: str) -> str | None:
        """The part of the text that `extract_from` names; None if there is none, or nothing in it."""
        match self.extract_from:
            case "tags":
                from reasoning_gym.utils import extract_answer

                return extract_answer(text) or None
            case "last_line":
                return (text.strip().splitlines() or [""])[-1].strip() or None
            case "last_number":
                numbers = re.findall(NUMBER, text)
                return numbers[-1].replace(",", "").replace("\u2212", "-") if numbers else None
            case "raw":
                return text.strip() or None

    def score(self, answer: str, prompt: "Prompt") -> float:
        """0 .. 1 as the task's scorer has it; 0 for an answer that the scorer cannot read."""
        form = EVALUATED.get(self.name)
        if form is not None and not re.fullmatch(form, re.sub(r"\s", "", answer)):
            return 0.0
        entry = {"question": prompt.meta["question"], "answer": prompt.answer, "metadata": prompt.meta["metadata"]}
        try:
            score = self._dataset.score_answer(answer, entry)
        except Exception:  # some (prime_factorization, boxnet) raise on text that is no answer
            return 0.0
        return min(max(float(score), 0.0), 1.0)

    @cached_property
    def _dataset(self) -> Any:
        from reasoning_gym import create_dataset

        return create_dataset(self.name, **self.options)


class ReasoningGym(Task, frozen=True):
    """Questions made on the spot, as many as the task has, and different ones in every step.

    The hash of a question decides whether it is for training, validation or test, so none is ever in two of them,
    however few a task has; and the seeds that questions are made from do not overlap either.
    """

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    name: str = "chain_sum"
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the task, as in `reasoning_gym.create_dataset(name, **options)`, without `seed` and `size`."""
    extract: Extract = "last_number"
    """Where the answer stands in the student's text: between <answer> tags, on the last line that is not empty, the
    last number, or the whole text. Small models rarely write tags, or a line with nothing but the answer: of 18 texts
    of SmolLM2-135M-Instruct one had the tags it was asked for, and 16 the number."""
    instruction: str | None = None
    """Put after the question. None: one sentence that asks for what `extract` reads (`INSTRUCTIONS`)."""

    def draw(self, seed: int, step: int, count: int) -> "list[Prompt]":
        """`count` new training questions; see `Task.draw`."""
        start = derive("reasoning_gym", seed, step) % (SEEDS["validation"] - 2**24)
        return self._first(count, "train", start)

    def questions(self, split: Split, count: int) -> "list[Prompt]":
        """The first `count` different questions of the split; see `Task.questions`."""
        return self._first(count, split, SEEDS[split])

    def verifier(self) -> Verifier:
        """The task's own scorer."""
        return Scorer(name=self.name, options=self.options, extract_from=self.extract)

    @model_validator(mode="after")
    def _can_be_made(self) -> "ReasoningGym":
        require("reasoning_gym", "gym", "task reasoning_gym")
        from reasoning_gym.factory import DATASETS

        if self.name not in DATASETS:
            raise ValueError(
                f"reasoning-gym has no task {self.name!r}; {did_you_mean(self.name, DATASETS)}It has: "
                f"{', '.join(sorted(DATASETS))}"
            )
        if reserved := {"seed", "size"} & self.options.keys():
            raise ValueError(
                f"options of {self.name} hold {', '.join(sorted(reserved))}, but questions are made by split and step, "
                "so that training never sees a held-out one; leave that out"
            )
        if self.name in HASH_ORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(
                f"reasoning-gym's {self.name!r} makes other questions in every process, so a run could not be resumed "
                "or repeated; set the environment variable PYTHONHASHSEED=0 before you start Python"
            )
        try:
            answer = self._dataset(0)[0]["answer"]
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"reasoning-gym refuses {self.name} with options {self.options}: {error}; correct the options"
            ) from error
        if self.extract == "last_number" and not re.fullmatch(NUMBER, str(answer)):
            raise ValueError(
                f"extract = 'last_number', but an answer to {self.name} is no number ({answer!r:.60}); "
                "choose 'tags', 'last_line' or 'raw'"
            )
        return self

    def _dataset(self, seed: int) -> Any:
        from reasoning_gym import create_dataset

        return create_dataset(self.name, seed=seed, size=CHUNK, **self.options)

    def _first(self, count: int, part: Split | Literal["train"], start: int) -> "list[Prompt]":
        """The first `count` questions of this part that differ, among those made from the seeds `start` onwards."""
        found: dict[str, Prompt] = {}
        limit = CHUNK + 40 * count
        for seed, entry in self._made(start, limit):
            question = entry["question"]
            if len(found) < count and question not in found and _part_of(question) == part:
                found[question] = self._prompt(f"{self.name}:{seed}", entry)
            if len(found) == count:
                return list(found.values())
        raise DataError(
            f"{count} different {part} questions of {self.name} with options {self.options} were asked for, but "
            f"{limit} tries gave {len(found)}; ask for fewer, or choose options that allow more"
        )

    def _made(self, start: int, limit: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for chunk in range(start, start + limit, CHUNK):
            dataset = self._dataset(chunk)
            for index in range(CHUNK):
                yield chunk + index, dataset[index]

    def _prompt(self, name: str, entry: dict[str, Any]) -> "Prompt":
        from potstill.types import Prompt

        instruction = INSTRUCTIONS[self.extract] if self.instruction is None else self.instruction
        content = f"{entry['question']}\n{instruction}" if instruction else entry["question"]
        return Prompt(
            id=name,
            messages=({"role": "user", "content": content},),
            answer=entry["answer"],
            meta={"question": entry["question"], "metadata": entry["metadata"]},
        )


def _part_of(question: str) -> Split | Literal["train"]:
    position = derive("split", question) / 2**63
    if position < HELD_OUT:
        return "validation"
    return "test" if position < 2 * HELD_OUT else "train"
