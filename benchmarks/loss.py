"""The distillation loss alone: hidden states and two output heads in, loss and gradients out."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from benchmarks.case import Case, Goal, Params
from benchmarks.worker import Clock, one_thread, peak_mb, result

STUDENT, TEACHER = 128, 256
"""Widths of the hidden states."""
SHAPES = {"dense": [128] * 4, "ragged": [128, 96, 56, 37, 24, 16, 9, 5]}
"""Lengths of the answers: 512 tokens of 512 positions; 371 of 1,024."""
AT_LEAST = {  # (vocabulary, shape) -> CPU time over TRL's
    (32_000, "ragged"): 8.0,
    (32_000, "dense"): 3.0,
}


def cases(smoke: bool) -> list[Case]:
    """Every vocabulary, dense and ragged."""
    out: list[Case] = []
    for vocab in (64, 97) if smoke else (512, 32_000, 151_936):
        for shape, lengths in SHAPES.items():
            dense, large = shape == "dense", vocab == 151_936
            goals = [Goal(measure="cpu_s", peer="trl", at_least=AT_LEAST.get((vocab, shape)))]
            least = 1.15 if dense and vocab == 32_000 else None
            goals.append(Goal(measure="cpu_s", peer="liger", at_least=least))
            goals.append(Goal(measure="extra_mb", peer="trl", at_least=3.0 if large else None))
            goals.append(Goal(measure="extra_mb", peer="liger"))
            goals.append(Goal(measure="cpu_s", peer="products"))
            out.append(
                Case(
                    name=f"loss-{vocab}-{shape}",
                    subject="loss",
                    title=f"loss, V = {vocab:,}, {shape}",
                    params={
                        "vocab": vocab,
                        "lengths": [n // 8 + 1 for n in lengths] if smoke else lengths,
                        "beta": 1.0,
                    },
                    goals=tuple(goals),
                    equal={"loss": 1e-4, "hidden_grad_norm": 1e-4, "head_grad_norm": 1e-4},
                )
            )
    return out


def inputs(params: Params) -> SimpleNamespace:
    """Equal tensors for every side: hidden states [B, T, H] in a usual range, heads [V, H], mask [B, T], labels [B, T]."""
    import torch

    draw = torch.Generator().manual_seed(0)
    lengths, vocab = params["lengths"], params["vocab"]
    shape = (len(lengths), max(lengths))

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=draw).mul_(scale)

    return SimpleNamespace(
        student=normal(*shape, STUDENT).requires_grad_(),
        student_head=normal(vocab, STUDENT, scale=STUDENT**-0.5).requires_grad_(),
        teacher=normal(*shape, TEACHER),
        teacher_head=normal(vocab, TEACHER, scale=TEACHER**-0.5),
        mask=(torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).float(),
        labels=torch.randint(vocab, shape, generator=draw),
        lengths=lengths,
        beta=params["beta"],
    )


def ours(x: SimpleNamespace) -> Any:
    """Our loss, its logged metrics included, as the learner calls it."""
    from contextlib import nullcontext

    import torch

    from potstill.batch import collate
    from potstill.learners.slices import Slices
    from potstill.methods.opd import OPD
    from potstill.split import Head
    from potstill.types import Prompt, Reviewed, Rollout, Target

    def head(weight: torch.Tensor, *, trains: bool) -> Head:
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.weight = torch.nn.Parameter(weight.detach(), requires_grad=trains)
        return Head(module, len(weight))

    def target(ids: list[int], hidden: torch.Tensor) -> Target:
        rollout = Rollout(
            prompt=Prompt(id="", messages=()),
            sample=0,
            prompt_ids=(0,),
            response_ids=tuple(ids),
            pieces=("",) * len(ids),
            old_logp=(0.0,) * len(ids),
            finish="length",
        )
        weight = torch.ones(len(ids))
        return Target(source=Reviewed(rollout=rollout), weight=weight, teacher_hidden=hidden, teacher_head=teacher)

    student, teacher = head(x.student_head, trains=True), head(x.teacher_head, trains=False)
    labels = [row[:n].tolist() for row, n in zip(x.labels, x.lengths, strict=True)]
    batch = collate([target(ids, h[: len(ids)]) for ids, h in zip(labels, x.teacher, strict=True)])
    known: Any = SimpleNamespace(head=student, hidden=lambda *_, **__: x.student[x.mask.bool()])
    slices = Slices(known, batch, packed=False)
    loss = sum(seen["loss"] for seen in slices.backward(OPD(beta=x.beta), nullcontext))
    x.student_head.grad = student.module.weight.grad
    return loss


def trl(x: SimpleNamespace) -> Any:
    """TRL's, as DistillationTrainer calls it."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss = _chunked_divergence_loss(
        x.student,
        x.teacher,
        x.student_head,
        x.teacher_head,
        x.mask,
        x.beta,
        num_items_in_batch=sum(x.lengths),
    )[0]
    loss.backward()
    return loss


def liger(x: SimpleNamespace) -> Any:
    """Liger's, without torch.compile, given the valid rows alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    found = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=x.beta, compiled=False)
    valid = x.mask.bool()
    loss = found(x.student[valid], x.student_head, x.teacher[valid], x.teacher_head, x.labels[valid])
    loss.backward()
    return loss


def products(x: SimpleNamespace) -> Any:
    """No loss: the four products of matrices that none can do without, on valid rows. Nothing beats their time by much."""
    import torch

    valid = x.mask.bool()
    with torch.no_grad():
        student, teacher = x.student[valid], x.teacher[valid]
        logits = student @ x.student_head.T
        logits.add_(teacher @ x.teacher_head.T)  # stands for the gradient
        x.student.grad = torch.zeros_like(x.student)
        x.student.grad[valid] = logits @ x.student_head
        x.student_head.grad = logits.T @ student
    return torch.zeros(())


def measured(loss_and_gradient: Callable[[SimpleNamespace], Any]) -> Callable[[Params], dict[str, Any]]:
    """Forward and backward, once to warm up and once by the clock; memory is what the process grew by."""

    def run(params: Params) -> dict[str, Any]:
        one_thread()
        small = {**params, "vocab": 64, "lengths": [4] * len(params["lengths"])}
        loss_and_gradient(inputs(small))  # imports, first calls
        x = inputs(params)
        before = peak_mb()
        for _ in range(2):
            x.student.grad = x.student_head.grad = None
            with Clock() as clock:
                value = loss_and_gradient(x)
        return result(
            clock,
            extra_mb=peak_mb() - before,
            loss=value.item(),
            hidden_grad_norm=x.student.grad.norm().item(),
            head_grad_norm=x.student_head.grad.norm().item(),
        )

    return run


SIDES = {"ours": measured(ours), "trl": measured(trl), "liger": measured(liger), "products": measured(products)}
