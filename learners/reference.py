"""This file holds the policy that a KL term pulls towards: the starting weights, or their moving mean over steps.

It lives beside the policy, sharded over the same ranks, and costs a forward pass per micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learners.layouts import MicroBatch
from learners.model import Policy
from rl.algorithm_config import ReferenceKl

Load = Callable[[torch.dtype], Policy]


class Reference:
    """Scores what the policy is trained on. frozen: in the compute dtype; ema: fp32 masters that follow the policy."""

    def __init__(self, settings: ReferenceKl, load: Load, master: torch.dtype, compute: torch.dtype) -> None:
        """`load` gives the starting policy, sharded, with masters of the dtype that it is given. A collective."""
        self._decay = settings.ema_decay if settings.reference == "ema" else None
        self._policy = load(compute if self._decay is None else master)
        self._policy.requires_grad_(False)

    @torch.no_grad()
    def score(self, packed: MicroBatch, temperature: float) -> Tensor:
        """Log-probabilities [N] of a micro-batch's answers, fp64, in nats, under the reference. A collective."""
        logprobs_N, _ = self._policy(*packed.inputs, temperature)
        self._policy.reshard()  # only a backward pass does so by itself
        return logprobs_N.double()

    @torch.no_grad()
    def follow(self, policy: Policy) -> None:
        """After an optimizer step: reference = decay * reference + (1 - decay) * policy, where it moves at all."""
        if self._decay is None:
            return
        for mine, theirs in zip(self._policy.parameters(), policy.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 1 - self._decay)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; nothing of a frozen one, which is loaded from where it came from."""
        if self._decay is None:
            return {}
        return {name: parameter.detach() for name, parameter in self._policy.model.named_parameters()}
