"""Targets to one padded batch, and the one divisor."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.batch import collate, count_tokens, info_means
from potstill.types import Prompt, Reviewed, Rollout, Target


def target(
    length: int, weight: list[float] | None = None, *, prompt: int = 1, old: bool = True, **fields: Any
) -> Target:
    ids = tuple(range(1, length + 1))
    r = Rollout(
        prompt=Prompt(id="p", messages=()),
        sample=0,
        prompt_ids=(9,) * prompt,
        response_ids=ids,
        pieces=("x",) * length,
        old_logp=tuple(-float(i) for i in ids) if old else None,
        finish="stop",
    )
    return Target(source=Reviewed(rollout=r), weight=torch.tensor(weight or [1.0] * length), **fields)


def test_rows_are_padded_on_the_right_with_nothing() -> None:
    a = target(2, prompt=3, advantage=torch.tensor([0.5, 0.25]), anchor=torch.tensor([0.0, 1.0]))
    b = target(3, [1.0, 0.0, 2.0], advantage=torch.tensor([1.0, 2.0, 3.0]), anchor=torch.tensor([1.0, 1.0, 0.0]))
    batch = collate([a, b])
    assert batch.prompt_ids == ((9, 9, 9), (9,))
    assert batch.labels.tolist() == [[1, 2, 0], [1, 2, 3]]
    assert batch.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.weight.tolist() == [[1, 1, 0], [1, 0, 2]]
    assert batch.advantage is not None
    assert batch.anchor is not None
    assert batch.old_logp.tolist() == [[-1, -2, 0], [-1, -2, -3]]
    assert batch.advantage.tolist() == [[0.5, 0.25, 0], [1, 2, 3]]
    assert batch.anchor.tolist() == [[0, 1, 0], [1, 1, 0]]
    assert batch.teacher_ids is None
    assert batch.teacher_logp is None


def test_teacher_rows_are_padded_with_real_numbers() -> None:
    """A row of padding still goes through a divergence, whose nan would survive a weight of 0."""
    logp = torch.randn(2, 4).log_softmax(-1)
    batch = collate([target(1, teacher_logp=logp[:1]), target(2, teacher_logp=logp)])
    assert batch.teacher_logp is not None
    assert batch.teacher_logp.shape == (2, 2, 4)
    assert batch.teacher_logp.isfinite().all()


def test_what_only_some_rows_have_is_nothing_on_the_others() -> None:
    """Answers of the teacher among the student's: no old log-probs, and nobody asked about them."""
    logp, ids = torch.randn(2, 3), torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = collate(
        [target(1, old=False), target(2, teacher_ids=ids, teacher_logp=logp, imitate=torch.tensor([0.5, 0.0]))]
    )
    assert batch.old_logp.tolist() == [[0, 0], [-1, -2]]
    assert batch.teacher_ids is not None
    assert batch.teacher_logp is not None
    assert batch.imitate is not None
    assert batch.teacher_ids.tolist() == [[[0] * 3] * 2, ids.tolist()]
    assert torch.equal(batch.teacher_logp[1], logp)
    assert batch.imitate.tolist() == [[0, 0], [0.5, 0]]
    assert batch.n_rollouts == 2


def test_the_divisor_counts_tokens_that_carry_any_term_once() -> None:
    chunked = target(4, [1.0, 1.0, 0.0, 0.0], anchor=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert count_tokens([chunked]) == 4
    assert count_tokens([target(4, [1.0, 1.0, 0.0, 0.0])]) == 2
    assert count_tokens([target(3, [0.5, 0.0, -2.0]), chunked]) == 6
    assert count_tokens([target(2, [0.0, 0.0])]) == 1  # nothing to divide, and nothing to divide by
    assert collate([chunked]).n_tokens == 4
    assert count_tokens([target(3, [0.0, 1.0, 0.0], imitate=torch.tensor([1.0, 0.0, 0.0]))]) == 2
    assert collate([chunked], n_tokens=17.0).n_tokens == 17
    assert collate([chunked], n_rollouts=5).n_rollouts == 5


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=6), min_size=1, max_size=6))
def test_padding_adds_and_loses_no_weight(weights: list[list[float]]) -> None:
    made = [target(len(w), w) for w in weights]
    batch = collate(made)
    assert batch.weight.sum().item() == pytest.approx(sum(map(sum, weights)))
    assert batch.mask.sum().item() == sum(map(len, weights))
    assert batch.n_tokens == max(sum(x != 0 for w in weights for x in w), 1)


def test_info_is_averaged_over_the_tokens_it_applies_to() -> None:
    nan = math.nan
    a = target(3, info={"kl": torch.tensor([1.0, 2.0, 3.0]), "chunk": torch.tensor([nan, 4.0, nan])})
    b = target(1, info={"kl": torch.tensor([6.0]), "chunk": torch.tensor([nan])})
    assert info_means([a, b]) == {"kl": 3, "chunk": 4}
    assert info_means([b]) == {"kl": 6}
    sizes = target(3, info={"term_rms": torch.tensor([1.0, -7.0, nan])})
    assert info_means([sizes]) == {"term_rms": 5}
    assert info_means([target(1)]) == {}
