"""This file turns hidden states into log-probabilities under the sampling distribution, without fp32 logits of a batch.

Shapes: N answer tokens, H hidden size, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 64  # the float logits of a chunk stay in a CPU core's cache: a third faster than 512


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature)[target] and the entropy, one chunk of float logits at a time.

    Kept for the backward pass are the head's own logits in the dtype it multiplies in, and one or two numbers per
    token; autograd would keep the table [N, V] in fp32 and walk over it several times. The backward pass overwrites the
    kept logits with their gradient, so it can run only once.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        logits_NV = hidden_NH @ weight_VH.T
        precise = torch.promote_types(logits_NV.dtype, torch.float32)
        logprobs_N, entropy_N, normaliser_N = (
            torch.empty(len(targets_N), dtype=precise, device=hidden_NH.device) for _ in range(3)
        )
        for chunk in _chunks(len(targets_N)):
            logits_CV = logits_NV[chunk].to(precise) / temperature
            normaliser_C = logits_CV.logsumexp(-1)
            logprobs_N[chunk] = logits_CV.gather(1, targets_N[chunk, None])[:, 0] - normaliser_C
            probabilities_CV = (logits_CV - normaliser_C[:, None]).exp_()
            entropy_N[chunk] = normaliser_C - (probabilities_CV.mul_(logits_CV)).sum(-1)
            normaliser_N[chunk] = normaliser_C
        context.save_for_backward(hidden_NH, weight_VH, targets_N)
        context.kept = (logits_NV, normaliser_N, temperature)
        context.entropy_N = entropy_N.clone() if entropy_gradient else None
        if not entropy_gradient:
            context.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """With z = logits / temperature: d log p_target / dz = 1[target] - p, and dH / dz = -p (log p + H)."""
        hidden_NH, weight_VH, targets_N = context.saved_tensors
        logits_NV, normaliser_N, temperature = context.kept
        scaled_N = gradients[0] / temperature
        for chunk in _chunks(len(targets_N)):
            logprobs_CV = logits_NV[chunk].to(normaliser_N.dtype).div_(temperature)
            logprobs_CV.sub_(normaliser_N[chunk, None])
            if context.entropy_N is None:
                gradient_CV = logprobs_CV.exp_().mul_(-scaled_N[chunk, None])
            else:
                bonus_N = gradients[1][chunk, None] / temperature
                factor_CV = (logprobs_CV + context.entropy_N[chunk, None]).mul_(bonus_N).add_(scaled_N[chunk, None])
                gradient_CV = logprobs_CV.exp_().mul_(factor_CV).neg_()
            gradient_CV.scatter_add_(1, targets_N[chunk, None], scaled_N[chunk, None])
            logits_NV[chunk] = gradient_CV
        return logits_NV @ weight_VH, logits_NV.T @ hidden_NH, None, None, None


def head_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets [N] and entropies [N], in nats, in fp32 or better.

    Both are under softmax(logits / temperature), the distribution that the engine samples from and reports
    (`processed_logprobs`): at another temperature the importance weights would be wrong. The entropy carries a gradient
    only where asked: it is the same again as that of the log-probabilities, for a number that is mostly just reported.

    The head multiplies in the dtype of its arguments. From fp32 arguments the kept logits take 4 bytes each, not 2.
    """
    return _HeadLogprobs.apply(hidden_NH, weight_VH, targets_N, temperature, entropy_gradient)


def _chunks(num_tokens: int) -> list[slice]:
    return [slice(start, start + CHUNK_TOKENS) for start in range(0, num_tokens, CHUNK_TOKENS)]
