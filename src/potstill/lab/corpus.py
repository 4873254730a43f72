"""What the lab's models read in training: right and wrong workings, in one notation or in three."""

import random
from collections.abc import Callable
from typing import Literal, NamedTuple

from potstill.tasks.arithmetic import Step, pairs, product, work, written

DIGITS = (2, 3, 4)
Notation = Callable[[list[Step]], str]


class Text(NamedTuple):
    """One line to learn from."""

    question: str
    answer: str
    given: int = 0
    """Characters of the answer that are read but not learned."""


def bracketed(steps: list[Step]) -> str:
    """`(3x6+0:18)(7x6+1:43)(4x6+4:28)#2838`."""
    return "".join(f"({s.digit}x{s.multiplier}+{s.carry}:{s.value})" for s in steps) + "#" + product(steps)


def carry_first(steps: list[Step]) -> str:
    """`<0>3x6:18<1>7x6:43<4>4x6:28#2838`."""
    return "".join(f"<{s.carry}>{s.digit}x{s.multiplier}:{s.value}" for s in steps) + "#" + product(steps)


NOTATIONS: dict[Notation, float] = {written: 0.5, bracketed: 0.25, carry_first: 0.25}
"""How often the foreign model writes each. The first character tells them apart, so any prefix says how to go on."""


def question(rng: random.Random) -> tuple[int, int]:
    """A training question; each number of digits is as likely as the others."""
    return rng.choice(pairs("train", rng.choice(DIGITS)))


def plain(rng: random.Random, slips: float = 0.0) -> Text:
    """The lab's notation, learned whole; a fraction `slips` of the values is any number below 90 instead."""
    a, b = question(rng)
    steps = work(a, b, lambda value: rng.randrange(90) if rng.random() < slips else value)
    return Text(f"{a}*{b}=", written(steps))


def foreign(rng: random.Random, wrong: float = 0.4) -> Text:
    """Any notation; of those in the lab's, a fraction `wrong` goes on from somebody else's mistakes."""
    [notation] = rng.choices(list(NOTATIONS), weights=list(NOTATIONS.values()))
    a, b = question(rng)
    if notation is written and rng.random() < wrong:
        return mistaken(rng, a, b)
    return Text(f"{a}*{b}=", notation(work(a, b)))


def mistaken(rng: random.Random, multiplicand: int, multiplier: int, rate: float = 0.15) -> Text:
    """A working with mistakes of every sort, and the best way to go on behind the last of them.

    A digit or a carry may be misread, a value miscalculated, a digit of the product miscopied; what comes after
    follows from what is written.
    """

    def slip(number: int, field: Literal["digit", "carry", "value"]) -> int:
        if rng.random() >= rate:
            return number
        return rng.randrange(90 if field == "value" else 10)

    answer, given, carry = "", 0, 0
    steps: list[Step] = []
    for digit in map(int, reversed(str(multiplicand))):
        read, carried = slip(digit, "digit"), slip(carry, "carry")
        right = read * multiplier + carried
        step = Step(read, multiplier, carried, slip(right, "value"))
        parts = (f"{step.digit}", f"*{multiplier}+{step.carry}", f"={step.value}")
        for part, wrong in zip(parts, (read != digit, carried != carry, step.value != right), strict=True):
            answer += part
            given = len(answer) if wrong else given
        answer += ";"
        carry = step.value // 10
        steps.append(step)
    answer += "#"
    for figure in product(steps):
        copied = slip(int(figure), "digit")
        answer += str(copied)
        given = len(answer) if copied != int(figure) else given
    return Text(f"{multiplicand}*{multiplier}=", answer, given)
