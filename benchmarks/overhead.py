"""What our loop adds to the arithmetic of the models: CPU time of a step outside their passes, the loss and the optimiser."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from benchmarks import step
from benchmarks.case import Case, Goal, Params
from benchmarks.worker import result

DECODER = (("potstill.kv", "Cache", ("read",)), ("potstill.lean", "Lean", ("read", "logits")))
"""Methods that are arithmetic: (module, class, names)."""


def cases(smoke: bool) -> list[Case]:
    """Of every OPD step."""
    return [
        replace(
            case,
            name=case.name.replace("step-opd", "overhead"),
            subject="overhead",
            title=case.title.replace("OPD step", "own overhead of the loop"),
            goals=(
                Goal(measure="own_percent", peer=None, limit=5.0),
                Goal(measure="own_sampling_percent", peer=None),
            ),
            equal={},
        )
        for case in step.cases(smoke)
        if case.name.startswith("step-opd")
    ]


class Inside:
    """CPU seconds inside the wrapped functions, by phase of the step; what runs inside another one counts once."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.phase, self.depth = "learn", 0  # depth: 1 inside a wrapped function

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return function(*args, **kwargs)
            self.depth, began = 1, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth = 0
                self.seconds[self.phase] += time.process_time() - began

        return timed

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The coroutine function, as one phase."""

        @wraps(function)
        async def phased(*args: Any, **kwargs: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return await function(*args, **kwargs)
            finally:
                self.phase = before

        return phased

    def passes(self, model: Any) -> None:
        """A model's passes, whole or of the layers alone. On the class: a model with parts of its own is decoded slowly."""
        for kind in {type(model), type(model.base_model)}:
            kind.forward = self.wrap(kind.forward)

    def decoder(self) -> None:
        """The decoder's own forward pass, where it has one."""
        for module, kind, names in DECODER:
            if find_spec(module):
                found = getattr(import_module(module), kind)
                for name in names:
                    setattr(found, name, self.wrap(getattr(found, name)))

    def watch(self, parts: Any) -> None:
        """Everything in a run that is arithmetic: passes, loss, backward, clipping, the optimiser."""
        import torch

        self.passes(parts.learner.model)
        if type(parts.teacher.loaded.model) is not type(parts.learner.model):
            self.passes(parts.teacher.loaded.model)
        self.decoder()
        kind = type(parts.method)
        kind.loss = self.wrap(kind.loss)
        parts.learner.optimizer.step = self.wrap(parts.learner.optimizer.step)
        torch.Tensor.backward = self.wrap(torch.Tensor.backward)  # type: ignore[method-assign]
        torch.nn.utils.clip_grad_norm_ = self.wrap(torch.nn.utils.clip_grad_norm_)
        parts.sampler.sample = self.during("sample", parts.sampler.sample)
        parts.teacher.feedback = self.during("teacher", parts.teacher.feedback)


def ours(params: Params) -> dict[str, Any]:
    """Shares of a step, the first left out, in per cent."""
    inside = Inside()
    module = import_module("benchmarks.ours")
    watched, _ = module.train(params, prepare=inside.watch, seen=lambda: dict(inside.seconds))
    clock, count = module.between(watched.ends), len(watched.ends) - 1
    spent = {phase: (total - watched.seen[0][phase]) / count for phase, total in watched.seen[-1].items()}
    own = clock.cpu_s - sum(spent.values())
    sampling = sum(row["time/sample"] for row in watched.rows[1:]) / count - spent["sample"]
    return result(
        clock,
        watched.rss_mb,
        own_percent=100 * own / clock.cpu_s,
        own_sampling_percent=100 * sampling / clock.cpu_s,
        arithmetic=spent,
    )


SIDES = {"ours": ours}
