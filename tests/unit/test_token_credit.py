"""The token-credit family: every method's expected gradient by listing all groups of answers, and their identities."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tabular import ANSWERS, T, Tabular, V, double, probability, rollout, rows, scored, table

from potstill.batch import collate
from potstill.divergence import forward_kl
from potstill.methods.exopd import ExOPD
from potstill.methods.grpd import GRPD
from potstill.methods.grpo import GRPO
from potstill.methods.mix import Mix
from potstill.methods.opdvr import OPDVR
from potstill.methods.poweropd import PowerOPD
from potstill.methods.r2opd import R2OPD
from potstill.methods.reopold import REOPOLD
from potstill.methods.rlsd import RLSD
from potstill.methods.sampled_kl import SampledKL
from potstill.methods.sgopd import SGOPD
from potstill.methods.token_credit import TokenCredit
from potstill.phased import Phased
from potstill.types import Ask, Feedback, Reviewed, Rollout, Target

THETA, TEACHER, START = table(0), table(1), table(2)
ALONE = Phased(share=0)
exactly = settings(derandomize=True, database=None)


def right(y: tuple[int, ...]) -> float:
    """The verdict on an answer."""
    return float(sum(y) % 2 == 0)


def answer(ask: Ask) -> Feedback:
    return scored(ask, START if ask.of == "reference" else TEACHER)


def reviewed(method: TokenCredit, y: tuple[int, ...], sample: int = 0, **fields: Any) -> Reviewed:
    r = rollout(THETA, y, **({"sample": sample, "seed": 10 * sample, "verdict": right(y)} | fields))
    return Reviewed(rollout=r, feedback=tuple(answer(ask) for ask in method.asks(r)))


def gradient(method: TokenCredit, size: int) -> torch.Tensor:
    """E over groups of `size` answers of the gradient of the loss times its divisor: every group, by its probability."""
    theta = THETA.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for ys in itertools.product(ANSWERS, repeat=size):
        targets = method.targets([reviewed(method, y, i) for i, y in enumerate(ys)])
        batch = double(collate(targets))
        loss, _ = method.loss(Tabular(theta, list(ys), Tabular(START, list(ys))), batch)
        chance = math.prod(probability(THETA, y).item() for y in ys)
        total = total + chance * loss * batch.n_tokens
    return torch.autograd.grad(total, theta)[0]


Credit = Callable[[float, float, float, Sequence[float], int], float]
"""(log pi_old, log pi_T, log pi_ref) of a token, all rewards of the group, the answer's place -> A_t."""


def stated(credit: Credit, size: int) -> torch.Tensor:
    """The gradient of -E sum_i sum_t A_t log pi(y_t), with A_t computed token by token in plain numbers."""
    theta = THETA.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for ys in itertools.product(ANSWERS, repeat=size):
        rewards = [right(y) for y in ys]
        chance = math.prod(probability(THETA, y).item() for y in ys)
        for i, y in enumerate(ys):
            old, teacher, ref = rows(THETA, y), rows(TEACHER, y), rows(START, y)
            logp = rows(theta, y)
            for t in range(T):
                numbers = [x[t, y[t]].item() for x in (old, teacher, ref)]
                total = total - chance * credit(*numbers, rewards, i) * logp[t, y[t]]
    return torch.autograd.grad(total, theta)[0]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert want.abs().max() > 1e-3  # a comparison of zeros would prove nothing


def normal(rewards: Sequence[float], i: int) -> float:
    """A_i with the standard deviation of a sample."""
    mean = sum(rewards) / len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return (rewards[i] - mean) / (spread + 1e-6)


def gated(lam: float, beta: float) -> Credit:
    return lambda s, t, _, rewards, i: (lam if normal(rewards, i) * (t - s) > 0 else beta) * (t - s)


def extrapolated(lam: float, beta: float) -> Credit:
    def credit(s: float, t: float, ref: float, rewards: Sequence[float], i: int) -> float:
        c = lam if normal(rewards, i) * (t - s) > 0 else beta
        return (t - s) + (c - 1) * (t - ref)

    return credit


def signed(r: float) -> float:
    return 2 * r - 1


def rlsd(s: float, t: float, _: float, rewards: Sequence[float], i: int) -> float:
    a = normal(rewards, i)
    return a * min(max(math.exp(math.copysign(1, a) * (t - s)), 0.8), 1.2)


def grpd(s: float, t: float, _: float, rewards: Sequence[float], i: int) -> float:
    a = rewards[i] - sum(rewards) / len(rewards)
    sign = (a > 0) - (a < 0)
    return abs(a) * sign * max(sign * (t - s), 0)


def opdvr(s: float, t: float, _: float, rewards: Sequence[float], i: int) -> float:
    z = signed(rewards[i])
    return z * max(z * (t - s), 0)


FLOOR = math.log(0.3 / 0.7)


CASES: dict[str, tuple[TokenCredit, int, Credit]] = {
    "sampled_kl": (SampledKL(), 1, lambda s, t, *_: t - s),
    "sgopd, scaled": (SGOPD(lam=1.8, beta=0.3, phased=ALONE), 2, gated(1.8, 0.3)),
    "sgopd, from the start": (SGOPD(reference="start", beta=0.5, phased=ALONE), 2, extrapolated(1.8, 0.5)),
    "sgopd, with the verifier": (
        SGOPD(lam=1.0, verifier=0.7, phased=ALONE),
        2,
        lambda s, t, _, rewards, i: t - s + 0.7 * normal(rewards, i),
    ),
    "sgopd, by outcome": (
        SGOPD(lam=2.0, phased=ALONE),
        1,
        lambda s, t, _, rewards, i: (2.0 if signed(rewards[i]) * (t - s) > 0 else 1.0) * (t - s),
    ),
    "exopd": (ExOPD(lam=1.25), 1, lambda s, t, ref, *_: t - s + 0.25 * (t - ref)),
    "opdvr": (OPDVR(), 1, opdvr),
    "grpd": (GRPD(), 2, grpd),
    "rlsd": (RLSD(), 2, rlsd),
    "poweropd": (PowerOPD(alpha=0.5), 1, lambda s, t, *_: math.exp(0.5 * t) - math.exp(0.5 * s)),
    "reopold, phase 1": (REOPOLD(lam=0.3, switch=1), 1, lambda s, t, *_: (t - s) * (t - s >= FLOOR)),
    "reopold, phase 2": (REOPOLD(lam=0.3, switch=0, keep=1.0), 1, lambda s, t, *_: max(t - s, FLOOR)),
    "grpo": (GRPO(), 2, lambda s, t, _, rewards, i: normal(rewards, i)),
    "mix": (Mix(alpha=0.3), 2, lambda s, t, _, rewards, i: 0.3 * (t - s) + 0.7 * normal(rewards, i)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_stated_credit(name):
    method, size, credit = CASES[name]
    close(gradient(method, size), stated(credit, size))


def test_the_gradient_of_r2opd_whose_weights_depend_on_the_whole_answer():
    theta = THETA.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for y in ANSWERS:
        d = [(rows(TEACHER, y) - rows(THETA, y))[t, y[t]].item() for t in range(T)]
        nu = min(map(abs, d))  # torch's median of two numbers is the smaller one
        w = [1 / (1 + math.exp(-2.0 * signed(right(y)) * x / nu)) for x in d]
        z = sum(map(abs, d)) / sum(a * abs(x) for a, x in zip(w, d, strict=True))
        for t in range(T):
            total = total - probability(THETA, y).item() * z * w[t] * d[t] * rows(theta, y)[t, y[t]]
    close(gradient(R2OPD(beta=2.0), 1), torch.autograd.grad(total, theta)[0])


# --- objectives in closed form --------------------------------------------------------------------------------------


def over_prefixes(per_prefix: torch.Tensor) -> torch.Tensor:
    first = THETA[0].softmax(-1)
    return per_prefix[0] + (first * per_prefix[1:]).sum()


def slope(objective: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(objective(theta), theta)[0]


def test_exopd_goes_to_the_extrapolated_teacher():
    """KL to pi_T^lam pi_ref^(1 - lam) / Z at fixed prefixes: the constant log Z has no gradient."""
    t, ref = TEACHER.log_softmax(-1), START.log_softmax(-1)
    goal = 1.25 * t - 0.25 * ref

    def objective(theta):
        s = theta.log_softmax(-1)
        return over_prefixes((s.exp() * (s - goal)).sum(-1))

    close(gradient(ExOPD(lam=1.25), 1), slope(objective))


def test_grpo_without_std_climbs_the_expected_reward():
    """With two answers A_1 = (R_1 - R_2) / 2, and both together have the gradient of E R."""

    def objective(theta):
        return -sum(probability(theta, y) * right(y) for y in ANSWERS)

    close(gradient(GRPO(std=False), 2), slope(objective))


def test_grpo_stays_near_the_start_by_an_estimate_of_the_divergence():
    """At theta = pi_old the gradient of E_old[k3] is that of KL(pi_theta || pi_ref) at fixed prefixes in k3's form."""
    with_kl, without = gradient(GRPO(kl=0.5), 2), gradient(GRPO(), 2)
    theta = THETA.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for y in ANSWERS:
        x = (rows(START, y) - rows(theta, y)).gather(-1, torch.tensor(y)[:, None])[:, 0]
        total = total + probability(THETA, y) * (x.exp() - x - 1).sum()
    close(with_kl - without, 2 * 0.5 * torch.autograd.grad(total, theta)[0])  # two answers to a group


def test_the_estimated_divergence_of_one_answer_by_hand():
    method = GRPO(kl=0.5)
    targets = group(method, [(0, 1), (2, 2)], [1.0, 1.0])  # no advantage: the loss is the divergence alone
    ys = [(0, 1), (2, 2)]
    loss, metrics = method.loss(Tabular(THETA, ys, Tabular(START, ys)), double(collate(targets)))
    x = torch.cat([(rows(START, y) - rows(THETA, y)).gather(-1, torch.tensor(y)[:, None])[:, 0] for y in ys])
    assert metrics["start_kl"].item() == pytest.approx((x.exp() - x - 1).mean().item())
    assert loss.item() == pytest.approx(0.5 * metrics["start_kl"].item())


# --- identities, to the bit -----------------------------------------------------------------------------------------


def group(method: TokenCredit, ys: Sequence[tuple[int, ...]], rewards: Sequence[float | None]) -> list[Target]:
    pairs = enumerate(zip(ys, rewards, strict=True))
    return method.targets([reviewed(method, y, i, verdict=r) for i, (y, r) in pairs])


def credits(method: TokenCredit, ys: Sequence[tuple[int, ...]], rewards: Sequence[float | None]) -> torch.Tensor:
    return torch.cat([t.advantage for t in group(method, ys, rewards)])


YS = [(0, 1), (2, 2), (1, 0), (2, 1)]
MIXED = [1.0, 0.0, 0.0, 1.0]

IDENTITIES = {
    "lam = beta = 1 is OPD": (SGOPD(lam=1, beta=1, phased=ALONE), SampledKL()),
    "lam = beta = 1 from a reference is OPD": (SGOPD(lam=1, beta=1, reference="start", phased=ALONE), SampledKL()),
    "lam = beta from a reference is ExOPD": (SGOPD(lam=1.3, beta=1.3, reference="start", phased=ALONE), ExOPD(lam=1.3)),
    "lam = 1, beta = 0 is OPDVR": (SGOPD(lam=1, beta=0, sign="outcome", phased=ALONE), OPDVR()),
    "alpha = 1 is OPD": (Mix(alpha=1), SampledKL()),
    "alpha = 0 is GRPO": (Mix(alpha=0), GRPO()),
    "ExOPD with lam = 1 is OPD": (ExOPD(lam=1), SampledKL()),
    "R2-OPD with beta = 0 is OPD": (R2OPD(beta=0), SampledKL()),
    "RLSD of no width is GRPO": (RLSD(width=0), GRPO()),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_hold_to_the_bit(name):
    one, other = IDENTITIES[name]
    a, b = credits(one, YS, MIXED), credits(other, YS, MIXED)
    if name == "R2-OPD with beta = 0 is OPD":
        torch.testing.assert_close(a, b)  # Z = 2 up to the rounding of two sums
    else:
        assert torch.equal(a, b)
    assert b.abs().max() > 0


@pytest.mark.parametrize("name", [n for n in IDENTITIES if not n.startswith("R2")])
def test_identities_hold_for_the_gradient_too(name):
    grads = []
    for method in IDENTITIES[name]:
        theta = THETA.clone().requires_grad_()
        loss, _ = method.loss(Tabular(theta, YS), double(collate(group(method, YS, MIXED))))
        grads.append(torch.autograd.grad(loss, theta)[0])
    assert torch.equal(*grads)


def test_the_two_terms_of_the_mix_add_up_and_their_angle_is_that_of_the_stated_gradients():
    """At ratio 1 the loss's gradient is -1/N sum A_t grad log pi(y_t), linear in A: alpha d_t and (1 - alpha) A_i apart."""
    alpha, method = 0.3, Mix(alpha=0.3, cosine_every=2)
    made = group(method, YS, MIXED)
    assert method.terms(made, 3) is None
    parts = method.terms(made, 4)
    assert parts is not None

    def of(targets: Sequence[Target]) -> torch.Tensor:
        theta = THETA.clone().requires_grad_()
        loss, _ = method.loss(Tabular(theta, YS), double(collate(targets)))
        return torch.autograd.grad(loss, theta)[0].flatten()

    def stated(credit: torch.Tensor) -> torch.Tensor:
        theta = THETA.clone().requires_grad_()
        logp = torch.stack([rows(theta, y).gather(-1, torch.tensor(y)[:, None])[:, 0] for y in YS])
        return -torch.autograd.grad((credit * logp).mean(), theta)[0].flatten()

    at = torch.tensor(YS)[..., None]
    d = torch.stack([rows(TEACHER, y) - rows(THETA, y) for y in YS]).gather(-1, at)[..., 0]
    advantage = torch.tensor([normal(MIXED, i) for i in range(len(YS))], dtype=torch.float64)[:, None].expand_as(d)
    teacher, verifier = map(of, parts)
    torch.testing.assert_close(teacher, stated(alpha * d), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(verifier, stated((1 - alpha) * advantage), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(teacher + verifier, of(made), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("method", [GRPO(), GRPO(std=False), RLSD(), GRPD(), Mix(alpha=0)])
def test_a_group_whose_answers_score_alike_teaches_nothing(method, reward):
    assert credits(method, YS, [reward] * 4).tolist() == [0] * 8


def test_a_group_whose_answers_score_alike_is_plain_opd_for_the_gate():
    assert torch.equal(credits(SGOPD(phased=ALONE), YS, [1.0] * 4), credits(SampledKL(), YS, MIXED))


@exactly
@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4))
def test_turning_the_verdicts_swaps_every_branch(rewards):
    method = SGOPD(lam=1.5, beta=0.5, sign="outcome", phased=ALONE)
    one = credits(method, YS, rewards)
    other = credits(method, YS, [1 - r for r in rewards])
    d = credits(SampledKL(), YS, rewards)
    torch.testing.assert_close(one + other, 2.0 * d)
    assert ((one == 1.5 * d) ^ (other == 1.5 * d))[d != 0].all()


def test_an_answer_without_a_verdict_has_its_gate_off():
    method = SGOPD(lam=1.8, beta=0.4, phased=ALONE)
    got = credits(method, YS, [None, *MIXED[1:]])
    assert torch.equal(got[:2], torch.tensor(0.4) * credits(SampledKL(), YS, MIXED)[:2])


def test_the_inverse_gate_is_the_gate_of_the_other_verdict():
    inverse = SGOPD(lam=1.8, beta=0.4, sign="outcome", gate="inverse", phased=ALONE)
    plain = SGOPD(lam=1.8, beta=0.4, sign="outcome", phased=ALONE)
    assert torch.equal(credits(inverse, YS, MIXED), credits(plain, YS, [1 - r for r in MIXED]))


def test_the_random_gate_agrees_as_often_but_elsewhere():
    long = (0, 1, 2, 0, 1, 2, 2, 1)
    fields = {"response_ids": long, "pieces": ("x",) * 8, "old_logp": (-1.0,) * 8, "entropy": (1.0,) * 8}
    scores = torch.tensor([-0.5, -2.0] * 4).numpy()

    def coefficients(gate: str, seed: int = 3) -> torch.Tensor:
        method = SGOPD(lam=1.8, beta=0.4, gate=gate, phased=ALONE)
        r = rollout(THETA, (0, 1), seed=seed, verdict=1.0, **fields)
        [ask] = method.asks(r)
        said = Feedback(ask=ask, teacher="t", sampled=scores)
        return method.coefficient(method.evidence(Reviewed(rollout=r, feedback=(said,)), 1.0))

    plain, shuffled = coefficients("sign"), coefficients("random")
    assert plain.tolist() == pytest.approx([1.8, 0.4] * 4)
    assert sorted(plain.tolist()) == sorted(shuffled.tolist())
    assert not torch.equal(plain, shuffled)
    assert torch.equal(shuffled, coefficients("random"))
    assert any(not torch.equal(shuffled, coefficients("random", seed)) for seed in (4, 5))


def test_keep_sign_leaves_out_what_points_away_from_the_teacher():
    free = credits(SGOPD(lam=3, reference="start", phased=ALONE), YS, MIXED)
    kept = credits(SGOPD(lam=3, reference="start", keep_sign=True, phased=ALONE), YS, MIXED)
    d = credits(SampledKL(), YS, MIXED)
    assert (free * d < 0).any()
    assert (kept * d >= 0).all()
    aligned = free * d >= d * d
    assert torch.equal(kept[aligned], free[aligned])


# --- the single methods, by hand ------------------------------------------------------------------------------------


def by_hand(method: TokenCredit, old: list[float], teacher: list[float], **fields: Any) -> list[float]:
    n = len(old)
    said = {"response_ids": (0,) * n, "pieces": ("x",) * n, "old_logp": tuple(old), "entropy": (1.0,) * n}
    r = rollout(THETA, (0, 1), **({"verdict": 1.0} | said | fields))
    [ask] = method.asks(r)
    feedback = Feedback(ask=ask, teacher="t", sampled=torch.tensor(teacher).numpy())
    [target] = method.targets([Reviewed(rollout=r, feedback=(feedback,))])
    return target.advantage.tolist()


def test_reopold_in_its_two_phases():
    method = REOPOLD(lam=0.1, keep=0.5, switch=5)
    old, teacher = [-1.0] * 4, [-0.5, -9.0, -2.0, -1.0]  # d = .5, -8, -1, 0; the floor is ln(1/9) = -2.197
    entropy = (1.0, 3.0, 2.0, 0.5)
    first = by_hand(method, old, teacher, entropy=entropy, policy_version=4)
    assert first == pytest.approx([0.5, 0, -1, 0])
    second = by_hand(method, old, teacher, entropy=entropy, policy_version=5)
    assert second == pytest.approx([0, math.log(1 / 9), -1, 0])


@pytest.mark.parametrize("verdict", [0.0, 1.0])
def test_r2opd_by_hand(verdict):
    old, teacher = [-1.0] * 3, [-3.0, -0.5, -2.0]  # d = -2, .5, -1; median |d| = 1
    z = 2 * verdict - 1
    w = [1 / (1 + math.exp(-2 * z * d)) for d in (-2, 0.5, -1)]
    scale = 3.5 / (2 * w[0] + 0.5 * w[1] + w[2])
    got = by_hand(R2OPD(beta=2.0), old, teacher, verdict=verdict)
    assert got == pytest.approx([-2 * scale * w[0], 0.5 * scale * w[1], -scale * w[2]], rel=1e-5)
    assert sum(map(abs, got)) == pytest.approx(3.5, rel=1e-5)


def test_r2opd_of_a_teacher_that_is_the_student_is_nothing():
    assert by_hand(R2OPD(), [-1.0, -2.0], [-1.0, -2.0]) == [0, 0]


def test_log_ratios_are_cut_at_the_limit_and_keep_their_signs():
    assert by_hand(SampledKL(limit=3.0), [-1.0, -20.0, -2.0], [-50.0, -0.1, -2.5]) == pytest.approx([-3, 3, -0.5])


def test_poweropd_is_bounded():
    assert by_hand(PowerOPD(), [-0.01, -1.0], [-1e4, 0.0]) == pytest.approx([-math.exp(-0.01), 1 - math.exp(-1)])


# --- the loss -------------------------------------------------------------------------------------------------------


def pulled(method: TokenCredit, ratio: float, a: float) -> tuple[float, float]:
    """Loss and its slope in log pi_theta for one token of this ratio and this advantage."""
    old = -2.0
    [target] = method.targets([reviewed(method, (0, 1))])
    one = Target(source=target.source, weight=torch.tensor([1.0, 0.0]), advantage=torch.tensor([a, 0.0]))
    batch = double(collate([one]))
    logp = torch.tensor([[old + math.log(ratio), 0.0]], dtype=torch.float64, requires_grad=True)

    class Fixed(Tabular):
        def logp(self, ids):
            return logp

    batch.old_logp[:] = old
    loss, _ = method.loss(Fixed(THETA, [(0, 1)]), batch)
    return loss.item(), torch.autograd.grad(loss, logp)[0][0, 0].item()


@pytest.mark.parametrize(
    ("ratio", "a", "loss", "moves"),
    [
        (1.0, 2.0, -2.0, True),
        (1.1, 2.0, -2.2, True),
        (1.5, 2.0, -2.0 * 1.4, False),  # raised enough: 1 + clip_high
        (0.5, 2.0, -1.0, True),
        (0.5, -2.0, 2.0 * 0.7, False),  # lowered enough: 1 - clip_low
        (1.5, -2.0, 3.0, True),
        (9.0, -2.0, 6.0, False),  # dual clip: 3 |A|
    ],
)
def test_the_clip_by_hand(ratio, a, loss, moves):
    got, slope_ = pulled(SampledKL(clip_low=0.3, clip_high=0.4, dual_clip=3.0), ratio, a)
    assert got == pytest.approx(loss)
    assert slope_ == pytest.approx(-a * ratio if moves else 0)


def test_a_mean_over_answers_weighs_long_and_short_ones_alike():
    method = SampledKL(mean="sequence")
    short = reviewed(method, (0, 1), response_ids=(0,), pieces=("a",), old_logp=(-1.0,), entropy=(0.0,))
    said = Feedback(ask=short.feedback[0].ask, teacher="t", sampled=torch.tensor([-3.0]).numpy())
    short = Reviewed(rollout=short.rollout, feedback=(said,))
    targets = method.targets([short]) + method.targets([reviewed(method, (2, 1), 1)])
    batch = double(collate(targets))
    d = credits(SampledKL(), [(2, 1)], [0.0])
    logp = batch.old_logp.clone()

    class Same(Tabular):
        def logp(self, ids):
            return logp

    loss, _ = method.loss(Same(THETA, []), batch)
    assert loss.item() == pytest.approx(-(-2.0 + d.mean().item()) / 2)


# --- the teacher's own answers --------------------------------------------------------------------------------------


def taught(method: TokenCredit, ys: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]]) -> Any:
    """Loss and gradient on student answers `ys` and teacher answers `theirs` to one prompt."""
    mine = [reviewed(method, y, i) for i, y in enumerate(ys)]
    others = []
    for y in theirs:
        r = rollout(TEACHER, y, author="teacher", old_logp=None, entropy=None, sample=9, verdict=1.0)
        others.append(Reviewed(rollout=r, feedback=tuple(answer(ask) for ask in method.asks(r))))
    theta = THETA.clone().requires_grad_()
    batch = double(collate(method.targets([*mine, *others])))
    loss, metrics = method.loss(Tabular(theta, [*ys, *theirs]), batch)
    return loss, metrics, torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize(
    "method", [SGOPD(), Mix(alpha=0.5, phased=Phased(share=0.5)), GRPO(phased=Phased(share=0.5, weight=0.5))]
)
def test_teacher_answers_are_learnt_by_likelihood_alone(method):
    theirs = [(1, 1), (0, 2)]
    loss, metrics, got = taught(method, YS, theirs)
    alone, _, theta_alone = taught(method, YS, [])
    theta = THETA.clone().requires_grad_()
    nll = -method.phased.weight * sum(rows(theta, y).gather(-1, torch.tensor(y)[:, None]).sum() for y in theirs)
    n, m = len(YS) * T, len(theirs) * T
    torch.testing.assert_close(loss, (alone * n + nll) / (n + m))
    torch.testing.assert_close(got, (theta_alone * n + torch.autograd.grad(nll, theta)[0]) / (n + m))
    torch.testing.assert_close(metrics["example_loss"], (nll / (n + m)).detach())


def test_teacher_answers_do_not_enter_the_statistics_of_the_group():
    """A right teacher answer among wrong ones would make every student answer look worse than it is."""
    method = GRPO(phased=Phased(share=0.5))
    r = rollout(TEACHER, (1, 1), author="teacher", old_logp=None, entropy=None, sample=9, verdict=1.0)
    wrong = [reviewed(method, y, i, verdict=0.0) for i, y in enumerate(YS)]
    targets = method.targets([*wrong, Reviewed(rollout=r)])
    assert all(t.advantage.abs().max() == 0 for t in targets)
    assert targets[-1].imitate.tolist() == [1, 1]


def test_teacher_answers_by_top_k_forward_divergence():
    method = SGOPD(phased=Phased(share=0.5, loss="topk", top_k=V - 1, weight=2.0))
    loss, _, _ = taught(method, [], [(1, 1)])
    want = 2.0 * forward_kl(rows(THETA, (1, 1)), rows(TEACHER, (1, 1))).sum() / T  # the last token is the rest
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=1e-6)


def test_a_batch_of_nothing_but_teacher_answers_is_sft():
    _, _, got = taught(SGOPD(), [], [(1, 1)])
    want = slope(lambda th: -rows(th, (1, 1)).gather(-1, torch.tensor([[1], [1]])).mean())
    torch.testing.assert_close(got, want)


def test_a_given_prefix_is_imitated_and_what_follows_is_corrected():
    method = SGOPD(phased=Phased(share=0.5, mode="prefix", weight=0.5))
    plain = reviewed(method, (2, 1))
    r = Rollout(**{n: getattr(plain.rollout, n) for n in Rollout.__slots__} | {"guided": 1})
    r = rollout(THETA, (2, 1), guided=1, old_logp=(0.0, r.old_logp[1]), verdict=1.0)
    [target] = method.targets([Reviewed(rollout=r, feedback=tuple(answer(ask) for ask in method.asks(r)))])
    [free] = method.targets([Reviewed(rollout=plain.rollout, feedback=plain.feedback)])
    assert target.weight.tolist() == [0, 1]
    assert target.imitate.tolist() == [0.5, 0]
    assert target.advantage[0] == 0
    kind = SGOPD(sign="outcome", phased=ALONE)
    assert target.advantage[1] == credits(kind, [(2, 1)], [1.0])[1]
    assert free.imitate is None
    assert target.info["teacher_kl"].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "method",
    [
        SGOPD(gate="random", sign="outcome", phased=Phased(share=0.5, mode="prefix")),
        R2OPD(beta=2.0, phased=Phased(share=0.5, mode="prefix")),
        REOPOLD(switch=0, keep=0.5, phased=Phased(share=0.5, mode="prefix")),
        SampledKL(gamma=0.5, phased=Phased(share=0.5, mode="prefix")),
    ],
)
def test_a_given_prefix_is_no_evidence_about_the_student(method):
    """Credit that looks at a whole answer sees the same with and without what the teacher put in front."""
    rest: dict[str, Any] = {"old_logp": (-1.0, -2.0, -0.5, -3.0), "entropy": (0.4, 0.1, 0.9, 0.2)}
    scores = [-0.5, -4.0, -0.6, -1.0]
    alone = by_hand(method, list(rest["old_logp"]), scores, **rest, seed=5)
    front = {name: (0.0,) * 3 + values for name, values in rest.items()}
    behind = by_hand(method, list(front["old_logp"]), [-0.01] * 3 + scores, **front, seed=5, guided=3)
    assert behind == [0, 0, 0, *alone]
    assert any(alone)


def test_a_mean_over_answers_counts_the_tokens_that_were_selected():
    method = SampledKL(mean="sequence")
    [target] = method.targets([reviewed(method, (2, 1))])
    chosen = replace(target, weight=torch.tensor([0.0, 1.0]))
    theta = THETA.clone().requires_grad_()
    loss, _ = method.loss(Tabular(theta, [(2, 1)]), double(collate([chosen])))
    assert loss.item() == pytest.approx(-target.advantage[1].item())


def test_what_is_logged_about_agreement():
    method = SGOPD(phased=ALONE)
    targets = group(method, YS, MIXED)
    d = credits(SampledKL(), YS, MIXED).split(T)
    for target, own, reward in zip(targets, d, MIXED, strict=True):
        same = (own > 0) if reward else (own < 0)
        kind = "correct" if reward else "wrong"
        assert target.info[f"consensus/{kind}"].bool().tolist() == same.tolist()
        assert target.info[f"conflict/{kind}"].bool().tolist() == (~same).tolist()
        assert torch.equal(target.info["d/consensus"].nan_to_num(), own * same)
        assert torch.equal(target.info["d/conflict"].nan_to_num(), own * ~same)
