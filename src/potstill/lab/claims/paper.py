"""The claims of "On the Geometry of On-Policy Distillation" (arXiv:2606.07082), each with the numbers that judge it.

The paper's OPD is `opd` here (sampled tokens), its RLVR is `grpo`.
"""

import math
from collections.abc import Callable, Sequence

from potstill.lab.claims.evidence import Evidence, K, Values, logs, minus
from potstill.lab.claims.rules import EQUAL, LOCKED, SAME_SCORE, Claim, interval

PAPER = ("sft", "opd", "grpo")
ORDER = (("sft", "opd"), ("opd", "grpo"))
"""Pairs of methods in which the paper sees more rotation, drift and density in the first."""
SPARSE = {"gap-50": "top 50 %", "gap-25": "top 25 %", "random-50": "random 50 %", "random-25": "random 25 %"}
ALIKE = math.log(EQUAL)


def claims(e: Evidence) -> list[Claim]:
    """All of them, in the paper's order."""
    return [*off_principal(e), *locking(e), *projected(e), *controls(e)]


# --- section 3: between SFT and RLVR ---------------------------------------------------------------------------------


def off_principal(e: Evidence) -> list[Claim]:
    """Sparsity, rotation, drift and masks."""
    own, null = {}, {}
    for method in PAPER:
        own[method], null[method] = e.sparsity(method)
    return [
        Claim(
            name="Weights unchanged in bf16: SFT < OPD < RLVR",
            paper="8.1 / 51.6 / 77.2 %",
            kind="above",
            effects=[minus(own[b], own[a]) for a, b in ORDER],
            nulls=[minus(null[b], null[a]) for a, b in ORDER],
            ours=_three(own, percent),
            null=f"{_three(null, percent)}: updates rotated",
        ),
        _nearer("unchanged weights", "25.6 points to RLVR, 43.5 to SFT", own, null, "updates rotated"),
        *_ordered(e, "Largest principal angles", "> 10 / about 1 / < 0.5 degrees, one layer", ("angU_max", "angV_max")),
        *_ordered(e, "Spectral shift", "about 3e-3 / 1.5e-4 / 1.5e-5", ("nss",)),
        *_masks(e),
    ]


def _nearer(
    what: str, paper: str, own: dict[str, Values], null: dict[str, Values], of: str, *, scale: str = "points"
) -> Claim:
    """OPD's distance to SFT less that to RLVR: of shares in points, of sizes on a log scale."""

    def between(x: dict[str, Values], a: str, b: str) -> Values:
        return [abs(d) for d in (minus(x[a], x[b]) if scale == "points" else logs(x[a], x[b]))]

    def left(x: dict[str, Values]) -> Values:
        return minus(between(x, "sft", "opd"), between(x, "opd", "grpo"))

    show = points if scale == "points" else factor
    return Claim(
        name=f"In {what}, OPD is nearer to RLVR than to SFT",
        paper=paper,
        kind="above",
        effects=[left(own)],
        nulls=[left(null)],
        ours=f"nearer by {show(left(own))}",
        null=f"by {show(left(null))}: {of}",
    )


def _ordered(e: Evidence, what: str, paper: str, columns: Sequence[str]) -> list[Claim]:
    """Each method above the next on a log scale, and the middle one nearer to the last; each beside itself rotated."""

    def of(suffix: str) -> dict[str, Values]:
        sides = {m: [e.column(m, f"{c}{suffix}") for c in columns] for m in PAPER}
        return {m: [sum(pair) / len(pair) for pair in zip(*found, strict=True)] for m, found in sides.items()}

    own, null = of(""), of("_null")
    ordered = Claim(
        name=f"{what}: SFT > OPD > RLVR",
        paper=paper,
        kind="above",
        effects=[logs(own[a], own[b]) for a, b in ORDER],
        nulls=[logs(null[a], null[b]) for a, b in ORDER],
        ours=_three(own, number),
        null=f"{_three(null, number)}: updates rotated",
    )
    return [ordered, _nearer(what.lower(), "as above", own, null, "updates rotated", scale="log")]


def _masks(e: Evidence) -> list[Claim]:
    princ, low = ({m: e.column(m, f"ov_{mask}") for m in PAPER} for mask in ("princ", "low"))
    princ0, low0 = ({m: e.column(m, f"ov_{mask}_null") for m in PAPER} for mask in ("princ", "low"))
    return [
        Claim(
            name="Changes avoid principal weights: OPD and RLVR below 30 %",
            paper="29.7 / 27.3 / 26.7 %",
            kind="above",
            effects=[[0.3 - x for x in princ[m]] for m in ("opd", "grpo")],
            nulls=[[0.3 - x for x in princ0[m]] for m in ("opd", "grpo")],
            ours=_three(princ, percent),
            null=f"{_three(princ0, percent)}: random updates, same density",
        ),
        Claim(
            name="Changes prefer small weights: SFT < OPD < RLVR",
            paper="31.9 / 53.6 / 73.5 %",
            kind="above",
            effects=[minus(low[b], low[a]) for a, b in ORDER],
            nulls=[minus(low0[b], low0[a]) for a, b in ORDER],
            ours=_three(low, percent),
            null=f"{_three(low0, percent)}: random updates, same density",
        ),
        _nearer("changes on small weights", "19.9 points to RLVR, 21.7 to SFT", low, low0, "random, same density"),
    ]


# --- section 4: locking ----------------------------------------------------------------------------------------------


def locking(e: Evidence) -> list[Claim]:
    """Stable rank over time, and the early subspace."""
    said = (("opd", "stays flat", "20 to 30"), ("sft", "grows", "20 to 75"), ("grpo", "shrinks", "falls"))
    found: list[Claim] = []
    for method, does, paper in said:
        change = [math.log(curve[-1] / curve[0]) for curve in e.ranks(method)]
        noise = logs(*(e.column(method, "srank_noise", group="attention", at=at) for at in (-1, 0)))
        sign = -1 if does == "shrinks" else 1
        found.append(
            Claim(
                name=f"Stable rank of dW: {method} {does}",
                paper=paper,
                kind="same" if method == "opd" else "above",
                effects=[[sign * x for x in change]],
                nulls=[[sign * x for x in noise]],
                bar=ALIKE if method == "opd" else 0.0,
                ours=_course([c[0] for c in e.ranks(method)], [c[-1] for c in e.ranks(method)], change),
                null=f"{factor(noise)}: noise through the inputs",
            )
        )
    found += [_tail(e, "sft", "rises", 1), _tail(e, "grpo", "falls", -1)]
    sim = {m: e.column(m, f"sim{K}_V", group="attention", at=0) for m in PAPER}
    noise_sim = {m: e.column(m, f"sim{K}_V_null", group="attention", at=0) for m in PAPER}
    close = Claim(
        name="OPD's input subspace after a fifth of training is close to the final one",
        paper="high; not printed (axis 0.4 to 1)",
        kind="above",
        bar=LOCKED,
        effects=[sim["opd"]],
        nulls=[noise_sim["opd"]],
        ours=number(sim["opd"]),
        null=f"{number(noise_sim['opd'])}: noise through the inputs",
    )
    highest = Claim(
        name="It is closer than SFT's and RLVR's",
        paper="highest of the three",
        kind="above",
        effects=[minus(sim["opd"], sim[m]) for m in ("sft", "grpo")],
        nulls=[minus(noise_sim["opd"], noise_sim[m]) for m in ("sft", "grpo")],
        ours=_three(sim, number),
        null=f"{_three(noise_sim, number)}: noise through the inputs",
    )
    return [*found, close, highest]


def _tail(e: Evidence, method: str, does: str, sign: int) -> Claim:
    """Hill's estimate from the first checkpoint to the last; the paper does not say its k."""
    at = (-1, 0)
    own = logs(*(e.column(method, "hill_k16", group="attention", at=i) for i in at))
    null = logs(*(e.column(method, "hill_k16_null", group="attention", at=i) for i in at))
    return Claim(
        name=f"Hill estimate of dW, k = 16: {method} {does}",
        paper=does,
        kind="above",
        effects=[[sign * x for x in own]],
        nulls=[[sign * x for x in null]],
        ours=factor(own),
        null=f"{factor(null)}: entries permuted",
    )


# --- section 4.2: training inside the early subspace -----------------------------------------------------------------


def projected(e: Evidence) -> list[Claim]:
    """Scores with projected gradients against those without."""

    def lost(method: str, basis: str) -> Values:
        return minus(e.score(method), e.score(f"{method}-{basis}"))

    def told(method: str) -> str:
        others = ("inputs", "other", "stop")
        more = ", ".join(f"{basis} {points(_negative(lost(method, basis)))}" for basis in others)
        return f"{points(_negative(lost(method, 'random')))}: random basis ({more})"

    return [
        Claim(
            name=f"OPD within its early {K} directions scores as without",
            paper="essentially unchanged",
            kind="same",
            bar=SAME_SCORE,
            effects=[lost("opd", "self")],
            nulls=[lost("opd", "random")],
            ours=f"{points(_negative(lost('opd', 'self')))} on {percent(e.score('opd'))}",
            null=told("opd"),
        ),
        Claim(
            name="SFT within its own scores worse than without",
            paper="degrades",
            kind="above",
            effects=[lost("sft", "self")],
            nulls=[lost("sft", "random")],
            ours=f"{points(_negative(lost('sft', 'self')))} on {percent(e.score('sft'))}",
            null=told("sft"),
        ),
    ]


def _negative(values: Values) -> Values:
    return [-x for x in values]


# --- section 5: controls ---------------------------------------------------------------------------------------------


def controls(e: Evidence) -> list[Claim]:
    """Which changes of the objective leave the curve of the stable rank where it was?"""
    reference = e.distance("grpo", "opd")
    null = f"{apart(reference)}: RLVR itself"

    def same(name: str, variant: str, paper: str) -> Claim:
        own = e.distance(variant, "opd")
        return Claim(
            name=name, paper=paper, kind="same", bar=ALIKE, effects=[own], nulls=[reference], ours=apart(own), null=null
        )

    def departs(name: str, variant: str) -> Claim:
        own = e.distance(variant, "opd")
        return Claim(
            name=name, paper="another regime", kind="above", bar=ALIKE, effects=[own], ours=apart(own), null=null
        )

    return [
        *[
            same(f"Stable rank the same with {told} of the tokens", v, "tracks the baseline")
            for v, told in SPARSE.items()
        ],
        _norm_rather_than_shape(e),
        same("Stable rank the same on the teacher's answers", "off-policy", "unchanged"),
        _larger(e),
        same("Stable rank the same with alpha = 0.75", "mix-75", "follows OPD"),
        same("Stable rank the same with alpha = 0.5", "mix-50", "follows OPD"),
        departs("Stable rank differs with alpha = 0.05", "mix-05"),
        departs("Stable rank differs with alpha = 0.01", "mix-01"),
    ]


def _norm_rather_than_shape(e: Evidence) -> Claim:
    """How much further apart than the ranks are the norms, on a log scale; beside OPD's own runs of two seeds."""

    def apart_in(norms: Values, others: Values) -> Values:
        return [abs(math.log(a / b)) for a, b in zip(norms, others, strict=False)]

    opd = e.norm("opd")
    norms, ranks = apart_in(e.norm("random-25"), opd), e.distance("random-25", "opd")
    norms0, ranks0 = apart_in(opd, [*opd[1:], opd[0]]), e.between_seeds("opd")
    return Claim(
        name="Random 25 % of the tokens change the norm more than the stable rank",
        paper="more",
        kind="above",
        effects=[minus(norms, ranks)],
        nulls=[minus(norms0, ranks0)],
        ours=f"norm {apart(norms)}, rank {apart(ranks)}",
        null=f"norm {apart(norms0)}, rank {apart(ranks0)}: OPD with another seed",
    )


def _larger(e: Evidence) -> Claim:
    own = e.norm("off-policy")
    change = logs(own, e.norm("opd")[: len(own)])
    return Claim(
        name="The teacher's answers give a larger norm",
        paper="modestly larger",
        kind="above",
        effects=[change],
        ours=factor(change),
        null="none",
    )


# --- numbers in words ------------------------------------------------------------------------------------------------


def number(values: Values) -> str:
    """`0.62 [0.55, 0.69]`: the mean over seeds with its interval."""
    i = interval(values)
    return f"{i.mean:.3g} [{i.low:.3g}, {i.high:.3g}]"


def percent(values: Values) -> str:
    """The same in per cent."""
    i = interval([100 * x for x in values])
    return f"{i.mean:.1f} [{i.low:.1f}, {i.high:.1f}] %"


def points(values: Values) -> str:
    """A difference of shares in points, signed."""
    i = interval([100 * x for x in values])
    return f"{i.mean:+.1f} [{i.low:+.1f}, {i.high:+.1f}]"


def factor(values: Values) -> str:
    """A log ratio as a factor."""
    i = interval(values)
    return f"x {math.exp(i.mean):.2f} [{_power(i.low):.2f}, {_power(i.high):.2f}]"


def _power(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def apart(values: Values) -> str:
    """A mean distance on a log scale as a factor."""
    return f"{factor(values)} apart"


def _course(first: Values, last: Values, change: Values) -> str:
    return f"{interval(first).mean:.2f} to {interval(last).mean:.2f}, {factor(change)}"


def _three(values: dict[str, Values], show: Callable[[Values], str]) -> str:
    return " / ".join(show(values[m]) for m in PAPER)
