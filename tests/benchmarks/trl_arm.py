"""This file is TRL's side of bench_trl.py, a program of its own: GRPOTrainer on the same prompts, timed step by step.

    python trl_arm.py ORDER.json

The order names model, prompts, steps, seed, setting and the folder for the final model and times.json. A setting such
as mixed-16x4 is a precision (mixed: fp32 weights under bf16 autocast; bf16: bf16 weights), the micro-batches that an
optimizer step accumulates, and the answers in each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.last_number import last_number
from tests.benchmarks.trl_prompts import read_rows


@dataclass(frozen=True)
class Order:
    """What to train; `answers` is a step's, `max_tokens` an answer's."""

    model: str
    prompts: str
    folder: str
    setting: str
    seed: int
    steps: int
    group_size: int
    answers: int
    max_tokens: int
    lr: float


def parsed(setting: str) -> tuple[str, int, int]:
    """Precision, micro-batches, and answers in each, of a setting such as mixed-16x4."""
    precision, _, shape = setting.partition("-")
    accumulated, _, together = shape.partition("x")
    if precision not in ("mixed", "bf16"):
        raise ValueError(f"setting {setting!r} is of no known precision; write mixed-16x4 or bf16-16x4")
    return precision, int(accumulated), int(together)


def trainer_arguments(order: Order) -> dict[str, Any]:
    """GRPOConfig's arguments: what Slipstream does too, and whatever makes TRL faster here."""
    precision, accumulated, together = parsed(order.setting)
    assert accumulated * together == order.answers, "each setting makes the same optimizer steps"
    return {
        "output_dir": order.folder,
        "seed": order.seed,
        "max_steps": order.steps,
        "learning_rate": order.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,  # Slipstream's
        "loss_type": "grpo",
        "beta": 0.0,
        "num_generations": order.group_size,
        "max_completion_length": order.max_tokens,
        "temperature": 1.0,
        "per_device_train_batch_size": together,
        "gradient_accumulation_steps": accumulated,  # all answers of a step are generated at once: TRL's default
        "bf16": precision == "mixed",
        "model_init_kwargs": {"dtype": "float32" if precision == "mixed" else "bfloat16"},
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def main(order: Order) -> None:
    """Train, then save the final model and the wall-clock times at which steps ended."""
    # TRL would import vLLM for a server that it may generate with: half a minute here
    importlib.import_module("trl.import_utils").is_vllm_available = lambda *_, **__: False
    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ended: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ended.append(time.time())

    trainer = GRPOTrainer(
        model=order.model,
        reward_funcs=last_number,
        args=GRPOConfig(**trainer_arguments(order)),
        train_dataset=datasets.Dataset.from_list(read_rows(Path(order.prompts))),
        processing_class=AutoTokenizer.from_pretrained(order.model),
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model(order.folder)
    (Path(order.folder) / "times.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Order(**json.loads(Path(sys.argv[1]).read_text())))
