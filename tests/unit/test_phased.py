"""The schedule of teacher answers, and how the sampler keeps to it."""

import asyncio
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.tabular import LETTERS

from potstill.phased import Phased
from potstill.samplers.phased import PhasedSampler
from potstill.types import Prompt, Rollout, Turn, Usage

exactly = settings(derandomize=True, database=None)
share = st.floats(0, 1, width=16)
phases = st.tuples(share, share).map(sorted)


@exactly
@given(share, phases, st.lists(share, min_size=2))
def test_the_schedule_falls_from_its_share_to_nothing(most, ends, points):
    how = Phased(share=most, flat=ends[0], end=ends[1])
    values = [how.rho(x) for x in sorted(points)]
    assert values == sorted(values, reverse=True)
    assert all(0 <= v <= most for v in values)
    assert how.rho(1.0) == 0
    assert ends[0] == 0 or how.rho(0.0) == most


def test_the_schedule_by_hand():
    how = Phased(share=0.5, flat=0.1, end=0.4)
    assert [how.rho(x) for x in (0.0, 0.0999, 0.25, 0.4, 0.9)] == pytest.approx([0.5, 0.5, 0.25, 0, 0])
    assert how.rho(0.1) == 0.5  # no jump where the cosine starts
    assert how.rho(0.2) == pytest.approx(0.25 * (1 + math.cos(math.pi / 3)))


def test_phases_out_of_order_are_refused():
    with pytest.raises(ValidationError, match=r"flat = 0\.5 lies behind end = 0\.2"):
        Phased(share=1.0, flat=0.5, end=0.2)


def test_a_half_prompt_is_a_prompt():
    """Python rounds 0.5 to 0 and 1.5 to 2."""
    for share_, prompts in ((0.125, 1), (0.25, 1), (0.375, 2), (0.5, 2)):
        assert len(drawn(Phased(share=share_, tries=1), "bc")[2].asked) == prompts


class Writer:
    """Writes `texts` for every prompt, one after the other, as `author`; a guide is put in front."""

    def __init__(self, author: str, *texts: str):
        self.author, self.texts = author, texts
        self.asked: list[str] = []

    async def sample(
        self, prompts: Sequence[Prompt], n: int, turn: Turn, *, guides: Sequence[tuple[int, ...]] = ()
    ) -> list[list[Rollout]]:
        self.asked = [p.id for p in prompts]
        guides = guides or [()] * len(prompts)
        return [[self.write(p, i, turn, guide) for i in range(n)] for p, guide in zip(prompts, guides, strict=True)]

    def write(self, prompt: Prompt, i: int, turn: Turn, guide: tuple[int, ...]) -> Rollout:
        ids = guide + tuple(map(LETTERS.index, self.texts[i % len(self.texts)]))
        return Rollout(
            prompt=prompt,
            sample=i,
            author=self.author,
            prompt_ids=(0,),
            response_ids=ids,
            pieces=tuple(LETTERS[j] for j in ids),
            finish="stop" if len(ids) < turn.max_tokens else "length",
            guided=len(guide),
            usage=Usage(read=1, written=len(ids)) if self.author == "teacher" else Usage(),
        )


def right_if_it_ends_in_c(rollout: Rollout) -> float:
    return float(rollout.text().endswith("c"))


PROMPTS = [Prompt(id=str(i), messages=()) for i in range(4)]


def drawn(how: Phased, *texts: str, done: float = 0.0, n: int = 1) -> tuple[list[list[Rollout]], Writer, Writer]:
    student, teacher = Writer("student", "ab"), Writer("teacher", *texts)
    sampler = PhasedSampler(student, teacher, right_if_it_ends_in_c, how)
    groups = asyncio.run(sampler.sample(PROMPTS, n, Turn(seed=0, step=1, done=done, max_tokens=9)))
    assert [group[0].prompt.id for group in groups] == [p.id for p in PROMPTS]
    return groups, student, teacher


def test_right_answers_of_the_teacher_take_the_place_of_the_students():
    groups, student, teacher = drawn(Phased(share=0.5, tries=3), "aa", "bc", "cc")
    assert [[r.author for r in group] for group in groups] == [["teacher"], ["teacher"], ["student"], ["student"]]
    assert groups[0][0].text() == "bc"  # the first right one
    assert (teacher.asked, student.asked) == (["0", "1"], ["2", "3"])


def test_a_group_takes_as_many_right_answers_as_it_has_room_for():
    groups, _, _ = drawn(Phased(share=0.25, tries=4), "ac", "aa", "bc", "cc", n=2)
    assert [r.text() for r in groups[0]] == ["ac", "bc"]
    assert [r.author for r in groups[1]] == ["student", "student"]


def test_where_the_teacher_is_wrong_the_student_writes():
    groups, student, _ = drawn(Phased(share=0.5, tries=2), "aa", "bb")
    assert [group[0].author for group in groups] == ["student"] * 4
    assert student.asked == ["0", "1", "2", "3"]


def test_unfinished_and_looping_answers_are_rejected():
    groups, _, _ = drawn(Phased(share=1.0, tries=1), "abababc"[:7] + "ac")  # 9 tokens: as long as allowed
    assert groups[0][0].author == "student"
    loop = "aaaaaaac"
    assert drawn(Phased(share=1.0, tries=1, max_repetition=0.5), loop)[0][0][0].author == "student"
    assert drawn(Phased(share=1.0, tries=1, max_repetition=0.7), loop)[0][0][0].author == "teacher"


@pytest.mark.parametrize("texts", [("aa", "bc"), ("aa", "bb"), ("bc", "bc")])
def test_rejected_tries_are_paid_for_and_counted_once(texts):
    groups, _, _ = drawn(Phased(share=0.5, tries=2), *texts, n=2)
    for group in groups[:2]:
        assert sum(r.usage.written for r in group) == 4
        assert sum(r.tries for r in group) == 2
        assert sum(r.right for r in group) == texts.count("bc")
    assert all(r.usage == Usage() and r.tries == 0 for group in groups[2:] for r in group)


def test_the_teacher_is_asked_as_often_as_the_schedule_says():
    how = Phased(share=1.0, flat=0.1, end=0.4, tries=1)
    assert [len(drawn(how, "bc", done=x)[2].asked) for x in (0.0, 0.175, 0.25, 0.325)] == [4, 3, 2, 1]


def test_after_the_last_phase_the_teacher_is_not_asked():
    groups, _, teacher = drawn(Phased(share=1.0), "bc", done=0.4)
    assert teacher.asked == []
    assert {r.author for group in groups for r in group} == {"student"}


def test_a_prefix_is_the_beginning_of_a_right_answer():
    groups, _, teacher = drawn(Phased(share=0.5, tries=2, mode="prefix"), "aaaa", "ababc", n=2)
    assert teacher.asked == ["0", "1", "2", "3"]
    assert all(r.author == "student" and r.guided == 2 and r.text() == "abab" for group in groups for r in group)
    assert drawn(Phased(share=0.5, mode="prefix"), "aaaa")[0][0][0].guided == 0  # no right answer: from nothing
