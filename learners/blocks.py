"""This file prepares a model's decoder blocks for training: their attention, checkpointed activations, compilation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from learners import attention
from learners.layouts import Packing


@dataclass(frozen=True)
class BlockOptions:
    """How blocks compute: LearnerSection's packing, checkpoint_activations and compile."""

    packing: Packing = "shared_prefix"
    checkpoint_activations: bool = False
    compile: bool = False


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that are sharded, checkpointed and compiled each by itself, in order."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def prepare_blocks(model: PreTrainedModel, options: BlockOptions) -> None:
    """Change a model in place, before it is sharded: FSDP's hooks then stand around what is compiled or computed again.

    Names of modules and parameters stay, so that checkpoints and weight updates do not tell. A model whose attention
    cannot be replaced gets a mask of every row instead; with packing per_answer each keeps its own attention.
    """
    if options.packing == "shared_prefix":
        attention.context_limit(model.config)
        if model._supports_attention_backend:
            attention.register()
            model.set_attn_implementation(attention.NAME)
    for block in blocks_of(model):
        if options.compile:
            block.forward = torch.compile(block.forward)
        if options.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
