"""The benchmarks at tiny sizes: they run, both sides do the same work, and other work is noticed."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from benchmarks import __main__ as program
from benchmarks import models, plot, running, table, transcript
from benchmarks.case import ENVIRONMENT, NAMES, UNITS, Case, Goal
from benchmarks.overhead import Inside

EVERY = program.choose([], smoke=True)


def measured(case: Case, folder: Path, sides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each side in this process, on the files of `folder`."""
    given = {**case.params, "transcript": str(folder / "transcript.json")}
    params = json.loads(json.dumps(given).replace("{out}", str(folder)))
    module = import_module(f"benchmarks.{case.subject}")
    return {side: module.SIDES[side](params) for side in sides}


def test_the_program_measures_writes_and_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "PEERS", tmp_path / "none")
    code = program.main(["loss-64-dense", "--smoke", "--repeats", "1", "--out", str(tmp_path / "out")])
    assert code == 0
    assert "left out: liger, trl" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/results.json").read_text())
    [once] = found["cases"]["loss-64-dense"]["ours"]
    assert once["cpu_s"] > 0
    assert once["rss_mb"] > 50
    assert once["value"]["extra_mb"] >= 0
    page = (tmp_path / "out/table.md").read_text()
    assert page.count("| loss, V = 64, dense: CPU seconds | the matrix products alone |") == page.count("| loss") == 1
    assert all(caution in page for caution in table.CAUTIONS)


@pytest.mark.parametrize("name", ["rollouts-lab-4", "audits-300"])
def test_generate_writes_what_our_decoder_wrote(name: str, tmp_path: Path) -> None:
    [case] = [case for case in EVERY if case.name == name]
    for model in case.models:
        models.build(tmp_path / model, model)
    found = measured(case, tmp_path, case.sides)
    running.compare(case, {side: f["value"] for side, f in found.items()})
    rows = table.rows(case, {side: [f] for side, f in found.items()})
    assert [row.goal for row in rows] == list(case.goals)
    assert all(row.ratio and row.ratio.middle > 0 for row in rows)
    plot.ratios(rows, tmp_path / "ratios.svg")
    assert (tmp_path / "ratios.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", ["step-opd-32k", "step-grpo-lab", "step-sft-lab"])
def test_a_step_leaves_a_transcript_for_the_peer(name: str, tmp_path: Path) -> None:
    [case] = [case for case in EVERY if case.name == name]
    models.prompts(tmp_path / "prompts.jsonl", 40)
    for model in case.models:
        models.build(tmp_path / model, model)
    value = measured(case, tmp_path, ["ours"])["ours"]["value"]
    steps = transcript.read(str(tmp_path / "transcript.json"))
    assert len(steps) == len(value["losses"]) == len(value["grad_norms"]) == 2
    assert all(map(math.isfinite, value["losses"]))
    assert transcript.tokens(steps[1:]) == value["tokens_per_step"]
    assert all(line.prompt_ids and line.ids and line.messages for step in steps for line in step)


def test_cases_are_well_formed() -> None:
    full = program.choose([], smoke=False)
    assert len({case.name for case in full}) == len(full)
    for case in full + EVERY:
        assert set(case.sides) <= set(ENVIRONMENT)
        assert set(case.sides) <= set(NAMES)
        assert {goal.measure for goal in case.goals} <= set(UNITS)
    assert not any(goal.at_least or goal.limit for case in EVERY for goal in case.goals)
    assert any(goal.at_least for case in full for goal in case.goals)
    with pytest.raises(SystemExit, match="there is no case 'speed'"):
        program.choose(["speed"], smoke=True)


def test_other_work_is_noticed() -> None:
    case = Case(name="x", subject="loss", title="x", params={}, goals=(), equal={"losses": 1e-4})
    running.compare(case, {"ours": {"losses": [1.0, 2.0]}, "trl": {"losses": [1.00005, 2.0]}})
    for theirs in ([1.0, 2.001], [1.0], [1.0, math.nan]):
        with pytest.raises(running.NotEqual, match="losses of ours and trl differ"):
            running.compare(case, {"ours": {"losses": [1.0, 2.0]}, "trl": {"losses": theirs}})


def test_a_side_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(name="x", subject="loss", title="x", params={}, goals=())
    with pytest.raises(running.Failed, match="KeyError: 'lengths'"):
        running.run(case, tmp_path, 1, lambda _: None)


def test_a_goal_is_reached_by_the_median_and_the_spread_is_told() -> None:
    goal = Goal(measure="cpu_s", peer="trl", at_least=2.0)
    case = Case(name="x", subject="x", title="x", params={}, goals=(goal,))

    def row(ours: Sequence[float], theirs: Sequence[float], **other: Any) -> table.Row:
        changed = replace(case, goals=(replace(goal, **other),))
        [found] = table.rows(changed, {"ours": [_took(s) for s in ours], "trl": [_took(s) for s in theirs]})
        return found

    assert row([1, 1, 1], [2, 3, 4]).reached == "yes"
    assert row([1, 1, 1], [1.5, 3, 4]).reached == "yes, not in every repeat"
    assert row([1, 1, 1], [1.5, 1.6, 4]).reached == "no"
    assert row([1, 1, 1], [1.5, 1.6, 4], at_least=None).reached == ""
    assert row([1, 2, 4], [2, 2, 12]).cells()[2:5] == ["2 [1, 4] s", "2 [2, 12] s", "1.00 [1.00, 3.00]"]
    bound = replace(case, goals=(Goal(measure="own_percent", peer=None, limit=5.0),))
    [own] = table.rows(bound, {"ours": [{"value": {"own_percent": 4.0}}, {"value": {"own_percent": 4.5}}]})
    assert own.reached == "yes"


def _took(seconds: float) -> dict[str, Any]:
    return {"cpu_s": seconds, "value": {}}


def test_time_inside_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0])
    inside = Inside()
    inner = inside.wrap(lambda: "done")
    monkeypatch.setattr("time.process_time", lambda: next(now))
    outer = inside.wrap(inner)
    assert outer() == "done"
    assert inside.seconds == {"learn": 5.0}
