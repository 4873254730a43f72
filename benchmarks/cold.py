"""From the start of the process to the end of its first training step: imports, models, set-up, one step."""

import os
import time
from dataclasses import replace
from importlib import import_module
from typing import Any

from benchmarks import step
from benchmarks.case import Case, Goal, Params
from benchmarks.worker import Clock, result


def cases(smoke: bool) -> list[Case]:
    """The OPD steps, once."""
    out: list[Case] = []
    for case in step.cases(smoke):
        if case.name in ("step-opd-lab", "step-opd-32k"):
            recipe = {**case.params["recipe"], "steps": 1}
            out.append(
                replace(
                    case,
                    name=case.name.replace("step-opd", "cold"),
                    subject="cold",
                    title="cold start to the first finished step: " + case.title.partition(", ")[2],
                    params={**case.params, "recipe": recipe},
                    goals=(
                        Goal(measure="cpu_s", peer="trl", at_least=1.5),
                        Goal(measure="wall_s", peer="trl", at_least=1.5),
                    ),
                )
            )
    return out


def ours(params: Params) -> dict[str, Any]:
    """A run of ours."""
    watched, _ = import_module("benchmarks.ours").train(params)
    return _result(
        watched.ends[0], losses=[r["loss"] for r in watched.rows], grad_norms=[r["grad_norm"] for r in watched.rows]
    )


def trl(params: Params) -> dict[str, Any]:
    """The same step by TRL."""
    trainer, stamps, _, losses, followed = import_module("benchmarks.trainers").trained(params)
    cpu, wall = stamps.ends[0]
    own = followed[0].clock
    return _result(
        (cpu - own.cpu_s, wall - own.wall_s),
        losses=[loss.item() for loss in losses],
        grad_norms=[row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
    )


def _result(end: tuple[float, float], **value: Any) -> dict[str, Any]:
    clock = Clock()
    clock.cpu_s = end[0]  # process_time counts from the start of the process
    ago = time.perf_counter() - end[1]
    clock.wall_s = time.time() - ago - float(os.environ["BENCHMARK_STARTED"])
    return result(clock, **value)


SIDES = {"ours": ours, "trl": trl}
