"""Every method's expected gradient against autograd of its stated objective, by listing all answers of a table."""

import math

import pytest
import torch
from tests.tabular import (
    ANSWERS,
    LETTERS,
    Tabular,
    V,
    double,
    expected_gradient,
    probability,
    rollout,
    rows,
    scored,
    table,
)

from potstill import divergence as D
from potstill.batch import collate
from potstill.errors import TeacherError
from potstill.methods.omniopd import OmniOPD
from potstill.methods.opd import OPD
from potstill.methods.sampled_kl import SampledKL
from potstill.methods.sft import SFT
from potstill.types import Ask, Feedback, Reviewed

THETA, TEACHER, START = table(0), table(1), table(2)


def gradient_of(objective) -> torch.Tensor:
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(objective(theta), theta)[0]


def close(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)
    assert want.abs().max() > 1e-3  # a comparison of zeros would prove nothing


def over_prefixes(per_prefix: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """sum over steps of E_{h ~ pi} of one number per prefix, the prefix distribution held fixed."""
    first = theta[0].softmax(-1).detach()
    return per_prefix[0] + (first * per_prefix[1:]).sum()


def divergence(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """D_beta from its definition, by probabilities."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    if beta in (0, 1):
        return (t * (t / s).log()).sum(-1) if beta == 0 else (s * (s / t).log()).sum(-1)
    m = beta * t + (1 - beta) * s
    return (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("hot", "cold"), [(1.0, 1.0), (2.0, 0.7)])
def test_opd_is_the_divergence_at_the_students_prefixes(beta, hot, cold):
    method = OPD(beta=beta, teacher_temperature=hot, student_temperature=cold)
    got = expected_gradient(method, THETA, lambda ask: scored(ask, TEACHER))
    close(got, gradient_of(lambda th: over_prefixes(divergence(th / cold, TEACHER / hot, beta), th)))


def test_opd_top_k_compares_the_rest_as_one_token():
    got = expected_gradient(OPD(beta=1.0, top_k=1), THETA, lambda ask: scored(ask, TEACHER))

    def objective(th):
        p, q = th.softmax(-1), TEACHER.softmax(-1)
        top = q.argmax(-1, keepdim=True)
        p1, q1 = p.gather(-1, top)[:, 0], q.gather(-1, top)[:, 0]
        return over_prefixes(p1 * (p1 / q1).log() + (1 - p1) * ((1 - p1) / (1 - q1)).log(), th)

    close(got, gradient_of(objective))


def test_opd_top_k_of_the_whole_vocabulary_is_the_full_divergence():
    full = expected_gradient(OPD(beta=0.5), THETA, lambda ask: scored(ask, TEACHER))
    close(expected_gradient(OPD(beta=0.5, top_k=V), THETA, lambda ask: scored(ask, TEACHER)), full, atol=1e-5)


def sequence_kl(theta: torch.Tensor) -> torch.Tensor:
    logs = [(probability(theta, y), rows(theta, y), rows(TEACHER, y), torch.tensor(y)[:, None]) for y in ANSWERS]
    return sum(p * (a.gather(-1, i).sum() - b.gather(-1, i).sum()) for p, a, b, i in logs)


def test_sampled_kl_with_gamma_1_is_the_kl_between_whole_answers():
    close(expected_gradient(SampledKL(gamma=1.0), THETA, lambda ask: scored(ask, TEACHER)), gradient_of(sequence_kl))


def test_sampled_kl_with_gamma_0_is_the_kl_at_fixed_prefixes():
    got = expected_gradient(SampledKL(gamma=0.0), THETA, lambda ask: scored(ask, TEACHER))
    close(got, gradient_of(lambda th: over_prefixes(D.reverse_kl(th, TEACHER), th)))


def test_sampled_kl_with_gamma_one_half_counts_what_follows_by_half():
    got = expected_gradient(SampledKL(gamma=0.5), THETA, lambda ask: scored(ask, TEACHER))

    def objective(th):  # the future term is the difference between the two limits
        fixed = over_prefixes(D.reverse_kl(th, TEACHER), th)
        return fixed + 0.5 * (sequence_kl(th) - fixed)

    close(got, gradient_of(objective))


def test_sampled_kl_drops_raised_tokens_whose_ratio_is_over_the_clip():
    y = (0, 1)
    second = rows(THETA, y)[1, 1].item()
    old = rollout(THETA, y, old_logp=(-5.0, second))  # pi_theta / pi_old far above 1 on the first token only
    method = SampledKL(limit=20.0)
    said = Feedback(ask=method.asks(old)[0], teacher="t", sampled=torch.tensor([-1.0, -0.5]).numpy())
    [target] = method.targets([Reviewed(rollout=old, feedback=(said,))])
    theta = THETA.clone().requires_grad_()
    loss, metrics = method.loss(Tabular(theta, [y]), double(collate([target])))
    gradient = torch.autograd.grad(loss, theta)[0]
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().max() > 0
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(rows(THETA, y)[0, 0].item() + 5.0))


def test_sft_is_the_likelihood_of_what_the_teacher_writes():
    theta = THETA.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for y in ANSWERS:
        [target] = SFT().targets([Reviewed(rollout=rollout(TEACHER, y, author="teacher"))])
        batch = double(collate([target]))
        total = total + probability(TEACHER, y) * SFT().loss(Tabular(theta, [y]), batch)[0] * batch.n_tokens
    got = torch.autograd.grad(total, theta)[0]
    first = TEACHER[0].softmax(-1)
    want = gradient_of(lambda th: (kl := D.forward_kl(th, TEACHER))[0] + (first * kl[1:]).sum())
    close(got, want)


# --- OmniOPD --------------------------------------------------------------------------------------------------------

OMNI = OmniOPD(chunks=1, chunk_length=1, continuations=2, similarity="exact", alpha=1.0, beta=0.1)


def writes(ask: Ask) -> Feedback:
    """Two fixed continuations: the first two letters, whatever was asked."""
    return Feedback(ask=ask, teacher="table", texts=(LETTERS[0], LETTERS[1]))


def test_omniopd_is_equation_8():
    """Plain re-computation: the anchor is the step of larger entropy, w = (k + alpha pi_bar) / (N + alpha)."""
    got = expected_gradient(OMNI, THETA, writes, reference=START)
    theta = THETA.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for y in ANSWERS:
        logp, ref = rows(theta, y), rows(START, y)
        entropy = -(logp.exp() * logp).sum(-1)
        audited = int(entropy[1] > entropy[0])
        other = 1 - audited
        k = sum(letter == LETTERS[y[audited]] for letter in LETTERS[:2])
        w = ((k + logp[audited, y[audited]].exp()) / 3).detach()
        chunk = -w * logp[audited, y[audited]]
        drift = (ref[other].exp() * (ref[other] - logp[other])).sum()
        total = total + probability(theta, y).detach() * (chunk + 0.1 * drift)
    close(got, torch.autograd.grad(total, theta)[0])


def audited_target(texts=("ab", "ax"), method=None):
    method = method or OmniOPD(chunks=1, chunk_length=2, continuations=2, similarity="edit", alpha=1.0, beta=0.1)
    written = rollout(
        THETA,
        (0, 1),
        response_ids=(0, 1, 2),
        pieces=("a", "b", "c"),
        old_logp=(-1.0, -3.0, -1.0),
        entropy=(2.0, 1.0, 0.0),
    )
    [ask] = method.asks(written)
    said = Feedback(ask=ask, teacher="t", texts=texts)
    return method, method.targets([Reviewed(rollout=written, feedback=(said,))])[0]


def test_omniopd_by_hand():
    _, target = audited_target()  # phi = 1 and 1/2; pi_bar = exp(mean(-1, -3)) = e^-2
    w = (1.5 + math.exp(-2)) / 3
    torch.testing.assert_close(target.advantage, torch.tensor([w, w, 0.0]))
    assert target.weight.tolist() == [1, 1, 0]
    assert target.anchor is not None
    assert target.anchor.tolist() == [0, 0, 1]
    [audit] = target.audits
    assert (audit.start, audit.length, audit.text, audit.similarity) == (0, 2, "ab", (1.0, 0.5))
    assert not target.advantage.requires_grad


def test_omniopd_divides_both_terms_by_one_count():
    method, target = audited_target()
    lp = torch.randn(1, 3, V, dtype=torch.float64).log_softmax(-1).requires_grad_()
    ref = torch.randn(1, 3, V, dtype=torch.float64).log_softmax(-1)

    class Fixed(Tabular):
        def __init__(self, logp, reference=None):
            super().__init__(logp, [], reference)
            self.all = logp

    loss, metrics = method.loss(Fixed(lp, Fixed(ref)), double(collate([target])))
    w = target.advantage[0].double()
    chunk = -w * (lp[0, 0, 0] + lp[0, 1, 1])
    drift = (ref[0, 2].exp() * (ref[0, 2] - lp[0, 2])).sum()
    torch.testing.assert_close(loss, (chunk + 0.1 * drift) / 3)
    torch.testing.assert_close(metrics["chunk_loss"] + 0.1 * metrics["reference_kl"], loss.detach())


def test_omniopd_at_the_reference_has_no_drift():
    silent = OMNI.model_copy(update={"alpha": 0.0})
    none = expected_gradient(
        silent, THETA, lambda ask: Feedback(ask=ask, teacher="t", texts=("?", "?")), reference=THETA
    )
    assert none.abs().max() < 1e-9  # k_sem = 0 and alpha = 0 leave only the KL term, and it is at its minimum


def test_omniopd_anchors_what_is_too_short_to_audit():
    method = OmniOPD(chunk_length=5)
    short = rollout(THETA, (0, 1))
    assert method.asks(short) == []
    [target] = method.targets([Reviewed(rollout=short)])
    assert target.weight.tolist() == [0, 0]
    assert target.anchor is not None
    assert target.anchor.tolist() == [1, 1]


def test_omniopd_refuses_missing_continuations():
    with pytest.raises(TeacherError, match="1 of 2 continuations"):
        audited_target(texts=("ab",))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_a_teacher_that_is_the_student_teaches_nothing(beta):
    got = expected_gradient(OPD(beta=beta), THETA, lambda ask: scored(ask, THETA))
    assert got.abs().max() < 1e-6
    written = rollout(THETA, (0, 1))
    [target] = OPD(beta=beta).targets([Reviewed(rollout=written, feedback=(scored(OPD().asks(written)[0], THETA),))])
    assert OPD(beta=beta).loss(Tabular(THETA, [(0, 1)]), double(collate([target])))[0].abs() < 1e-6
