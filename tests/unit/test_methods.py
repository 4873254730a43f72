"""What the methods promise beyond their gradients, which are in test_gradients.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tabular import ANSWERS, T, Tabular, V, double, expected_gradient, probability, rollout, rows, scored, table

from potstill.batch import collate
from potstill.methods.omniopd import OmniOPD
from potstill.methods.opd import OPD
from potstill.methods.sampled_kl import SampledKL
from potstill.types import Feedback, Reviewed, Target

THETA, TEACHER, START = table(0), table(1), table(2)


def test_top_k_cannot_go_with_a_temperature() -> None:
    """The rest bucket at temperature T would need every token that was left out."""
    with pytest.raises(ValueError, match="top_k cannot go with a temperature"):
        OPD(top_k=4, teacher_temperature=2.0)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_top_1_compares_two_coins(beta: float) -> None:
    """With one token in view there are two buckets, so the divergence is one between two coins."""
    got = expected_gradient(OPD(beta=beta, top_k=1), THETA, lambda ask: scored(ask, TEACHER))

    def coin(p: torch.Tensor) -> torch.Tensor:
        return torch.stack([p, 1 - p], -1)

    theta = THETA.clone().requires_grad_()
    top = TEACHER.argmax(-1, keepdim=True)
    s, t = (coin(x.softmax(-1).gather(-1, top)[:, 0]) for x in (theta, TEACHER))
    m = beta * t + (1 - beta) * s

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(-1)

    per_prefix = {0.0: kl(t, s), 1.0: kl(s, t)}.get(beta, beta * kl(t, m) + (1 - beta) * kl(s, m))
    first = THETA[0].softmax(-1)
    want = torch.autograd.grad(per_prefix[0] + (first * per_prefix[1:]).sum(), theta)[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("gamma", "clip"), [(0.0, 1.0), (0.5, 0.2), (1.0, 1e9)])
def test_sampled_kl_off_policy_is_the_clipped_importance_ratio(gamma: float, clip: float) -> None:
    """Answers of an older policy, all of them listed: a raised token earns no more above 1 + clip."""
    method, old = SampledKL(gamma=gamma, clip_high=clip, clip_low=0.999, dual_clip=1e9, limit=1e9), THETA
    new = (THETA + 0.7 * table(5)).requires_grad_()
    got, want = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    over = 0
    for y in ANSWERS:
        written, p = rollout(old, y), probability(old, y)
        [target] = method.targets([Reviewed(rollout=written, feedback=(scored(method.asks(written)[0], TEACHER),))])
        batch = double(collate([target]))
        got = got + p * method.loss(Tabular(new, [y]), batch)[0] * T
        token = [int(y[0]), int(y[1])]
        d = [(rows(TEACHER, y) - rows(old, y))[t, token[t]].item() for t in range(T)]
        ratio = [(rows(new, y) - rows(old, y))[t, token[t]].exp() for t in range(T)]
        for r, a in zip(ratio, (d[0] + gamma * d[1], d[1]), strict=True):
            over += a > 0 and r.item() > 1 + clip
            want = want - p * a * (r.clamp(max=1 + clip) if a > 0 else r)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(got, new)[0], torch.autograd.grad(want, new)[0], atol=1e-6, rtol=1e-6
    )
    assert (over > 0) == (clip < 10)


def audited(texts: tuple[str, ...], *, alpha: float = 1.0, overlap: str = "skip") -> tuple[OmniOPD, Target]:
    method = OmniOPD(chunks=2, chunk_length=2, continuations=2, alpha=alpha, beta=0.3, overlap=overlap)  # type: ignore[arg-type]
    written = rollout(
        THETA,
        (0, 1),
        response_ids=(0, 1, 2, 0, 1, 2),
        pieces=("a", "b", "c", "a", "b", "c"),
        old_logp=(-1.0, -3.0, -1.0, -0.5, -0.5, -2.0),
        entropy=(2.0, 1.0, 0.0, 1.5, 0.2, 0.1),
    )
    said = tuple(Feedback(ask=ask, teacher="t", texts=texts) for ask in method.asks(written))
    return method, method.targets([Reviewed(rollout=written, feedback=said[::-1])])[0]  # in whatever order they arrive


@given(st.text("abc", max_size=4), st.text("abc ", max_size=4), st.floats(0, 5))
def test_omniopd_targets_are_constants_between_0_and_1(a: str, b: str, alpha: float) -> None:
    _, target = audited((a, b), alpha=alpha)
    assert target.advantage is not None
    assert not target.advantage.requires_grad
    assert ((target.advantage >= 0) & (target.advantage <= 1)).all()
    assert target.anchor is not None
    assert torch.equal(target.weight + target.anchor, torch.ones(6))


def test_omniopd_is_the_sum_over_tokens_of_chunk_term_and_anchor() -> None:
    method, target = audited(("ab", "ax"))
    assert target.weight.tolist() == [1, 1, 0, 1, 1, 0]
    assert target.advantage is not None
    logp, ref = (torch.randn(1, 6, V, dtype=torch.float64).log_softmax(-1) for _ in range(2))

    class Fixed(Tabular):
        def __init__(self, logp: torch.Tensor, reference: "Fixed | None" = None):
            super().__init__(THETA, [], reference)
            self.all = logp

    loss, metrics = method.loss(Fixed(logp, Fixed(ref)), double(collate([target])))
    matrix = []
    for t, token in enumerate(target.rollout.response_ids):
        if t in (2, 5):
            matrix.append(0.3 * sum(ref[0, t, v].exp() * (ref[0, t, v] - logp[0, t, v]) for v in range(V)))
        else:
            matrix.append(-target.advantage[t].double() * logp[0, t, token])
    torch.testing.assert_close(loss, sum(matrix) / 6, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(metrics["chunk_loss"] * 6, matrix[0] + matrix[1] + matrix[3] + matrix[4])
    at_start, there = method.loss(Fixed(ref, Fixed(ref)), double(collate([target])))
    assert there["reference_kl"].abs() < 1e-12
    torch.testing.assert_close(at_start, there["chunk_loss"])


def test_omniopd_weighs_a_merged_chunk_by_its_own_length() -> None:
    method = OmniOPD(chunks=2, chunk_length=2, continuations=1, overlap="merge", similarity="exact")
    written = rollout(
        THETA,
        (0, 1),
        response_ids=(0, 1, 2, 0),
        pieces=("a", "b", "c", "a"),
        old_logp=(-1.0, -2.0, -3.0, -9.0),
        entropy=(2.0, 1.5, 0.0, 0.0),
    )
    [ask] = method.asks(written)
    assert (ask.start, ask.length) == (0, 3)
    [target] = method.targets(
        [Reviewed(rollout=written, feedback=(Feedback(ask=ask, teacher="t", texts=(" abc\n",)),))]
    )
    [audit] = target.audits
    assert audit.k_sem == 1
    assert audit.pi_bar == pytest.approx(torch.tensor(-2.0).exp().item())
    assert target.weight.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("method", [OPD(), SampledKL()])
def test_an_empty_answer_is_neither_asked_about_nor_learnt_from(method: OPD | SampledKL) -> None:
    empty = rollout(THETA, (0, 1), response_ids=(), pieces=(), old_logp=(), entropy=())
    assert method.asks(empty) == []
    assert method.targets([Reviewed(rollout=empty)]) == []
