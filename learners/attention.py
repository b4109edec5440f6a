"""This file computes attention over rows in which several answers share a prompt, without a mask over the whole row.

A model reaches it through transformers' AttentionInterface, and the pattern of a forward pass through the keyword
arguments of the model's call, which transformers hands on to every attention layer. It computes in the dtype of the
queries and keys, as the model's own attention would; on a CPU at least in fp32, whose kernel takes a fifth of the time
that bf16's takes for the backward pass.

Shapes: B rows, L tokens of a row, P of its prompt, H query heads, K key heads, R = H / K, D head size; n answers of
similar length, A tokens of the longest of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from learners.layouts import Layout, RowLengths

NAME = "slipstream_shared_prefix"
KEYWORD = "attention_pattern"  # of the model's call
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some models' attention adds, and a pattern here does not
SIMILAR = 0.75  # of the longest answer's length: shorter ones are computed apart, not padded to it
SHORT = 16  # tokens below which padding is cheaper than another call


class Pattern(Protocol):
    """What sees what in one forward pass."""

    def attend(self, query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, scaling: float | None) -> Tensor:
        """The attention's output [B, L, H, D]."""
        ...


def register() -> None:
    """Make NAME known to transformers."""
    AttentionInterface.register(NAME, _attention)


def pattern_for(layout: Layout, device: torch.device) -> Pattern:
    """The fastest exact way for these rows on this device."""
    if layout.plain:
        return Causal()
    return Flex(layout, device) if device.type == "cuda" else Blocks(layout)


def context_limit(config: PreTrainedConfig) -> int | None:
    """Tokens of context up to which every layer sees all of it, which is what shared prefixes are laid out for.

    Raises ValueError where a layer is no attention at all: it would run on from one answer into the next.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise ValueError(
            f"a {config.model_type} has layers of kind {', '.join(sorted(kinds))}, in which answers behind one prompt "
            "cannot be kept apart; set learner.packing to per_answer"
        )
    sliding = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    chunked = getattr(config, "attention_chunk_size", None) if "chunked_attention" in kinds else None
    return min((limit for limit in (sliding, chunked) if limit), default=None)


class Causal:
    """Every row is plain text."""

    def attend(self, query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, scaling: float | None) -> Tensor:
        """See Pattern."""
        return _causal(query_BHLD, key_BKLD, value_BKLD, scaling).transpose(1, 2)


class Flex:
    """FlexAttention, which leaves out the blocks of the mask that are empty. On the CPU it has no backward pass."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        segment_BL = layout.segments().to(device)

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            other = segment_BL[row, key]
            return (query >= key) & ((other == 0) | (other == segment_BL[row, query]))

        count, width = segment_BL.shape
        self._flex, create = _flex_functions(device.type)
        self._mask = create(sees, count, None, width, width, device=device)

    def attend(self, query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, scaling: float | None) -> Tensor:
        """See Pattern."""
        heads, repeats = query_BHLD.shape[1], query_BHLD.shape[1] // key_BKLD.shape[1]
        shared = heads & (heads - 1) == 0  # the kernel shares key heads among powers of two only
        if not shared:
            key_BKLD, value_BKLD = (each.repeat_interleave(repeats, 1) for each in (key_BKLD, value_BKLD))
        found = self._flex(
            query_BHLD, key_BKLD, value_BKLD, block_mask=self._mask, scale=scaling, enable_gqa=shared and repeats > 1
        )
        return found.transpose(1, 2)


class Blocks:
    """Prompts causally; then each answer's queries over its prompt and itself, answers of similar length together.

    Work and memory grow with the pairs that see each other, where a mask over the row would cost all pairs of it.
    """

    def __init__(self, layout: Layout) -> None:
        self._rows = [_row_blocks(row, layout.width) for row in layout.rows]
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor] = {}  # kept for backward: one for all layers

    @torch.compiler.disable
    def attend(self, query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, scaling: float | None) -> Tensor:
        """See Pattern."""
        by_row = zip(query_BHLD.unbind(), key_BKLD.unbind(), value_BKLD.unbind(), strict=True)
        return torch.stack(
            [self._attend_row(row, tensors, scaling) for row, tensors in zip(self._rows, by_row, strict=True)]
        )

    def _attend_row(self, row: _RowBlocks, tensors: Sequence[Tensor], scaling: float | None) -> Tensor:
        sizes = [row.prompt, tensors[0].shape[1] - row.prompt]
        prompts, answers = zip(*(each.split(sizes, 1) for each in tensors), strict=True)
        query, key, value = (each[None] for each in prompts)
        pieces = [_causal(query, key, value, scaling)[0].transpose(0, 1)]
        pieces += [self._attend_answers(block, prompts, answers, scaling) for block in row.blocks]
        return torch.cat(pieces).index_select(0, row.home_L)

    def _attend_answers(
        self, block: _AnswerBlock, prompts: Sequence[Tensor], answers: Sequence[Tensor], scaling: float | None
    ) -> Tensor:
        """[n * A, H, D]. The R query heads of a key head stand behind each other, so that no key is repeated."""
        count, length = block.shape
        (heads, _, size), keys = answers[0].shape, answers[1].shape[0]
        query, own_key, own_value = (
            each.index_select(1, block.index).unflatten(1, block.shape).transpose(0, 1) for each in answers
        )
        key, value = (
            torch.cat([prompt.expand(count, *prompt.shape), own], 2)
            for prompt, own in ((prompts[1], own_key), (prompts[2], own_value))
        )
        repeats = heads // keys
        mask = self._mask(prompts[0].shape[1], length, repeats, _dtype_of(query))
        folded = query.reshape(count, keys, repeats * length, size)
        found = _attend(folded, key, value, attn_mask=mask, scale=scaling)
        return found.view(count, heads, length, size).transpose(1, 2).reshape(count * length, heads, size)

    def _mask(self, prompt: int, length: int, repeats: int, dtype: torch.dtype) -> Tensor:
        """[R * A, P + A], to be added: all of the prompt, and of the answer what is not ahead."""
        wanted = (prompt, length, repeats, dtype)
        if wanted not in self._masks:
            hidden = torch.ones(length, prompt + length, dtype=torch.bool).triu(prompt + 1).repeat(repeats, 1)
            self._masks[wanted] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        return self._masks[wanted]


@dataclass(frozen=True)
class _AnswerBlock:
    """Answers of similar length: where each of their n * A tokens stands behind the prompt; shape is (n, A)."""

    index: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class _RowBlocks:
    """One row's prompt and blocks. home_L says where in the pieces, one behind the other, each token of the row is."""

    prompt: int
    blocks: tuple[_AnswerBlock, ...]
    home_L: Tensor


def similar(lengths: Sequence[int]) -> list[list[int]]:
    """Which lengths go together, longest first: none is much shorter than the first of its run."""
    runs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        longest = lengths[runs[-1][0]] if runs else 0
        if runs and (longest <= SHORT or lengths[index] >= SIMILAR * longest):
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _row_blocks(row: RowLengths, width: int) -> _RowBlocks:
    if len(row.answers) <= 1:
        row = RowLengths(row.tokens)
    starts = [sum(row.answers[:number]) for number in range(len(row.answers))]
    home, done, blocks = list(range(row.prompt)) + [0] * (width - row.prompt), row.prompt, []
    for run in similar(row.answers):
        longest = row.answers[run[0]]
        index: list[int] = []
        for number in run:
            length, start, first = row.answers[number], starts[number], done + len(index)
            home[row.prompt + start : row.prompt + start + length] = range(first, first + length)
            # what is padded sees and is seen by padding alone, so that it may repeat any token
            index += [start + min(at, length - 1) for at in range(longest)]
        done += len(index)
        blocks.append(_AnswerBlock(torch.tensor(index), (len(run), longest)))
    return _RowBlocks(row.prompt, tuple(blocks), torch.tensor(home))


def _causal(query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, scaling: float | None) -> Tensor:
    """[B, H, L, D]."""
    shared = query_BHLD.shape[1] != key_BKLD.shape[1]
    return _attend(query_BHLD, key_BKLD, value_BKLD, is_causal=True, scale=scaling, enable_gqa=shared)


def _dtype_of(query: Tensor) -> torch.dtype:
    """What attention is computed in."""
    return torch.promote_types(query.dtype, torch.float32) if query.device.type == "cpu" else query.dtype


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    dtype = _dtype_of(query)
    return scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype), **options).to(query.dtype)


@functools.cache
def _flex_functions(device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """flex_attention and create_block_mask: compiled on CUDA, where both would make a table [L, L] otherwise."""
    if device == "cuda":
        return torch.compile(flex_attention), torch.compile(create_block_mask)
    return flex_attention, create_block_mask


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls; see its AttentionInterface."""
    added = [name for name in UNKNOWN if options.get(name) is not None]
    if added:
        raise ValueError(
            f"this model's attention has {', '.join(added)}, which shared prefixes are not computed with; "
            "set learner.packing to per_answer"
        )
    assert attention_mask is None, "what a token sees is the pattern's business"
    pattern: Pattern = options[KEYWORD]
    return pattern.attend(query, key, value, options.get("scaling")).contiguous(), None
