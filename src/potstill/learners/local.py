"""A learner in this process: AdamW on one device, with gradients that do not depend on how a batch is split."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from potstill.batch import collate, count_tokens, moved, read_tokens
from potstill.config import Learner as LearnerConfig
from potstill.config import LoRA, Projection
from potstill.errors import CheckpointError, ConfigError, TrainingError
from potstill.learners.policy import Context, LocalPolicy
from potstill.learners.slices import Initial, Slices
from potstill.learners.subspace import Subspace, second_moments
from potstill.methods.base import Method, Metrics
from potstill.models import Loaded, adapting, merge
from potstill.seeds import derive
from potstill.split import Split
from potstill.types import Batch, Target

FIRST = ("mismatch",)
"""Of the first update alone, while learner and sampler have the same weights."""


class LocalLearner:
    """Trains `loaded.model` in place. With LoRA only the adapter moves, and the reference is the model without it."""

    def __init__(
        self,
        loaded: Loaded,
        config: LearnerConfig,
        *,
        steps: int | None,
        seed: int,
        reference: bool,
        lora: LoRA | None,
        projection: Projection | None = None,
    ):
        self.tokens, self.config, self.steps, self.seed = loaded.tokens, config, steps, seed
        self.model, self.lora = loaded.model, lora
        self._base: Context  # what to enter for the reference
        if lora:
            self.model = _adapted(loaded.model, lora, derive(seed, "lora"))
            self._initial, self._base = self.model, self.model.disable_adapter
            self.model.eval()  # peft wraps in training mode; the base model's own dropout stays off, as in sampling
        else:
            self._initial = copy.deepcopy(loaded.model) if reference else None
            self._base = contextlib.nullcontext
            self.model.requires_grad_(True)
        self.subspace = Subspace(projection, self.model, seed) if projection else None
        self.split = Split.of(self.model, self.tokens.vocab, packed=config.packed)
        self._start = self._initial_parts()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )

    @property
    def loaded(self) -> Loaded:
        """The model as it is now, for samplers in the same process."""
        return Loaded(self.model, self.tokens)

    def rate(self, step: int, done: float) -> float:
        """Learning rate of a step, counted from 1: linear warm-up, then by the share of the run that is done.

        The schedule starts behind the warm-up where the number of steps is known, and ends just above 0.
        """
        c = self.config
        if step <= c.warmup:
            return c.lr * step / c.warmup
        warm = c.warmup / self.steps if self.steps else 0.0
        x = (done - warm) / (1 - warm)
        if c.schedule == "cosine":
            return c.lr * (0.5 + 0.5 * math.cos(x * math.pi))
        return c.lr * (1 - x) if c.schedule == "linear" else c.lr

    def step(self, targets: Sequence[Target], method: Method, step: int, done: float = 0.0) -> dict[str, float]:
        """All updates on the targets of one step; metrics are means over the updates, those named *_max the largest.

        Raises TrainingError when loss or gradient is not a number.
        """
        rate, rows = self.rate(step, done), []
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.subspace and not self.subspace.bases and done >= self.subspace.config.at:
            self._confine(targets)
        terms = method.terms(targets, step)
        dropout = derive(self.seed, step, "dropout")
        compared = self._cosine(*terms, method, dropout) if terms else {}
        torch.manual_seed(dropout)
        for update in range(self.config.updates):
            rows.append(self._gradient(targets, method, step, update))
            self._step()
        joined = {n: (max if n.endswith("_max") else fmean)(row[n] for row in rows) for n in rows[0]}
        joined |= {name: rows[0][name] for name in FIRST if name in rows[0]}
        if self.subspace and self.subspace.bases:
            joined["projection/inside"] = self.subspace.inside_share()
        return joined | compared | {"lr": rate, "trained_tokens": count_tokens(targets)}

    def _step(self) -> None:
        if self.subspace is None or not self.subspace.bases:
            return self.optimizer.step()
        before = {n: w.detach().clone() for n, w in self.subspace.weights.items()}
        self.optimizer.step()
        return self.subspace.project_step(before)

    def _confine(self, targets: Sequence[Target]) -> None:
        """From now on updates stay in a subspace; this batch shows the layers' inputs where the basis is of them."""
        assert self.subspace is not None
        texts = [torch.tensor([[*t.rollout.prompt_ids, *t.rollout.response_ids]]) for t in targets]

        def forward() -> Iterator[None]:
            for ids in texts:
                with torch.no_grad():
                    self.model(input_ids=ids.to(self.model.device), use_cache=False)
                yield

        of_inputs = self.subspace.config.basis == "inputs"
        self.subspace.begin(second_moments(self.subspace.layers, forward()) if of_inputs else {})
        self._add_inside()

    def _add_inside(self) -> None:
        """Give the coordinates within the subspace to the optimiser; they decay towards nothing."""
        assert self.subspace is not None
        if self.subspace.inside:
            self.optimizer.add_param_group({"params": list(self.subspace.inside.values()), "weight_decay": 0.0})

    def _gradient(self, targets: Sequence[Target], method: Method, step: int, update: int) -> dict[str, float]:
        """Loss and gradient of all targets.

        The divisors are counted over all targets before the first backward pass, so the gradient is the same however the
        batch is split into micro-batches.
        """
        metrics = self._backward(targets, method)
        if self.subspace:
            self.subspace.project_gradients()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.clip or float("inf"))
        metrics["grad_norm"] = norm.item()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                before = (
                    f"{step - 1}" if update == 0 else f"{step - 1} after {update} of {self.config.updates} updates more"
                )
                raise TrainingError(
                    f"step {step}: {name} is {metrics[name]}, so the step was not taken and the weights are those of step "
                    f"{before}. The usual cause is a learning rate that is too high (here "
                    f"{self.optimizer.param_groups[0]['lr']:.2g}). Lower learner.lr and start a new run, with the last "
                    "checkpoint as student.path to keep what was learnt"
                )
        return metrics

    def _backward(self, targets: Sequence[Target], method: Method) -> dict[str, float]:
        """Set the gradient of the loss on all targets; its value and metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        n_tokens, metrics = count_tokens(targets), {"loss": 0.0}
        self._adapter_dropout(True)
        for micro in self._micro(targets):
            batch = moved(collate(micro, n_tokens, len(targets)), self.model.device)
            for seen in self._parts(batch, method):
                for name, value in seen.items():
                    join = max if name.endswith("_max") else float.__add__
                    metrics[name] = join(metrics.get(name, 0.0), value.item())
        self._adapter_dropout(False)
        return metrics

    def _parts(self, batch: Batch, method: Method) -> Iterator[Metrics]:
        """Losses and metrics of the parts of a batch, whose gradients are added up."""
        if method.per_token and self.split:
            with self._autocast():
                slices = Slices(self.split, batch, packed=self.config.packed)
            yield from slices.backward(method, self._autocast, self._start)
            return
        with self._autocast():
            loss, seen = method.loss(self.policy(batch), batch)
        loss.backward()
        yield {"loss": loss.detach(), **seen}

    def _cosine(self, a: Sequence[Target], b: Sequence[Target], method: Method, dropout: int) -> dict[str, float]:
        """Cosine of the gradients of the loss on two versions of the targets; nothing if one of them is zero."""
        moving = [p for p in self.model.parameters() if p.requires_grad]
        found: list[Tensor] = []
        for targets in (a, b):
            torch.manual_seed(dropout)
            self._backward(targets, method)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in moving]
            found.append(torch.cat([g.flatten() for g in grads]).double().cpu())
        lengths = found[0].norm() * found[1].norm()
        return {"term/cosine": (found[0] @ found[1] / lengths).item()} if lengths else {}

    def initial(self) -> tuple[Loaded, Context]:
        """The frozen initial student, and what to enter while it is asked."""
        assert self._initial is not None, "the method did not declare that it needs the reference"
        return Loaded(self._initial, self.tokens), self._base

    def policy(self, batch: Batch) -> LocalPolicy:
        """The student's view of a batch, with the reference's behind it."""
        frozen = partial(LocalPolicy, self._initial, self.tokens.vocab, batch, around=self._as_reference)
        return LocalPolicy(self.model, self.tokens.vocab, batch, reference=None if self._initial is None else frozen)

    def _initial_parts(self) -> Initial | None:
        split = None
        if self._initial is not None:
            split = Split.of(self._initial, self.tokens.vocab, packed=self.config.packed)
        if split is None:
            return None
        # An adapter on the output layer is stepped around once and for all: to switch all of them off takes milliseconds.
        plain = getattr(split.head.module, "base_layer", split.head.module)
        return Initial(replace(split, head=replace(split.head, module=plain)), self._base)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """No gradient, and no adapter."""
        with torch.no_grad(), self._base():
            yield

    def save(self, folder: Path) -> None:
        """The model in Hugging Face format with its tokenizer, and all that a resumed run needs (trainer.pt)."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.lora:
            self.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
            self.tokens.tokenizer.save_pretrained(folder / "adapter")
            state["adapter"] = {k: v for k, v in self.model.state_dict().items() if "lora_" in k}
            merged = merge(copy.deepcopy(self.model))
        else:
            merged = self.model
        if self.subspace:
            state["projection"] = self.subspace.state()
        merged.generation_config.eos_token_id = list(self.tokens.eos)  # what ends a response, for whoever loads it
        merged.save_pretrained(folder)
        self.tokens.tokenizer.save_pretrained(folder)
        with (folder / "trainer.pt").open("wb") as file:  # given a path, torch hides that the disk is full
            torch.save(state, file)

    def restore(self, folder: Path) -> None:
        """Weights and optimiser as `save` left them, bit for bit. Raises CheckpointError."""
        from safetensors.torch import load_file

        try:
            state = torch.load(folder / "trainer.pt", weights_only=True)
            if self.lora:
                self.model.load_state_dict(state["adapter"], strict=False)
            else:
                weights: dict[str, Tensor] = {}
                for part in sorted(folder.glob("*.safetensors")):
                    weights |= load_file(part)
                missing = set(dict(self.model.named_parameters())) - set(weights)
                if missing or not weights:
                    raise KeyError(f"no weights for {sorted(missing)[:1]}")
                self.model.load_state_dict(weights, strict=False)
            if self.subspace:
                self.subspace.restore(state["projection"])
                self._add_inside()
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {folder} is damaged ({type(error).__name__}: {str(error).partition(chr(10))[0][:120]}), so the run "
                f"cannot go on from it. Write the name of an older checkpoint into {folder.parent / 'latest'}, or start anew"
            ) from None

    def _adapter_dropout(self, on: bool) -> None:
        """Only the adapter drops, and only while the loss is computed."""
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train(on)

    def _micro(self, targets: Sequence[Target]) -> Iterator[Sequence[Target]]:
        part: list[Target] = []
        for target in targets:
            most, room = self.config.micro_batch or len(targets), self.config.micro_tokens or math.inf
            if part and (len(part) == most or sum(map(read_tokens, [*part, target])) > room):
                yield part
                part = []
            part.append(target)
        if part:
            yield part

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)


def _adapted(model: Any, lora: LoRA, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # peft draws A from torch's own generator
    targets = list(lora.modules) if lora.modules else "all-linear"
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        with adapting():
            return get_peft_model(model, config)
    except ValueError:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ConfigError(
            f"student.lora.modules = {targets} are not all layers of this model, so there is nothing to adapt. "
            f"Linear layers: {', '.join(linear)}"
        ) from None
