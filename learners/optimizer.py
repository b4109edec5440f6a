"""This file moves the weights: AdamW, linear warm-up, clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class NonFiniteGradient(RuntimeError):
    """The gradient holds an infinity or a NaN; the weights have not been touched."""


def adamw(parameters: Iterable[nn.Parameter], betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over fp32 masters, with its state in place from the start, so that a checkpoint has one form."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def warmed_up(lr: float, steps_done: int, warmup_steps: int) -> float:
    """The learning rate of the next step: rises in equal parts, and is lr from step `warmup_steps` on."""
    return lr * min(1.0, (steps_done + 1) / max(1, warmup_steps))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients down to a global norm of at most max_norm; returns the norm before, the same on each rank.

    Raises NonFiniteGradient.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    value = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(value):
        raise NonFiniteGradient(
            f"the gradient's global norm is {value}; the weights are still those before this step. "
            "Lower learner.lr, or look at this step's groups for log-probabilities that are not finite"
        )
    return value


def apply_step(optimizer: torch.optim.AdamW, lr: float) -> None:
    """One update at this learning rate; the gradients are gone after it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
