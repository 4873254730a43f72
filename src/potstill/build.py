"""From a recipe to the parts of a run. The one place where back-ends meet methods.

`check` does all that can be done without weights: tokenizers, data, and whether the parts fit. `Parts` then loads.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill import models
from potstill.config import Config, Teacher
from potstill.decode import Decoding
from potstill.errors import ConfigError
from potstill.learners.local import LocalLearner
from potstill.learners.recorder import Recorder
from potstill.methods.base import Method
from potstill.models import Tokens
from potstill.samplers.asked import AskedSampler
from potstill.samplers.base import Sampler
from potstill.samplers.data import DataSampler, answer_ids
from potstill.samplers.hf import HFSampler, Translated, prompt_within
from potstill.samplers.phased import PhasedSampler
from potstill.samplers.scored import ScoredSampler
from potstill.tasks.base import Task
from potstill.teachers import load as remote
from potstill.teachers.asking import Asking
from potstill.teachers.base import Teacher as TeacherProtocol
from potstill.teachers.hf import HFTeacher
from potstill.teachers.settings import HTTP, Replay
from potstill.types import Prompt, Wants
from potstill.verifiers.base import Verifier

BASES = ("self", "random", "inputs")
NEEDS = {
    Wants.TEXT: "text",
    Wants.SAMPLED: "the log-probability of each token",
    Wants.TOPK: "the likeliest tokens at each position",
    Wants.FULL: "its whole distribution at each position",
}


def device(name: str) -> str:
    """`auto` is a GPU if there is one. On a CPU, one thread: for small models two are slower. Raises ConfigError."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if chosen.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device = {name!r} is none that potstill knows. Use 'auto', 'cpu', 'cuda' or 'cuda:1'")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}, but torch {torch.__version__} sees no GPU. Use device = 'auto' or 'cpu'")
    if chosen == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return chosen


def check(config: Config) -> tuple[Tokens, list[Prompt]]:
    """Everything that can go wrong before a weight is loaded. Returns the student's tokens and the questions."""
    method, task = _method(config), _task(config)
    _check_teacher(config, method)
    _check_reference(config, method)
    _check_rollouts(config, method)
    _check_selection(config, method)
    _check_budget(config, method)
    _check_geometry(config)
    if config.steps and config.learner.warmup >= config.steps:
        raise ConfigError(
            f"learner.warmup = {config.learner.warmup} is not shorter than steps = {config.steps}, so the learning rate "
            "would never arrive. Lower warmup or raise steps"
        )
    if config.learner.lr >= 1:
        raise ConfigError(
            f"learner.lr = {config.learner.lr} moves every weight by more than 1 a step. Try 1e-3 or less"
        )
    if config.student.dtype == "bfloat16" and not config.student.lora:
        raise ConfigError(
            "student.dtype = 'bfloat16' without LoRA would train weights of 8 bits' precision, which round most small "
            "steps away. Use learner.precision = 'bfloat16' (arithmetic only), or add [student.lora]"
        )
    device(config.student.device)
    student = models.load_tokens(config.student.path, config.student.eos)
    readers = [student]
    if config.teacher is not None:
        readers += _check_tokens(config, method, student)
    if config.reference is not None:
        device(config.reference.device)
        models.check_shared(student, models.load_tokens(config.reference.path, config.reference.eos))
    questions = task.questions(config.eval.split, config.eval.questions) if config.eval.questions else []
    asked = [*task.draw(config.seed, 1, config.rollouts.prompts), *task.known()]
    for prompt in [*questions, *asked]:
        for tokens in readers:
            prompt_within(tokens, prompt, config.rollouts.max_tokens)
    if "verdict" in method.needs:
        _check_answers(method, asked)
    if method.author == "data":
        for prompt in task.known():
            answer_ids(student, prompt, config.rollouts.max_tokens)
    return student, questions


def _writes(config: Config, method: Method) -> bool:
    """Whether the teacher writes whole answers."""
    return method.author == "teacher" or method.examples is not None or config.rollouts.off_policy


def _check_tokens(config: Config, method: Method, student: Tokens) -> list[Tokens]:
    """The teacher's tokenizer, where it has one that we know of, checked against the student's."""
    if isinstance(config.teacher, Teacher):
        device(config.teacher.device)
        teacher = models.load_tokens(config.teacher.path, config.teacher.eos)
    elif isinstance(config.teacher, HTTP):
        teacher = models.load_tokens(config.teacher.tokenizer, config.teacher.eos)
    else:
        return []
    differ = models.same_tokenizer(student, teacher)
    if config.teacher.align and differ is None:
        raise ConfigError(
            f"teacher.align carries the scores of another tokenizer over to the student's, but {teacher.name} has the "
            "student's own, so it would have no effect. Remove it"
        )
    if method.wants > Wants.TEXT and not config.teacher.align:
        models.check_shared(student, teacher)
    if (_writes(config, method) or method.imitates) and differ is None:
        models.check_eos(student, teacher)
    return [teacher]


def _check_teacher(config: Config, method: Method) -> None:
    name, teacher = method.name, config.teacher
    if teacher is None:
        if not method.teacherless:
            what = NEEDS[method.wants] if method.wants > Wants.NOTHING else "its answers"
            raise ConfigError(
                f"{name} learns from a teacher ({what}), but the recipe names none. Add [teacher] with path = ..."
            )
        return
    if method.teacherless:
        raise ConfigError(f"{name} as set here asks no teacher, so [teacher] would have no effect. Remove the table")
    if not isinstance(teacher, Teacher):
        remote.check(teacher, name, method.wants)
    if isinstance(teacher, Replay):
        return
    if isinstance(teacher, Teacher | HTTP) and teacher.text_only and method.wants > Wants.TEXT:
        raise ConfigError(
            f"{name} needs {NEEDS[method.wants]} of the teacher, but teacher.text_only leaves only text. "
            "Use method omniopd, or remove text_only"
        )
    if isinstance(teacher, Teacher | HTTP) and teacher.align and (teacher.text_only or method.wants <= Wants.TEXT):
        why = "teacher.text_only leaves only text" if teacher.text_only else f"{name} as set here asks for none"
        raise ConfigError(
            f"teacher.align carries the teacher's scores over to the student's tokens, but {why}, so it would have no "
            "effect. Remove one of the two, or use a method that asks for scores, such as opd"
        )
    writes = method.examples is not None or config.rollouts.off_policy
    if method.wants > Wants.TEXT and not writes and (teacher.temperature != 1 or teacher.top_p != 1):
        raise ConfigError(
            f"{name} reads the teacher's scores, which are always at temperature 1, so teacher.temperature and top_p would "
            "have no effect. Remove them (opd: method.teacher_temperature flattens the scores)"
        )
    shuffled = isinstance(teacher, Teacher) and teacher.shuffled
    if shuffled and method.wants is not Wants.TEXT:
        raise ConfigError(
            f"teacher.shuffled gives every prompt the continuations of another, but {name} asks for none. Remove it, or "
            "use a method that learns from continuations, such as omniopd"
        )
    if shuffled and getattr(method, "narrow", 0):
        raise ConfigError(
            "teacher.shuffled gives every prompt the continuations of another, but method.narrow asks again about few prompts, "
            "sometimes one, which would get its own. Set method.narrow = 0"
        )
    if shuffled and config.rollouts.prompts == 1:
        raise ConfigError(
            "teacher.shuffled needs another prompt to take continuations from, but rollouts.prompts = 1. Set it to 2 or more"
        )
    if teacher.temperature == 0 and "variety" in method.needs:
        raise ConfigError(
            f"{name} asks for several answers to the same question, but teacher.temperature = 0 makes them all the same "
            "text: one answer counted many times, at many times the price. Set teacher.temperature = 1, or ask once"
        )


def _check_reference(config: Config, method: Method) -> None:
    if method.refers_to == "base" and config.reference is None:
        raise ConfigError(
            f'{method.name} with reference = "base" starts from the teacher before its RL, but the recipe does not name that '
            'model. Add [reference] with path = ..., or set method.reference = "start" (the initial student)'
        )
    if method.refers_to != "base" and config.reference is not None:
        raise ConfigError(
            f"{method.name} as set here asks no other model for a reference, so [reference] would have no effect. Remove "
            'the table, or use a method with reference = "base"'
        )


def _check_answers(method: Method, prompts: list[Prompt]) -> None:
    without = [p.id for p in prompts if p.answer is None]
    if without:
        raise ConfigError(
            f"{method.name} as set here needs a verdict on every answer, but {len(without)} of {len(prompts)} prompts have "
            f"no answer to compare with (the first: {without[0]!r}). Add the column, or use a method without a verifier, such "
            "as sampled_kl"
        )


def _check_budget(config: Config, method: Method) -> None:
    if config.budget.teacher_tokens and not (method.corrects or method.author == "teacher"):
        asks = "asks no teacher" if method.teacherless else "does not ask the teacher about every answer"
        raise ConfigError(
            f"budget.teacher_tokens may never end a run of {method.name}, which as set here {asks}. "
            "Give steps or budget.rollout_tokens"
        )


def _check_selection(config: Config, method: Method) -> None:
    if config.select and method.imitates:
        raise ConfigError(
            f"[select] keeps some of the tokens that the student wrote, but {method.name} as set here learns from what the "
            "teacher writes in their place. Remove [select], or use omniopd without dagger"
        )
    if config.select is None or config.select.by == "random":
        return
    if method.author != "student":
        raise ConfigError(
            f"select.by = {config.select.by!r} looks at the student's own tokens, but {method.name} learns from the "
            f"{method.author}'s. Remove [select], or use by = 'random'"
        )
    if config.select.by != "entropy" and (method.wants < Wants.SAMPLED or not method.corrects):
        raise ConfigError(
            f"select.by = {config.select.by!r} compares the teacher's scores with the student's, but {method.name} asks for "
            "none. Use by = 'entropy', or a method that asks for scores"
        )


def _check_geometry(config: Config) -> None:
    projection = config.projection
    for table, wanted in (("projection", projection is not None), ("geometry", config.geometry.every > 0)):
        if wanted and config.student.lora:
            raise ConfigError(
                f"[{table}] is about whole weight matrices, but [student.lora] trains an adapter beside them, whose updates "
                "have at most its rank anyway. Remove one of the two (`potstill geometry` reads adapters)"
            )
    if projection and projection.basis == "self" and projection.at == 0:
        raise ConfigError(
            'projection.from = "self" takes the subspace of the update so far, but at projection.at = 0 there is none. '
            "Set at = 0.2, say, or take the basis from elsewhere"
        )
    if projection and projection.basis not in BASES and not Path(projection.basis).is_file():
        raise ConfigError(
            f"projection.from = {projection.basis!r} is neither {', '.join(BASES)} nor a file. Give one of these, or the "
            "geometry/step_N.npz of a run that recorded its updates ([geometry])"
        )


def _check_rollouts(config: Config, method: Method) -> None:
    group, room = config.rollouts.group, config.rollouts.max_tokens
    greedy = (method.author == "teacher" or config.rollouts.off_policy) and getattr(config.teacher, "temperature", 1) == 0
    if group > 1 and (greedy or method.author == "data"):
        who = "the data set has one answer" if not greedy else "teacher.temperature = 0 writes one answer"
        raise ConfigError(
            f"rollouts.group = {group}, but {who} to a prompt, so each would be learnt {group} times over. "
            "Set rollouts.group = 1"
        )
    if "group" in method.needs and group < 2:
        raise ConfigError(
            f"{method.name} as set here compares the answers to a prompt with each other, but rollouts.group = {group}, so "
            "none would be better than another. Set rollouts.group = 8 (and fewer rollouts.prompts), or use a method that "
            "takes right and wrong as they are (opdvr; sgopd with sign = 'outcome')"
        )
    if config.rollouts.resample and (group < 2 or "verdict" not in method.needs):
        raise ConfigError(
            f"rollouts.resample = {config.rollouts.resample} replaces prompts whose answers all score alike, which needs "
            f"several answers to a prompt (rollouts.group = {group}) and a method that uses verdicts ({method.name}). Remove it"
        )
    if config.rollouts.horizon and (config.rollouts.horizon.start >= room or method.author == "data"):
        raise ConfigError(
            f"rollouts.horizon.start = {config.rollouts.horizon.start} shortens nothing: answers have at most {room} tokens "
            f"(rollouts.max_tokens) and are written by the {method.author}. Lower it, or remove the horizon"
        )
    if config.rollouts.horizon and (not method.corrects or method.examples):
        why = "learns from verdicts, which an answer that is cut off does not have"
        if method.examples:
            why = "has answers of the teacher verified (phased), and none that is cut off can be right"
        raise ConfigError(
            f"rollouts.horizon cuts answers off, but {method.name} as set here {why}. Remove one of the two"
        )
    if config.rollouts.off_policy and (method.author != "student" or method.examples or method.wants <= Wants.TEXT):
        raise ConfigError(
            f"rollouts.off_policy lets the teacher write in the student's place, but {method.name} as set here "
            "does not learn from the student's answers alone by the teacher's scores. Remove it, or use opd or sampled_kl"
        )
    if "entropy" in method.needs and method.author != "student":
        raise ConfigError(
            f"{method.name} needs the entropies of what it learns from, but its rollouts are written by the "
            f"{method.author}, and only the student's have them. Let the student write"
        )
    method.check(room, group=group, updates=config.learner.updates)


def _method(config: Config) -> Method:
    if not isinstance(config.method, Method):
        raise ConfigError(
            f"method {type(config.method).__name__} is no potstill.methods.base.Method. Derive it from Method"
        )
    return config.method


def _task(config: Config) -> Task:
    assert isinstance(config.task, Task)
    return config.task


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
    method = _method(config)
    teacher = _load_teacher(config, tokens, folder or Path("runs") / config.name)
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
    return Parts(
        method=method,
        task=_task(config),
        verifier=_task(config).verifier(),
        questions=questions,
        learner=learner,
        sampler=_sampler(config, method, learner, teacher),
        teacher=teacher,
        reference=_reference(config, method, learner),
        own=HFTeacher(learner.loaded, learner.tokens, decoding=Decoding(cells=config.rollouts.batch_cells)),
        recorder=Recorder(config.geometry, learner.model) if config.geometry.every else None,
    )


def _load_teacher(config: Config, student: Tokens, folder: Path) -> HFTeacher | Asking | None:
    t = config.teacher
    if t is None:
        return None
    if not isinstance(t, Teacher):
        return remote.load(t, student, folder, config.name)
    loaded = models.load(t.path, dtype=t.dtype, device=device(t.device), eos=t.eos)
    how = Decoding(temperature=t.temperature, top_p=t.top_p, cells=t.batch_cells)
    return HFTeacher(loaded, student, decoding=how, text_only=t.text_only, align=t.align, shuffled=t.shuffled)


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
    student = HFSampler(learner.loaded, decoding=Decoding(cells=config.rollouts.batch_cells))
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
    return PhasedSampler(student, writer, _task(config).verifier(), method.examples)


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
