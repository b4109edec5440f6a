"""This file loads the policy: a Hugging Face causal language model, sharded by FSDP2, that scores packed answers.

Shapes: B rows, L tokens of a row, N answer tokens.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from learners import attention
from learners.blocks import BlockOptions, blocks_of, prepare_blocks
from learners.layouts import Layout, RowLengths
from learners.logprobs import head_logprobs

PLAIN_BLOCKS = BlockOptions()
HeadDtype = Literal["bfloat16", "float32"]

logging.disable_progress_bar()  # a log is no place for one, nor is the table of `rl replay`


class Policy(nn.Module):
    """A causal language model whose forward pass gives answers' log-probabilities.

    They are computed inside forward, and not by the caller on hidden states, because FSDP2 has the head's weights
    gathered only between its hooks around this call.
    """

    def __init__(self, model: PreTrainedModel, head_dtype: HeadDtype = "bfloat16") -> None:
        """head_dtype float32 multiplies the compute dtype's hidden states and head weights in fp32.

        A bf16 logit between 16 and 32 is rounded to the nearest eighth of a nat, on each side in its own way: ScaleRL,
        arXiv 2510.13786, names an fp32 head on both sides as its largest single gain.
        """
        super().__init__()
        self.model = model
        self._head_dtype = head_dtype
        self._takes_patterns = model.config._attn_implementation == attention.NAME

    def forward(
        self,
        ids_BL: Tensor,
        positions_BL: Tensor,
        layout: Layout,
        source_N: Tensor,
        targets_N: Tensor,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N] of the targets and entropies [N], in nats; see layouts.MicroBatch and head_logprobs."""
        seeing = self._seeing(layout, ids_BL.device)
        hidden_BLH = self.model.base_model(
            ids_BL, position_ids=positions_BL, use_cache=False, **seeing
        ).last_hidden_state
        hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, source_N)
        weight_VH = self.model.get_output_embeddings().weight
        if self._head_dtype == "float32":
            precise = torch.promote_types(hidden_NH.dtype, torch.float32)
            hidden_NH, weight_VH = hidden_NH.to(precise), weight_VH.to(precise)
        return head_logprobs(hidden_NH, weight_VH, targets_N, temperature, entropy_gradient)

    def _seeing(self, layout: Layout, device: torch.device) -> dict[str, Any]:
        """The arguments by which the model is told what sees what."""
        if not layout.plain:
            limit = attention.context_limit(self.model.config)
            if limit is not None and layout.longest_context > limit:
                raise ValueError(
                    f"a prompt and its answer have {layout.longest_context} tokens, of which some layers of this model "
                    f"see only {limit} at once; set learner.packing to per_answer"
                )
        if self._takes_patterns:
            return {"attention_mask": None, attention.KEYWORD: attention.pattern_for(layout, device)}
        return {"attention_mask": None if layout.plain else layout.mask().to(device)}


@torch.no_grad()
def score_sequence(policy: Policy, token_ids: tuple[int, ...]) -> tuple[float, ...]:
    """Log-probabilities in nats, at temperature 1, of a sequence's tokens after the first. A collective."""
    ids_L = torch.tensor(token_ids, device=next(policy.parameters()).device)
    order_L = torch.arange(len(ids_L), device=ids_L.device)
    layout = Layout((RowLengths(len(ids_L)),))
    logprobs_L, _ = policy(ids_L[None], order_L[None], layout, order_L[:-1], ids_L[1:], 1.0)
    policy.reshard()  # only a backward pass does so by itself: the root's parameters would stay whole, in bf16
    return tuple(logprobs_L.tolist())


def join_ranks(rendezvous: str, rank: int, world_size: int, device: str, deadline_s: float) -> bool:
    """Enter the process group of the ranks (gloo on CPU, NCCL on CUDA); False if this process is already in one.

    rendezvous is a torch.distributed init method, such as tcp://127.0.0.1:29500 or file:///path. deadline_s bounds
    every collective from here on.
    """
    if dist.is_initialized():
        return False
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=deadline_s),
    )
    return True


def load_policy(
    model_dir: str,
    device: str,
    master_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    head_dtype: HeadDtype = "bfloat16",
    options: BlockOptions = PLAIN_BLOCKS,
) -> Policy:
    """Load and shard over all ranks of the process group: masters in one dtype, computing in another.

    The model stays in eval mode: dropout would make the learner's log-probabilities differ from the engine's. It must
    have a head without bias, and logits that are nothing but the head's.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=master_dtype, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None or getattr(model.config, "final_logit_softcapping", None):
        raise ValueError(
            f"{model_dir}: a head with a bias or a logit soft-cap is not supported; choose another model.path"
        )
    prepare_blocks(model, options)
    return shard(Policy(model.eval(), head_dtype), device, compute_dtype)


def shard(policy: Policy, device: str, compute_dtype: torch.dtype) -> Policy:
    """Apply FSDP2 to each block and to the whole. Gradients are reduced in the masters' dtype, as a sum over ranks."""
    master_dtype = next(policy.parameters()).dtype
    world_size = dist.get_world_size()
    options = {
        "mesh": init_device_mesh(device, (world_size,), mesh_dim_names=("ranks",)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=master_dtype),
    }
    for block in blocks_of(policy.model):
        fully_shard(block, **options)
    fully_shard(policy, **options)
    if world_size > 1:
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                # FSDP averages over ranks, but our weights are global already; gloo knows no other reduction than sum
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return policy
