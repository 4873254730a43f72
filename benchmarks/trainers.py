"""TRL's trainers on the work that our side wrote down: same weights, prompts, answers, optimiser and learning rate."""

import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from benchmarks import transcript
from benchmarks.case import Params
from benchmarks.ours import between
from benchmarks.transcript import Steps
from benchmarks.worker import one_thread, peak_mb, result


class Stamps(TrainerCallback):
    """The time of each step's end."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.rss_mb = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        self.ends.append((time.process_time(), time.perf_counter()))
        self.rss_mb = peak_mb()


def arguments(params: Params, folder: str, steps: Steps) -> dict[str, Any]:
    """What all three trainers are given. Where TRL's defaults differ, docs/benchmarks.md says so."""
    learner = params["recipe"]["learner"]
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": len(steps[0]),
        "gradient_accumulation_steps": 1,
        "max_steps": len(steps),
        "learning_rate": learner["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "seed": 0,
    }


def load(path: str) -> Any:
    """A model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def distillation(params: Params, steps: Steps, folder: str) -> Any:
    """DistillationTrainer."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    recipe = params["recipe"]
    return DistillationTrainer(
        model=load(params["student"]),
        teacher_model=load(params["teacher"]),
        args=DistillationConfig(
            **arguments(params, folder, steps),
            max_completion_length=recipe["rollouts"]["max_tokens"],
            beta=recipe["method"]["beta"],
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": line.messages} for step in steps for line in step]),
        processing_class=tokenizer(params["student"]),
    )


def grpo(params: Params, steps: Steps, folder: str) -> Any:
    """GRPOTrainer; rewards are the verdicts that our side gave."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rollouts, given = params["recipe"]["rollouts"], iter(steps)

    def reward(**_: Any) -> list[float]:
        return [line.verdict for line in next(given)]

    return GRPOTrainer(
        model=load(params["student"]),
        reward_funcs=reward,
        args=GRPOConfig(
            **arguments(params, folder, steps),
            max_completion_length=rollouts["max_tokens"],
            num_generations=rollouts["group"],
            beta=0.0,
            loss_type="dapo",
            scale_rewards="none",
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": line.messages} for step in steps for line in step[:: rollouts["group"]]]
        ),
        processing_class=tokenizer(params["student"]),
    )


def sft(params: Params, steps: Steps, folder: str) -> Any:
    """SFTTrainer on token ids, so that its own tokenisation, which we do in every step, costs it nothing."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=load(params["student"]),
        args=SFTConfig(
            **arguments(params, folder, steps),
            completion_only_loss=True,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "input_ids": line.prompt_ids + line.ids,
                    "completion_mask": [0] * len(line.prompt_ids) + [1] * len(line.ids),
                }
                for step in steps
                for line in step
            ]
        ),
        processing_class=tokenizer(params["student"]),
    )


def tokenizer(path: str) -> Any:
    """Padded on the left, as generation wants it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, padding_side="left")


TRAINERS = {"opd": distillation, "grpo": grpo, "sft": sft}


def trained(params: Params, count: int | None = None) -> tuple[Any, Stamps, Steps, list[Any], list[Any]]:
    """A trainer that has trained; `count`: only so many steps."""
    one_thread()
    method = params["recipe"]["method"]["name"]
    steps = transcript.read(params["transcript"])[:count]
    followed: list[Any] = []
    losses: list[Any] = []
    with TemporaryDirectory() as folder:
        trainer = TRAINERS[method](params, steps, folder)
        stamps = Stamps()
        trainer.add_callback(stamps)
        trainer.remove_callback(PrinterCallback)
        if method != "sft":
            _follow(trainer, steps, followed)
        compute = trainer.compute_loss

        def noted(*args: Any, **kwargs: Any) -> Any:
            loss = compute(*args, **kwargs)
            losses.append(loss.detach())
            return loss

        trainer.compute_loss = noted
        trainer.train()
    return trainer, stamps, steps, losses, followed


def _follow(trainer: Any, steps: Steps, followed: list[Any]) -> None:
    """Let the trainer's own `generate` write what our side wrote."""
    from benchmarks.follow import Follow

    generate, given = trainer.model.generate, iter(steps)

    def following(*args: Any, **kwargs: Any) -> Any:
        pad = trainer.processing_class.pad_token_id
        followed.append(Follow([line.ids for line in next(given)], pad))
        return generate(*args, logits_processor=[followed[-1]], **kwargs)

    trainer.model.generate = following


def steps(params: Params) -> dict[str, Any]:
    """CPU seconds of a step, the first left out; losses and gradient norms of all."""
    trainer, stamps, lines, losses, followed = trained(params)
    clock = between(stamps.ends)
    clock.cpu_s -= _mean([f.clock.cpu_s for f in followed[1:]])
    clock.wall_s -= _mean([f.clock.wall_s for f in followed[1:]])
    return result(
        clock,
        stamps.rss_mb,
        losses=[loss.item() for loss in losses],
        grad_norms=[row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
        tokens_per_step=transcript.tokens(lines[1:]) / (len(lines) - 1),
        following_cpu_s=_mean([f.clock.cpu_s for f in followed[1:]]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
