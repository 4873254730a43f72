"""The report's numbers and its escaping; how it looks in a browser is tested in tests/e2e."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from potstill import report
from potstill.report.charts import Point, Series, line_chart, thin
from potstill.report.inside import MOST_TOKENS, Scale, choose, chunk, compare, first_middle_last, look_inside
from potstill.report.numbers import MINUS, percent, points, round_up, short, ticks
from potstill.report.results import from_runs, from_summary
from potstill.report.training import logged_curve, side_by_side
from potstill.run import Run

HOSTILE = (
    """</script><script>document.title='owned'</script><img src=x onerror="document.title='owned'">"'>&amp;{{ 7*7 }}"""
)
SPACE = "\N{NO-BREAK SPACE}"


def working(a: int, b: int, slip: bool) -> str:
    """A long multiplication as the lab writes it, digit by digit."""
    lines = [f"{d}*{b}={int(d) * b}" for d in reversed(str(a))]
    return "\n".join(lines) + f"\n#{a * b + (10 if slip else 0)}"


def rollout(rng: random.Random, step: int, sample: int, *, audited: bool, skill: float) -> dict[str, Any]:
    a, b = rng.randint(12, 9999), rng.randint(2, 9)
    wrong = rng.random() > skill
    text = working(a, b, wrong)
    pieces = [*text, ""]
    entropy = [abs(rng.gauss(0, 0.5 * (1.1 - skill))) + (0.9 if c == "=" and wrong else 0.0) for c in pieces]
    audits: list[dict[str, Any]] = []
    weight = [1.0] * len(pieces)
    if audited:
        weight = [0.0] * len(pieces)
        for start in range(2, len(pieces) - 8, max(9, len(pieces) // 3)):
            own = text[start : start + 6]
            said = [own if rng.random() < skill else f"{rng.randint(1, 99)}\n so {own[2:]}\n{b}" for _ in range(6)]
            like = [1.0 if s == own else round(rng.uniform(0.1, 0.6), 3) for s in said]
            target = (sum(like) + 0.8) / 7
            weight[start : start + 6] = [1.0] * 6
            audits.append(
                {"start": start, "length": 6, "text": own, "continuations": said, "similarity": like,
                 "k_sem": sum(like), "pi_bar": 0.8, "target": target}
            )  # fmt: skip
    info = {"agreement": [math.nan] * len(pieces)} if audited else {"teacher_kl": [e * 0.7 for e in entropy]}
    return {
        "step": step, "id": f"lab-{a}-{b}", "sample": sample, "author": "student",
        "messages": [{"role": "user", "content": f"{a}*{b}="}], "answer": str(a * b), "pieces": pieces,
        "entropy": entropy, "old_logp": [-e / 2 for e in entropy], "weight": weight,
        "anchor": [1 - w for w in weight] if audited else None,
        "advantage": [0.7 * w if audited else rng.gauss(0, 0.8) for w in weight],
        "verdict": 0.0 if wrong else 1.0, "finish": "stop", "policy_version": step, "info": info, "audits": audits,
    }  # fmt: skip


def odd_ones(step: int, hostile: str) -> list[dict[str, Any]]:
    """What does not look like a normal rollout: empty, unfinished and long, hostile, fields missing."""
    words = "Let me think about this again, because the carry was wrong.\nThe naïve 你好 answer\tis " * 60
    pieces = [w + " " for w in words.split(" ")]
    audit = {
        "start": 0, "length": 1, "text": hostile, "continuations": [hostile, "", "Well,\nin\n\nmany   lines"],
        "similarity": [1.0, 0.0, 0.2], "k_sem": 1.2, "pi_bar": 0.4, "target": 0.4,
    }  # fmt: skip
    message = {"role": hostile, "content": hostile}
    return [
        {"step": step, "id": "long", "sample": 0, "author": "student", "messages": [message], "answer": None,
         "pieces": pieces, "entropy": [(i % 37) / 12 for i in range(len(pieces))], "verdict": 0.0,
         "finish": "length", "info": {}, "audits": []},
        {"step": step, "id": hostile, "sample": 1, "author": hostile, "messages": [message], "answer": hostile,
         "pieces": [hostile, "", "\n", "'", '"'], "entropy": [0.1, 2.0, math.nan, 0.0, 0.3],
         "advantage": [-1.0, 0.5, 2.0, None, 0.0], "verdict": None, "finish": "stop", "info": {hostile: [1.0]},
         "audits": [audit]},
        {"step": step, "id": "empty", "sample": 2, "messages": [], "pieces": [], "entropy": [], "verdict": 1.0,
         "finish": "stop", "info": {}, "audits": []},
    ]  # fmt: skip


def make_run(folder: Path, method: str, *, steps: int = 60, odd: str | None = None) -> Run:
    """A run as the training loop leaves it, through the public API, with made-up numbers."""
    rng = random.Random(method)
    audited = method == "omniopd"
    top = 0.5 if audited else 0.92
    fields: dict[str, Any] = {"name": method, "alpha": 1.0, "chunk": 6} if audited else {"name": method, "beta": 0.0}
    resolved = {"name": folder.name, "seed": 0, "method": fields, "student": {"path": "lab", "lora": None}}
    run = Run.create(folder, config="", resolved=resolved, env={"potstill": "0.1.0", "python": "3.11", "cpus": 2})

    def skill(step: int) -> float:
        return 0.12 + (top - 0.12) * (1 - math.exp(-3 * step / steps))

    def around(value: float) -> dict[str, float]:
        return {"value": value, "low": max(0.0, value - 0.03), "high": min(1.0, value + 0.03)}

    for step in range(0, steps + 1, 10):
        for name, k in (("sampled", 4), ("greedy", 1)):
            right = skill(step) if k == 4 else 0.34 + 0.6 * (skill(step) - 0.12)
            run.append(
                "evals",
                {"step": step, "name": name, "split": "validation", "questions": 256, "samples": k, "cpu_s": step * 1.3,
                 "temperature": 1.0, f"avg@{k}": around(right), "format_failure": around(0.02),
                 "length": {"value": 40 - 12 * skill(step), "low": 25.0, "high": 42.0}},
            )  # fmt: skip
    for step in range(1, steps + 1):
        s = skill(step)
        row = {
            "step": step, "loss": 1.2 * (1 - s) + rng.gauss(0, 0.05), "grad_norm": rng.uniform(0.5, 2), "lr": 1e-3,
            "entropy": 0.5 * (1.05 - s), "length": 40 - 12 * s, "verdict": s + rng.gauss(0, 0.04), "truncated": 0.01,
            "teacher/read": 21_000, "teacher/cached": 9_000, "teacher/written": 2_400 if audited else 0,
            "cpu_s": step * 1.3, "tokens": 2_100, ("agreement" if audited else "divergence"): s if audited else 1 - s,
        }  # fmt: skip
        run.append("metrics", row if step != 7 else row | {"entropy": None, "loss": math.nan})
    for step in (1, 10, 30, steps):
        rows = [rollout(rng, step, i % 4, audited=audited, skill=skill(step)) for i in range(12)]
        run.keep_rollouts(step, rows if odd is None else [*odd_ones(step, odd), *rows])
    return run


def make_summary(runs: list[str]) -> dict[str, Any]:
    """A summary as the demo writes it: one clear gain, the others uncertain."""

    def three(value: float, half: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half}

    def method(name: str, gain: float) -> dict[str, Any]:
        return {
            "start": {"sampled": three(0.115, 0.02), "greedy": three(0.343, 0.04)},
            "end": {"sampled": three(0.115 + gain, 0.02), "greedy": three(0.343 + gain / 1.5, 0.03)},
            "gain": {"sampled": three(gain, 0.03), "greedy": three(gain / 1.5, 0.04)},
            "cpu_seconds": 61.3, "teacher_tokens": {"read": 1_260_000, "written": 144_000 * (name == "omniopd")},
            "run": name,
        }  # fmt: skip

    methods = {name: method(name, 0.775 if i == 0 else 0.021) for i, name in enumerate(runs)}
    return {"methods": methods, "questions": 512, "seed": 0}


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return [make_run(tmp_path / "opd", "opd"), make_run(tmp_path / "omniopd", "omniopd", odd=HOSTILE)]


class Page(HTMLParser):
    """What a browser would see: elements and attributes, after unescaping."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "omniopd", "omniopd", odd=HOSTILE)
    summary = make_summary([HOSTILE])
    page = Page(report.render([run], summary, title=HOSTILE))
    assert len(list(page.named("script"))) == 1, "only the page's own script"
    assert not list(page.named("img"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    text = "".join(page.words)
    assert "{{ 7*7 }}" in text, "templates in model text are not run"
    # title and heading; role, prompt, answer, author, id; token; chunk; continuation; finding and table
    assert text.count("document.title='owned'</script>") >= 10


def test_the_policy_allows_exactly_the_pages_own_script(runs: list[Run]) -> None:
    import base64
    import hashlib
    import re

    html = report.render(runs)
    [script] = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "default-src 'none'" in html


def test_page_asks_for_nothing_and_stays_small(runs: list[Run]) -> None:
    html = report.render(runs, make_summary(["opd", "omniopd"]))
    page = Page(html)
    links = [a[key] or "" for _, a in page.tags for key in ("src", "href") if key in a]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert len(html.encode()) < 3_000_000
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids), "every link leads somewhere"


def test_a_huge_run_still_makes_a_small_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "huge", "omniopd")
    chapter = {"start": 0, "length": 50, "text": "a b " * 500, "continuations": [f"c{i} d " * 500 for i in range(10)]}
    row = {"id": "x", "sample": 0, "pieces": ["word "] * 5000, "entropy": [0.5] * 5000, "audits": [chapter] * 10}
    run.keep_rollouts(60, [row] * 8)
    html = report.render([run] * 2)
    assert 100_000 < len(html.encode()) < 3_000_000
    assert f"{5000 - MOST_TOKENS:,} more tokens" in html


def test_a_run_without_rows_still_has_a_page(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "new", config="", resolved={"seed": 0}, env={})
    html = report.write(tmp_path / "report.html", [run]).read_text()
    assert "no evaluations yet" in html
    assert "nothing can be said" in html


def test_table_from_runs_has_the_first_and_last_evaluation(runs: list[Run]) -> None:
    opd = from_runs(runs)[0]
    sampled = opd.changes[0]
    assert sampled.start
    assert sampled.end
    assert sampled.gain
    assert sampled.start.value == pytest.approx(0.12)
    assert sampled.gain.value == pytest.approx(sampled.end.value - 0.12)
    assert sampled.gain.interval is None
    assert opd.teacher_read == 60 * 21_000
    assert opd.cpu_seconds == pytest.approx(78.0)


def test_sentences_claim_no_more_than_the_interval(runs: list[Run]) -> None:
    clear, unclear = from_summary(make_summary(["opd", "omniopd"]), runs)
    assert f"rose from 11.5{SPACE}% to 89.0{SPACE}% (+77.5 points, 95 % interval +74.5 to +80.5)" in clear.sentence
    assert "did not change clearly" in unclear.sentence
    assert [clear.colour, unclear.colour] == [0, 1]


def test_without_paired_answers_overlapping_intervals_may_be_chance(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "short", config="", resolved={}, env={})
    for step, value in ((0, 0.2), (4, 0.1)):
        accuracy = {"value": value, "low": value - 0.08, "high": value + 0.08}
        run.append("evals", {"step": step, "name": "sampled", "split": "validation", "cpu_s": 0.0, "avg@4": accuracy})
    [row] = from_runs([run])
    assert f"went from 20.0{SPACE}% to 10.0{SPACE}%" in row.sentence
    assert "may be chance" in row.sentence


def test_teacher_tokens_are_added_up_and_gaps_left_out() -> None:
    rows = [{"step": 1, "teacher/read": 10}, {"step": 2, "teacher/read": None}, {"step": 3, "teacher/read": 5}]
    assert logged_curve(rows, "teacher/read") == [Point(1.0, 10.0), Point(3.0, 15.0)]
    assert logged_curve([{"step": 1, "loss": math.nan}, {"step": 2, "loss": 4}], "loss") == [Point(2.0, 4.0)]


def test_chart_puts_points_where_they_belong() -> None:
    line = Series("a", 0, [Point(0.0, 0.0), Point(10.0, 1.0, 0.9, 1.0)])
    chart = line_chart("t", [line], x_label="step", y_range=(0.0, 1.0))
    assert chart
    first, last = chart.lines[0].hover
    assert first[:2] == (chart.left, chart.bottom)
    assert last[:2] == (chart.right, chart.top)
    assert chart.lines[0].path == f"M{chart.left:.1f} {chart.bottom:.1f}L{chart.right:.1f} {chart.top:.1f}"


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, -2.0], [1e-9, 2e-9], [1e12, 3e12], [-1.0, 1.0]])
def test_any_range_gives_a_chart(values: list[float]) -> None:
    chart = line_chart("t", [Series("a", 0, [Point(float(i), v) for i, v in enumerate(values)])], x_label="step")
    assert chart
    assert all(math.isfinite(c) for x, y, *_ in chart.lines[0].hover for c in (x, y))
    assert all(chart.top - 0.1 <= y <= chart.bottom + 0.1 for _, y, *_ in chart.lines[0].hover)


def test_thin_keeps_the_mean() -> None:
    long = [Point(float(i), float(i)) for i in range(1000)]
    assert len(thin(long, 100)) == 100
    assert sum(p.y for p in thin(long, 100)) / 100 == pytest.approx(499.5)


def test_ticks_are_round_and_cover() -> None:
    assert ticks(0.0, 1.0, 4) == [0.0, 0.5, 1.0]
    assert ticks(0.0, 0.93, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_numbers_for_people() -> None:
    assert [short(v) for v in (0, 0.03124, 4.2, 812.4, 1234, 12_400, 3_100_000, -0.5)] == [
        "0", "0.0312", "4.2", "812", "1,234", "12.4k", "3.1M", f"{MINUS}0.5",
    ]  # fmt: skip
    assert percent(0.115) == f"11.5{SPACE}%"
    assert [round_up(v) for v in (0.0, 0.31, 1.0, 2.5, 97.0)] == [0.0, 0.32, 1.0, 3.2, 100.0]
    assert points(-0.02) == f"{MINUS}2.0"


def test_choice_shows_both_wrong_and_right() -> None:
    rows = [{"id": i, "verdict": 1.0} for i in range(6)] + [{"id": 6, "verdict": 0.0}, {"id": 7, "verdict": None}]
    assert [row["id"] for row in choose(rows)] == [6, 0, 7, 1]
    assert first_middle_last([10, 20, 30, 40]) == [10, 20, 40]
    assert first_middle_last([10]) == [10]
    assert first_middle_last([]) == []


def test_equal_continuations_are_counted_and_differences_marked() -> None:
    said = {"continuations": ["axc", "abc", "axc"], "similarity": [2 / 3, 1, 2 / 3]}
    made = chunk(1, {"start": 0, "length": 3, "text": "abc", **said})
    assert [(c.times, c.similarity) for c in made.continuations] == [(1, 1.0), (2, 2 / 3)]
    assert compare("abc", "axc") == [("a", True), ("x", False), ("c", True)]
    assert compare("abc", "") == []


def test_shades_follow_the_scale() -> None:
    plain, signed = Scale("entropy", "nats", 2.0), Scale("advantage", "", 2.0, signed=True)
    assert [plain.shade(v) for v in (None, 0.0, 1.0, 2.0, 9.0)] == [0, 0, 4, 8, 8]
    assert [signed.shade(v) for v in (-1.0, 1.0)] == [-4, 4]


def test_tokens_keep_the_text_whole(runs: list[Run]) -> None:
    for inside in look_inside(runs):
        for sheet in (s for kept in inside.kept for s in kept.sheets):
            shown = "".join(token.text for _, stretch in sheet.stretches for token in stretch)
            assert shown == "".join(sheet.row["pieces"][:MOST_TOKENS])
            for owner, stretch in sheet.stretches:
                if owner and owner.text != HOSTILE:
                    assert "".join(token.text for token in stretch) == owner.text


def test_settings_that_differ_come_first() -> None:
    rows = side_by_side([{"a": 1, "m": {"x": None}}, {"a": 1, "m": {"x": 2}}])
    assert rows == [("m.x", ["none", "2"], True), ("a", ["1", "1"], False)]


def test_report_does_not_import_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "opd", "opd", steps=20)
    code = (
        "import sys; from pathlib import Path; from potstill import report; from potstill.run import load_run;"
        "report.write(Path(sys.argv[1]) / 'r.html', [load_run(Path(sys.argv[1]) / 'opd')]);"
        "import json; print(json.dumps([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
