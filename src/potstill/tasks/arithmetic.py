"""Long multiplication with every step written out, 2-4 digits by one: the lab's task.

    473*6=  ->  3*6+0=18;7*6+1=43;4*6+4=28;#2838

From the last digit to the first: digit * multiplier + carry = value. The units of the values, read backwards behind
the whole of the last value, are the product.
"""

import random
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle, islice
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import field_validator

from potstill.errors import DataError
from potstill.seeds import derive
from potstill.tasks.base import Split, Task
from potstill.verifiers.exact import Exact

if TYPE_CHECKING:  # types.py needs torch, and reading a recipe must not
    from potstill.types import Prompt

Pair = tuple[int, int]
"""(multiplicand, multiplier)."""
TENTHS: dict[int, Literal["train"] | Split] = {
    **dict.fromkeys(range(6), "train"),
    6: "validation",
    7: "validation",
    8: "test",
    9: "test",
}


class Step(NamedTuple):
    """One line of the working: digit * multiplier + carry = value."""

    digit: int
    multiplier: int
    carry: int
    value: int


def work(multiplicand: int, multiplier: int, slip: Callable[[int], int] = int) -> list[Step]:
    """The steps, last digit first. `slip` may change what is written down as a value; the rest follows from that."""
    steps: list[Step] = []
    carry = 0
    for digit in map(int, reversed(str(multiplicand))):
        steps.append(Step(digit, multiplier, carry, slip(digit * multiplier + carry)))
        carry = steps[-1].value // 10
    return steps


def product(steps: list[Step]) -> str:
    """What the steps add up to, right or wrong."""
    *units, last = [step.value for step in steps]
    return str(last) + "".join(str(value % 10) for value in reversed(units))


def written(steps: list[Step]) -> str:
    """The whole answer, `3*6+0=18;...#2838`."""
    return "".join(f"{s.digit}*{s.multiplier}+{s.carry}={s.value};" for s in steps) + "#" + product(steps)


@lru_cache
def pairs(split: Literal["train"] | Split, digits: int) -> tuple[Pair, ...]:
    """Every question of one split with so many digits, in the order of a hash: three fifths are for training."""
    keys = {
        (a, b): derive("arithmetic", f"{a}*{b}=") for a in range(10 ** (digits - 1), 10**digits) for b in range(2, 10)
    }
    return tuple(sorted((pair for pair, key in keys.items() if TENTHS[key % 10] == split), key=keys.__getitem__))


def prompt(multiplicand: int, multiplier: int) -> "Prompt":
    """The question, its answer and its worked answer."""
    from potstill.types import Prompt

    text = f"{multiplicand}*{multiplier}"
    return Prompt(
        id=f"arithmetic/{text}",
        messages=({"role": "user", "content": f"{text}="},),
        answer=str(multiplicand * multiplier),
        completion=written(work(multiplicand, multiplier)),
        meta={"digits": len(str(multiplicand))},
    )


class Arithmetic(Task, frozen=True):
    """Multiplications of numbers of `digits` digits, each as likely as the other, by one of 2 .. 9."""

    kind: Literal["arithmetic"] = "arithmetic"
    digits: tuple[int, ...] = (2, 3, 4)
    """Lengths of the multiplicand. The bundled models have seen 2, 3 and 4."""

    @field_validator("digits")
    @classmethod
    def _known(cls, digits: tuple[int, ...]) -> tuple[int, ...]:
        if not digits or len(set(digits)) < len(digits) or not set(digits) <= {2, 3, 4, 5}:
            raise ValueError(
                f"digits = {list(digits)}: the multiplicand has 2, 3, 4 or 5 digits, each named once; write digits = [2, 3, 4]"
            )
        return digits

    def draw(self, seed: int, step: int, count: int) -> "list[Prompt]":
        """`count` different training prompts; see `Task.draw`."""
        rng = random.Random(derive("arithmetic", "draw", seed, step))
        wanted = rng.choices(self.digits, k=count)
        chosen = {d: iter(self._first("train", d, wanted.count(d), rng)) for d in self.digits}
        return [prompt(*next(chosen[d])) for d in wanted]

    def questions(self, split: Split, count: int) -> "list[Prompt]":
        """The first `count` questions, the lengths taking turns; see `Task.questions`."""
        turns = list(islice(cycle(self.digits), count))
        chosen = {d: iter(self._first(split, d, turns.count(d))) for d in self.digits}
        return [prompt(*next(chosen[d])) for d in turns]

    def verifier(self) -> Exact:
        """The digits behind the last `#`, to the end."""
        return Exact(pattern=r"#(\d+)$")

    def _first(
        self, split: Literal["train"] | Split, digits: int, count: int, rng: random.Random | None = None
    ) -> list[Pair]:
        """The first `count` pairs of a split, or as many random ones."""
        pool = pairs(split, digits)
        if count > len(pool):
            raise DataError(
                f"{count} {split} prompts of {digits} digits were asked for, but there are {len(pool)} "
                f"(digits = {list(self.digits)} are equally frequent); ask for fewer, or leave {digits} out of `digits`"
            )
        return rng.sample(pool, count) if rng else list(pool[:count])
