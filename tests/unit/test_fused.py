"""The one-pass divergence is the readable one: values and gradients, whatever beta, where the teacher rules tokens out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from potstill.divergence import jsd
from potstill.learners.fused import matched

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
numbers = st.lists(st.floats(-8, 8), min_size=5, max_size=5).map(lambda x: torch.tensor(x, dtype=torch.float64))


def both(z: Tensor, t: Tensor, beta: float, upstream: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(value, gradient) of the definition and of the fast one."""
    out = []
    for fast in (False, True):
        here = z.clone().requires_grad_()
        value = matched(here, here.detach().log_softmax(-1), t, beta) if fast else jsd(here, t, beta)
        (value * upstream).sum().backward()
        assert here.grad is not None
        out.append((value.detach(), here.grad))
    return out


@pytest.mark.parametrize("beta", BETAS)
@given(z=numbers, t=numbers, g=st.floats(-3, 3))
def test_value_and_gradient_are_those_of_the_definition(beta: float, z: Tensor, t: Tensor, g: float) -> None:
    (value, gradient), (fast, slope) = both(z, t.log_softmax(-1), beta, torch.tensor(g, dtype=torch.float64))
    torch.testing.assert_close(fast, value, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(slope, gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5])
def test_a_token_that_the_teacher_rules_out_is_no_nan(beta: float) -> None:
    t = torch.tensor([[0.2, -math.inf, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).log_softmax(-1)
    z = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (value, gradient), (fast, slope) = both(z, t, beta, torch.tensor([1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(fast, value)
    torch.testing.assert_close(slope, gradient)


@pytest.mark.parametrize("beta", BETAS)
def test_in_float32_over_a_large_vocabulary_it_is_as_exact_as_the_definition(beta: float) -> None:
    made = torch.Generator().manual_seed(1)
    z, t = (4 * torch.randn(8, 50_000, generator=made) for _ in range(2))
    value, gradient = both(z.double(), t.double().log_softmax(-1), beta, torch.ones(8, dtype=torch.float64))[0]
    found = both(z, t.log_softmax(-1), beta, torch.ones(8))
    readable, fast = (((g.double() - gradient).norm() / gradient.norm()).item() for _, g in found)
    assert fast < 1.5 * readable < 1e-3
    torch.testing.assert_close(found[1][0].double(), value, atol=0, rtol=1e-5)


def test_the_far_ends_do_not_overflow() -> None:
    z = torch.tensor([[300.0, 0.0, -300.0]])
    t = torch.tensor([[-300.0, 0.0, 300.0]]).log_softmax(-1)
    for beta in BETAS:
        value, gradient = both(z, t, beta, torch.ones(1))[1]
        assert value.isfinite().all()
        assert gradient.isfinite().all()
