"""This file makes the gradient of a batch, micro-batch by micro-batch, and keeps what is measured on the way.

Shapes: N computed answer tokens of a micro-batch, M of the whole batch over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from learners.algorithms import Algorithm
from learners.gradient_noise import GradientNoise
from learners.layouts import MicroBatch, Share, pack
from learners.losses import Tokens
from learners.model import Policy
from learners.policy_health import (
    TokenFacts,
    distance_to_reference,
    gather,
    gather_facts,
    health,
    nothing_computed,
    objective,
)
from learners.reference import Reference
from learners.stopwatch import Stopwatch
from rl.metrics import Metrics, mean

Shares = Sequence[Sequence[Share]]  # of this rank, by micro-batch


class BatchGradient:
    """Forward and backward of one rank. Every call is a collective of all ranks."""

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        algorithm: Algorithm,
        temperature: float,
        stopwatch: Stopwatch,
    ) -> None:
        self._policy = policy
        self._reference = reference
        self._algorithm = algorithm
        self._temperature = temperature
        self._stopwatch = stopwatch
        self._device = next(policy.parameters()).device

    def accumulate(self, shares: Shares, rank_tokens: Sequence[int], version: int) -> tuple[TokenFacts, Metrics]:
        """Leave the batch's gradient, summed over ranks, in place; returns the computed tokens and metrics over them.

        version is the learner's, from which lags count. rank_tokens are the answer tokens of each rank. Without any
        there is no gradient, a loss of 0, and none of the metrics that are means over tokens.
        """
        if not sum(rank_tokens):
            empty = TokenFacts.none()
            return empty, objective(empty) | nothing_computed()
        cutoff = self._prepared(shares, rank_tokens, version)
        noise = GradientNoise(list(self._policy.parameters()), len(shares))
        facts, sizes = [], torch.zeros(2, dtype=torch.float64, device=self._device)
        for index, mine in enumerate(shares):
            packed = self._pack(mine, version)
            with self._stopwatch.measure("forward"):
                loss, found = self._forward(packed, cutoff)
            with self._stopwatch.measure("backward"):
                loss.backward()
            noise.after(index, mine)
            facts.append(found)
            sizes += torch.tensor([packed.num_real, packed.ids_BL.numel()], device=self._device)
        with self._stopwatch.measure("gather_metrics"):
            batch = gather_facts(facts, rank_tokens)
            dist.all_reduce(sizes)  # guardrails judge metrics on every rank, and must find the same
            num_real, num_padded = sizes.tolist()
        padding = {"learner/padding_fraction": mean(1 - num_real / num_padded, num_padded)}
        measured = health(batch) | objective(batch) | noise.metrics() | padding
        return batch, measured | (distance_to_reference(batch) if self._reference else {})

    def _prepared(self, shares: Shares, rank_tokens: Sequence[int], version: int) -> float:
        """What the loss makes of the whole batch before any token's: one more forward pass, where it asks for it."""
        if self._algorithm.prepare is None:
            return math.inf
        log_ratios = []
        for mine in shares:
            packed = self._pack(mine, version)
            with self._stopwatch.measure("prepare"), torch.no_grad():
                logprobs_N, _ = self._policy(*packed.inputs, self._temperature)
                self._policy.reshard()  # no backward pass follows that would
            log_ratios.append(logprobs_N.double() - packed.behaviour_N)
        return self._algorithm.prepare(gather(torch.cat(log_ratios)[None], rank_tokens)[0])

    def _pack(self, mine: Sequence[Share], version: int) -> MicroBatch:
        with self._stopwatch.measure("pack"):
            return pack(mine, version).to(self._device)

    def _forward(self, packed: MicroBatch, cutoff: float) -> tuple[Tensor, TokenFacts]:
        """The weighted loss of a micro-batch, and what is kept of its tokens."""
        wanted = self._algorithm.needs_entropy_gradient
        logprobs_N, entropy_N = self._policy(*packed.inputs, self._temperature, wanted)
        tokens = Tokens(
            logprobs_N=logprobs_N.double(),
            behaviour_N=packed.behaviour_N,
            advantages_N=packed.advantages_N,
            lags_N=packed.lags_N,
            sequence_N=packed.sequence_N,
            truncated_N=packed.truncated_N,
            entropy_N=entropy_N.double(),
            reference_N=self._reference.score(packed, self._temperature) if self._reference else None,
            cutoff=cutoff,
        )
        losses = self._algorithm.objective(tokens)
        facts = TokenFacts(
            logprobs_N=tokens.logprobs_N.detach(),
            behaviour_N=packed.behaviour_N,
            entropy_N=tokens.entropy_N.detach(),
            lags_N=packed.lags_N,
            advantages_N=packed.advantages_N,
            clipped_N=losses.clipped_N.double(),
            masked_N=losses.masked_N.double(),
            loss_N=losses.loss_N.detach() * packed.weights_N,
            reference_N=tokens.logprobs_N.detach() if tokens.reference_N is None else tokens.reference_N,
        )
        return (losses.loss_N * packed.weights_N).sum(), facts
