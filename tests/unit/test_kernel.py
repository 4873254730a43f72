"""The CUDA kernel is the readable definition: on a GPU, or where Triton is installed without one by its interpreter."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.divergence import jsd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(scope="module")
def kernel() -> Any:
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA; without a GPU: pip install triton")
    from potstill.learners import kernel

    return kernel


def defined(z: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Value and gradient of the definition in float64."""
    here = z.double().requires_grad_()
    value = jsd(here, t.double(), beta)
    [gradient] = torch.autograd.grad(value.sum(), here)
    return value.detach(), gradient


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(1, 3, 23), (7, 4096), (2, 5000)])
def test_value_and_gradient_are_those_of_the_definition(kernel: Any, shape: tuple[int, ...], beta: float) -> None:
    made = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(shape, generator=made) for _ in range(2))
    t = t.log_softmax(-1)
    value, gradient = defined(z, t, beta)
    fast, slope = kernel.matched(z.log_softmax(-1).to(DEVICE), t.to(DEVICE), beta)
    torch.testing.assert_close(fast.cpu().double(), value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slope.cpu().double(), gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5])
def test_a_token_that_the_teacher_rules_out_is_no_nan(kernel: Any, beta: float) -> None:
    t = torch.tensor([[0.2, -math.inf, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    value, gradient = defined(z, t, beta)
    fast, slope = kernel.matched(z.log_softmax(-1).to(DEVICE), t.to(DEVICE), beta)
    torch.testing.assert_close(fast.cpu().double(), value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(slope.cpu().double(), gradient, atol=1e-6, rtol=1e-4)


def test_the_far_ends_do_not_overflow(kernel: Any) -> None:
    z = torch.tensor([[300.0, 0.0, -300.0]], device=DEVICE).log_softmax(-1)
    for beta in BETAS:
        assert all(found.isfinite().all() for found in kernel.matched(z, z.flip(-1), beta))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_it_compiles_for_a_device_that_is_not_there(kernel: Any, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes more than the compiler does. Hopper, in another process: this one may be the interpreter's."""
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from potstill.learners.kernel import _row
types = dict(logp="*fp32", teacher_logp="*fp32", value="*fp32", gradient="*fp32", V="i32", BETA="constexpr", BLOCK="constexpr")
source = ASTSource(_row, types, dict(BETA={beta}, BLOCK=4096))
print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 10_000


def test_nothing_is_nothing(kernel: Any) -> None:
    value, gradient = kernel.matched(*torch.empty(2, 0, 5, device=DEVICE), 0.5)
    assert (value.shape, gradient.shape) == ((0,), (0, 5))


def test_the_loss_uses_it_on_cuda(kernel: Any) -> None:
    if DEVICE == "cpu":
        pytest.skip("no GPU")
    from potstill.learners.fused import matched

    z = torch.randn(4, 50_000, device=DEVICE, requires_grad=True)
    t = torch.randn(4, 50_000, device=DEVICE).log_softmax(-1)
    up = torch.randn(4, device=DEVICE)
    (matched(z, z.detach().log_softmax(-1), t, 0.5) * up).sum().backward()
    _, gradient = defined(z.detach().cpu(), t.cpu(), 0.5)
    assert z.grad is not None
    torch.testing.assert_close(z.grad.cpu().double(), gradient * up.cpu()[:, None], atol=1e-6, rtol=1e-4)
