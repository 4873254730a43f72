"""From a recipe to the parts of a run. The one place where back-ends meet methods."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill import models
from potstill.checks import NEEDS, check, device, method_of, task_of
from potstill.config import Config, Teacher
from potstill.decode import Decoding
from potstill.errors import ConfigError
from potstill.learners.local import LocalLearner
from potstill.learners.recorder import Recorder
from potstill.methods.base import Method
from potstill.models import Tokens
from potstill.samplers.ahead import AheadSampler
from potstill.samplers.asked import AskedSampler
from potstill.samplers.base import Sampler
from potstill.samplers.data import DataSampler
from potstill.samplers.hf import HFSampler, Translated
from potstill.samplers.phased import PhasedSampler
from potstill.samplers.scored import ScoredSampler
from potstill.tasks.base import Task
from potstill.teachers import load as remote
from potstill.teachers import served
from potstill.teachers.asking import Asking
from potstill.teachers.base import Teacher as TeacherProtocol
from potstill.teachers.hf import HFTeacher, ModelTeacher
from potstill.teachers.settings import Potstill
from potstill.types import Prompt
from potstill.verifiers.base import Verifier


@dataclass(frozen=True, slots=True)
class Parts:
    """All that a step needs, with models in memory."""

    method: Method
    task: Task
    verifier: Verifier
    questions: list[Prompt]
    learner: LocalLearner
    sampler: Sampler
    """Writes what the method learns from: the student, the teacher or the data set."""
    teacher: TeacherProtocol | None
    reference: TeacherProtocol | None
    own: TeacherProtocol
    """The student as it is now, where a method asks it how it would go on."""
    recorder: Recorder | None


def build(config: Config, folder: Path | None = None) -> Parts:
    """Check the recipe, then load its models. `folder` is the run's: a teacher that is paid keeps its answers there."""
    tokens, questions = check(config)
    method = method_of(config)
    teacher = _load_teacher(config, method, tokens, folder or Path("runs") / config.name)
    if teacher is not None and teacher.offers < method.wants:
        raise ConfigError(
            f"{method.name} needs {NEEDS[method.wants]} of the teacher, but {teacher.name!r} shows only "
            f"{NEEDS[teacher.offers]}. Use method omniopd, or a server that sends log-probs of the prompt, such as vLLM"
        )
    s = config.student
    student = models.load(s.path, dtype=s.dtype, device=device(s.device), eos=s.eos)
    learner = LocalLearner(
        student,
        config.learner,
        steps=config.steps,
        seed=config.seed,
        reference="reference" in method.needs,
        lora=s.lora,
        projection=config.projection,
    )
    if config.learner.packed and not (method.per_token and learner.split):
        why = "they get other logits there than alone" if method.per_token else "its loss is of whole answers"
        raise ConfigError(
            f"learner.packed = true would have no effect: {method.name} cannot train {s.path} on packed texts, as {why}. "
            "Remove it; learner.micro_tokens bounds memory as well"
        )
    return Parts(
        method=method,
        task=task_of(config),
        verifier=task_of(config).verifier(),
        questions=questions,
        learner=learner,
        sampler=_sampler(config, method, learner, teacher),
        teacher=teacher,
        reference=_reference(config, method, learner),
        own=HFTeacher(learner.loaded, learner.tokens, decoding=Decoding(cells=config.rollouts.batch_cells)),
        recorder=Recorder(config.geometry, learner.model) if config.geometry.every else None,
    )


def _load_teacher(config: Config, method: Method, student: Tokens, folder: Path) -> ModelTeacher | Asking | None:
    t = config.teacher
    if t is None:
        return None
    # Hidden states are turned into log-probs in the loss, so that nobody else may ask for them before.
    hides = method.reads_hidden and (config.select is None or config.select.by in ("entropy", "random"))
    if isinstance(t, Potstill):
        return served.load(t, student, device=device(t.device), hides=hides)
    if not isinstance(t, Teacher):
        return remote.load(t, student, folder, config.name, config.seed)
    loaded = models.load(t.path, dtype=t.dtype, device=device(t.device), eos=t.eos)
    how = Decoding(temperature=t.temperature, top_p=t.top_p, cells=t.batch_cells)
    return HFTeacher(
        loaded, student, decoding=how, text_only=t.text_only, align=t.align, shuffled=t.shuffled, hides=hides
    )


def _reference(config: Config, method: Method, learner: LocalLearner) -> HFTeacher | None:
    if method.refers_to == "start":
        initial, around = learner.initial()
        how = Decoding(cells=config.rollouts.batch_cells)
        return HFTeacher(initial, learner.tokens, decoding=how, around=around)
    if config.reference is None:
        return None
    r = config.reference
    loaded = models.load(r.path, dtype=r.dtype, device=device(r.device), eos=r.eos)
    return HFTeacher(loaded, learner.tokens, decoding=Decoding(cells=config.rollouts.batch_cells))


def _sampler(config: Config, method: Method, learner: LocalLearner, teacher: TeacherProtocol | None) -> Sampler:
    if method.author == "data":
        return DataSampler(learner.tokens)
    how = Decoding(cells=config.rollouts.batch_cells)
    if config.rollouts.ahead:
        return AheadSampler(learner.loaded, decoding=how)
    student = HFSampler(learner.loaded, decoding=how)
    by_student = method.author == "student" and method.examples is None and not config.rollouts.off_policy
    if by_student:
        return student
    assert teacher is not None  # _check_teacher has seen to it
    writer: Sampler = AskedSampler(teacher, learner.tokens)
    if isinstance(teacher, HFTeacher):
        writer = Translated(HFSampler(teacher.loaded, decoding=teacher.how), learner.tokens)
    if config.rollouts.off_policy:
        scorer = HFTeacher(learner.loaded, learner.tokens, decoding=Decoding(cells=config.rollouts.batch_cells))
        return ScoredSampler(writer, scorer)
    if method.examples is None:
        return writer
    return PhasedSampler(student, writer, task_of(config).verifier(), method.examples)


def environment() -> dict[str, Any]:
    """Versions and hardware of this process. Never a key, never an environment variable."""
    import platform
    from importlib.metadata import version

    packages = ("potstill", "torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "pydantic")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "versions": {name: version(name) for name in packages},
    }
