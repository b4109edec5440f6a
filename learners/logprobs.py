"""This file turns hidden states into log-probabilities under the sampling distribution, without fp32 logits of a batch.

Shapes: N answer tokens, H hidden size, V vocabulary, T tokens whose logits are held at once, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 256 << 20  # of logits at once; a batch with more of them has them made again in the backward pass
CHUNK_TOKENS = {"cpu": 64, "cuda": 512}  # on a CPU float logits then stay in a core's cache: a third faster than 512


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / temperature)[target] and the entropy, one chunk of float logits at a time.

    Kept for the backward pass are one or two numbers per token, and the head's own logits in the dtype it multiplies
    in where KEPT_BYTES hold all of them; autograd would keep the table [N, V] in fp32 and walk over it several times.
    Where they do not, the backward pass multiplies again, by the same blocks of T tokens, so that it finds the same
    bits. It overwrites logits with their gradient, so it can run only once.
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
        precise = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprobs_N, entropy_N, normaliser_N = (
            torch.empty(len(targets_N), dtype=precise, device=hidden_NH.device) for _ in range(3)
        )
        blocks, kept_TV = _blocks(hidden_NH, weight_VH), None
        for block in blocks:
            logits_TV = hidden_NH[block] @ weight_VH.T
            for chunk, inside in _chunks(block, hidden_NH.device):
                logits_CV = logits_TV[inside].to(precise) / temperature
                normaliser_C = logits_CV.logsumexp(-1)
                logprobs_N[chunk] = logits_CV.gather(1, targets_N[chunk, None])[:, 0] - normaliser_C
                probabilities_CV = (logits_CV - normaliser_C[:, None]).exp_()
                entropy_N[chunk] = normaliser_C - (probabilities_CV.mul_(logits_CV)).sum(-1)
                normaliser_N[chunk] = normaliser_C
            kept_TV = logits_TV if len(blocks) == 1 else None
            del logits_TV  # or two blocks would stand beside each other
        context.save_for_backward(hidden_NH, weight_VH, targets_N)
        context.kept = (kept_TV, normaliser_N, temperature)
        context.entropy_N = entropy_N.clone() if entropy_gradient else None
        if not entropy_gradient:
            context.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_NH, weight_VH, targets_N = context.saved_tensors
        kept_TV, normaliser_N, _ = context.kept
        blocks = _blocks(hidden_NH, weight_VH)
        if len(blocks) == 1:
            _to_gradient(context, blocks[0], kept_TV, targets_N, gradients)
            return kept_TV @ weight_VH, kept_TV.T @ hidden_NH, None, None, None
        hidden_gradient_NH = torch.empty_like(hidden_NH)
        weight_gradient_VH = torch.zeros_like(weight_VH, dtype=normaliser_N.dtype)  # a bf16 sum of blocks would round
        for block in blocks:
            logits_TV = hidden_NH[block] @ weight_VH.T
            _to_gradient(context, block, logits_TV, targets_N, gradients)
            hidden_gradient_NH[block] = logits_TV @ weight_VH
            weight_gradient_VH += logits_TV.T @ hidden_NH[block]
            del logits_TV
        return hidden_gradient_NH, weight_gradient_VH.to(weight_VH.dtype), None, None, None


def _to_gradient(
    context: Any, block: slice, logits_TV: Tensor, targets_N: Tensor, gradients: tuple[Tensor, ...]
) -> None:
    """Overwrite a block's logits: with z = logits / temperature, d log p_target / dz = 1[target] - p, and dH / dz =
    -p (log p + H)."""
    _, normaliser_N, temperature = context.kept
    scaled_N = gradients[0] / temperature
    for chunk, inside in _chunks(block, logits_TV.device):
        logprobs_CV = logits_TV[inside].to(normaliser_N.dtype).div_(temperature)
        logprobs_CV.sub_(normaliser_N[chunk, None])
        if context.entropy_N is None:
            gradient_CV = logprobs_CV.exp_().mul_(-scaled_N[chunk, None])
        else:
            bonus_N = gradients[1][chunk, None] / temperature
            factor_CV = (logprobs_CV + context.entropy_N[chunk, None]).mul_(bonus_N).add_(scaled_N[chunk, None])
            gradient_CV = logprobs_CV.exp_().mul_(factor_CV).neg_()
        gradient_CV.scatter_add_(1, targets_N[chunk, None], scaled_N[chunk, None])
        logits_TV[inside] = gradient_CV


def head_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets [N] and entropies [N], in nats, in fp32 or better.

    Both are under softmax(logits / temperature), the distribution that the engine samples from and reports
    (`processed_logprobs`): at another temperature the importance weights would be wrong. The entropy carries a gradient
    only where asked: it is the same again as that of the log-probabilities, for a number that is mostly just reported.

    The head multiplies in the dtype of its arguments. From fp32 arguments a logit takes 4 bytes, not 2.
    """
    return _HeadLogprobs.apply(hidden_NH, weight_VH, targets_N, temperature, entropy_gradient)


def _blocks(hidden_NH: Tensor, weight_VH: Tensor) -> list[slice]:
    """The tokens cut into runs of T whose logits KEPT_BYTES hold; one run, perhaps empty, where they hold all."""
    count = max(1, KEPT_BYTES // (len(weight_VH) * hidden_NH.element_size()))
    return [slice(start, min(start + count, len(hidden_NH))) for start in range(0, max(1, len(hidden_NH)), count)]


def _chunks(block: slice, device: torch.device) -> list[tuple[slice, slice]]:
    """The chunks of a block: of all tokens, and of the block."""
    size = CHUNK_TOKENS.get(device.type, 512)
    found = [slice(start, min(start + size, block.stop)) for start in range(block.start, block.stop, size)]
    return [(chunk, slice(chunk.start - block.start, chunk.stop - block.start)) for chunk in found]
