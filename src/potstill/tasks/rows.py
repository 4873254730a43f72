"""What data sets of rows have in common, wherever the rows lie."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from potstill.errors import DataError
from potstill.seeds import derive
from potstill.tasks.base import Split, Task
from potstill.verifiers import Exact, Math, Verifier

if TYPE_CHECKING:
    from potstill.types import Prompt

Part = Literal["train", "validation", "test"]
Row = tuple[str, Mapping[str, Any]]
"""Where it stands, for messages and ids ("data.jsonl:3"), and its columns."""


def _by_name(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


class Rows(Task, frozen=True):
    """A data set with a prompt in each row, and an answer in each row that is to be verified.

    A prompt is a string, which becomes one user message, or a list of messages (`role`, `content`). A column `id`
    names the rows; without one, their place does. Columns not mentioned here go to `Prompt.meta`.

    Training prompts come in epochs, each in an order of its own. A step never holds a row twice, nor does an epoch;
    rows left over at the end of an epoch, fewer than a step takes, are skipped until the next.
    """

    prompt: str = "prompt"
    """Column of the question."""
    answer: str = "answer"
    """Column of the reference answer. It may be absent unless it is named, but held-out questions need one."""
    completion: str = "completion"
    """Column of a worked answer to imitate. It may be absent unless it is named."""
    holdout: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the prompts kept for `validation`, and again for `test`, where the data set has no such part.
    The hash of a prompt's text decides, so duplicates stay together and new rows move no old one."""
    verify: Annotated[Exact | Math, Field(discriminator="kind"), BeforeValidator(_by_name)] = Exact()
    """A name (`"math"`) or a table (`{kind = "exact", pattern = "#### (.+)"}`)."""

    @abstractmethod
    def rows(self, part: Part) -> Iterable[Row] | None:
        """The rows of one part; None where the data set has no such part and the training rows are to be split.

        Raises:
            DataError: The data cannot be read.
        """

    @abstractmethod
    def has(self, part: Part) -> bool:
        """Whether the data set brings this part with it."""

    def draw(self, seed: int, step: int, count: int) -> "list[Prompt]":
        """`count` training prompts of shuffled epochs; see `Task.draw`."""
        prompts = self._parts["train"]
        _enough(count, prompts, "training")
        epoch, turn = divmod(step, len(prompts) // count)
        order = np.random.default_rng(derive("epoch", seed, epoch)).permutation(len(prompts))
        return [prompts[row] for row in order[turn * count : (turn + 1) * count]]

    def questions(self, split: Split, count: int) -> "list[Prompt]":
        """Held-out prompts in the order of a hash of their text; see `Task.questions`."""
        prompts = self._parts[split]
        _enough(count, prompts, split)
        for prompt in prompts[:count]:
            if prompt.answer is None:
                raise DataError(
                    f"{split} question {prompt.id} has no answer to compare with: no column {self.answer!r}"
                    f"{_nearest(self.answer, prompt.meta)}; name the column that holds the answers (`answer`)"
                )
        return prompts[:count]

    def known(self) -> "list[Prompt]":
        """Every training row."""
        return self._parts["train"]

    def verifier(self) -> Verifier:
        """The one that `verify` names."""
        return self.verify

    @model_validator(mode="after")
    def _holdout_has_an_effect(self) -> "Rows":
        if "holdout" in self.model_fields_set and self.has("validation") and self.has("test"):
            raise ValueError(
                f"holdout = {self.holdout} has no effect, because validation and test questions both come from data "
                "of their own; leave it out"
            )
        return self

    @cached_property
    def _parts(self) -> "dict[Part, list[Prompt]]":
        parts: dict[Part, list[Prompt]] = {"train": [], "validation": [], "test": []}
        for part in parts:
            if (rows := self.rows(part)) is not None:
                prompts = self._prompts(rows)
                for prompt in prompts:
                    parts[self._part_of(prompt) if part == "train" else part].append(prompt)
        _check_disjoint(parts)
        for split in ("validation", "test"):
            parts[split].sort(key=lambda prompt: derive("order", _text(prompt)))
        return parts

    def _part_of(self, prompt: "Prompt") -> Part:
        position = derive("split", _text(prompt)) / 2**63
        if position < self.holdout and not self.has("validation"):
            return "validation"
        if position >= 1 - self.holdout and not self.has("test"):
            return "test"
        return "train"

    def _prompts(self, rows: Iterable[Row]) -> "list[Prompt]":
        seen: dict[str, str] = {}
        prompts: list[Prompt] = []
        for place, row in rows:
            prompt = self._prompt(place, row)
            if prompt.id in seen:
                raise DataError(
                    f"{place}: the id {prompt.id!r} is also that of {seen[prompt.id]}; ids name prompts in logs and "
                    "seeds, so each must be used once: change one, or drop the column `id`"
                )
            seen[prompt.id] = place
            prompts.append(prompt)
        return prompts

    def _prompt(self, place: str, row: Mapping[str, Any]) -> "Prompt":
        from potstill.types import Prompt

        for column in ("prompt", "answer", "completion"):
            name = getattr(self, column)
            if name not in row and (column == "prompt" or column in self.model_fields_set):
                raise DataError(
                    f"{place}: no column {name!r}{_nearest(name, row)}; say with `{column}` where the {column} is"
                )
        used = {self.prompt, self.answer, self.completion, "id"}
        return Prompt(
            id=_string(place, "id", row.get("id")) or place,
            messages=_messages(place, self.prompt, row[self.prompt]),
            answer=_string(place, self.answer, row.get(self.answer)),
            completion=_string(place, self.completion, row.get(self.completion)),
            meta={name: value for name, value in row.items() if name not in used},
        )


def _messages(place: str, column: str, value: object) -> tuple[Mapping[str, str], ...]:
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if not (isinstance(value, list) and value and all(_is_message(item) for item in cast(list[object], value))):
        raise DataError(
            f"{place}: column {column!r} holds {value!r:.80}; a prompt is a string with text in it, or a list of "
            'messages such as [{"role": "user", "content": "2+2="}]'
        )
    messages = cast(list[Mapping[str, str]], value)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: the last message of column {column!r} is the assistant's, so the student would see the answer; "
            "move it to a column of its own and name that with `completion`"
        )
    return tuple(messages)


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    message = cast(Mapping[object, object], value)
    return {"role", "content"} <= message.keys() and all(isinstance(item, str) for item in message.values())


def _string(place: str, column: str, value: object) -> str | None:
    """Numbers are common as answers and ids; they become strings."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{place}: column {column!r} holds {value!r:.80}; it must hold a string or a number")


def _text(prompt: "Prompt") -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)


def _nearest(name: str, columns: Iterable[str]) -> str:
    """ " (did you mean ...? the columns are ...)"."""
    from potstill.errors import did_you_mean

    return f" ({did_you_mean(name, columns)}the columns are {', '.join(sorted(columns))})"


def _enough(count: int, prompts: "list[Prompt]", part: str) -> None:
    if not 0 < count <= len(prompts):
        raise DataError(
            f"{count} {part} prompts were asked for, but the data set has {len(prompts)}; ask for fewer "
            f"({'rollouts.prompts' if part == 'train' else 'eval.questions'}), give more data, or change task.holdout"
        )


def _check_disjoint(parts: "Mapping[Part, list[Prompt]]") -> None:
    owner: dict[str, tuple[Part, str]] = {}
    for part, prompts in parts.items():
        for prompt in prompts:
            other, place = owner.setdefault(_text(prompt), (part, prompt.id))
            if other != part:
                raise DataError(
                    f"{part} prompt {prompt.id} is also {other} prompt {place}, so a score would measure memory; "
                    "remove the prompts that occur in both"
                )
