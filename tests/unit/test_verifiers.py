"""What counts as an answer, and as a right one."""

import threading

import pytest
from pydantic import ValidationError

from potstill.errors import DataError
from potstill.types import Prompt, Rollout
from potstill.verifiers import Exact, Math, Verifier


def prompt(answer: str | None, **meta: object) -> Prompt:
    return Prompt(id="q-1", messages=({"role": "user", "content": "?"},), answer=answer, meta=meta)


def written(text: str, answer: str, finish: str = "stop") -> Rollout:
    ids = tuple(range(len(text)))
    return Rollout(
        prompt=prompt(answer),
        sample=0,
        prompt_ids=(1,),
        response_ids=ids,
        pieces=tuple(text),
        finish=finish,  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (None, "  12\n", "12"),
        (None, " \n", None),
        (r"#### (.+)", "#### 3\nno:\n#### 12 ", "12"),  # the last one
        (r"#### (.+)", "12", None),
        (r"= ?(\d*)", "so =", None),  # an empty group is no answer
        (r"a(b)?", "a", None),  # a group that took no part
        (r"(\d+) (\w+)", "12 apples", "12"),  # the first group
    ],
)
def test_exact_extracts(pattern: str | None, text: str, expected: str | None) -> None:
    assert Exact(pattern=pattern).extract(text) == expected


def test_exact_compares_strings() -> None:
    assert Exact().score("12", prompt(" 12 ")) == 1
    assert Exact().score("12.0", prompt("12")) == 0


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), (r"\d+", "has no group")])
def test_a_pattern_that_cannot_work_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Exact(pattern=pattern)


@pytest.mark.parametrize("verifier", [Exact(), Math()])
def test_only_the_text_counts(verifier: Verifier) -> None:
    assert verifier(written("12", "12")) == 1
    assert verifier(written("12", "12", finish="length")) == 1
    assert verifier(written("13", "12")) == 0
    assert verifier(written("", "12")) == 0


@pytest.mark.parametrize("verifier", [Exact(), Math()])
def test_a_prompt_without_an_answer_is_named(verifier: Verifier) -> None:
    with pytest.raises(DataError, match=r"prompt 'q-1' has no answer \(its other columns: solution\)"):
        verifier.score("12", prompt(None, solution="12"))


MATH = [
    (r"so it is \boxed{\frac{1}{2}}.", "0.5", 1),
    (r"\boxed{3} then 9", "3", 1),  # the box comes before what follows it
    (r"\boxed{3} or \boxed{4}", "4", 0),  # two guesses are no answer
    (r"\boxed{3} and \boxed{4}", r"\{3, 4\}", 1),
    ("The answer is 1,234.", "1234", 1),
    ("We get 12 and then 17.", "17", 1),
    ("We get 12 and then 17.", "12", 0),
    (r"\boxed{2\sqrt{2}}", r"$\sqrt{8}$", 1),
    (r"\boxed{x^2+2x+1}", r"(x+1)^2", 1),
    (r"\boxed{\{1,2\}}", r"\boxed{\{2,1\}}", 1),
    ("no number at all", "12", 0),
]


@pytest.mark.parametrize(("text", "answer", "expected"), MATH)
def test_math_compares_meaning(text: str, answer: str, expected: int) -> None:
    assert Math()(written(text, answer)) == expected


def test_math_extracts_what_stood_there() -> None:
    assert Math().extract(r"so it is \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert Math().extract("no number at all") is None


def test_math_works_outside_the_main_thread() -> None:
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(Math()(written("it is 12", "12"))))
    thread.start()
    thread.join()
    assert scores == [1]


def test_math_refuses_a_reference_that_is_no_mathematics() -> None:
    with pytest.raises(DataError, match=r"'q-1'.*cannot be read as mathematics"):
        Math().score("12", prompt(" "))
