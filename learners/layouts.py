"""This file lays rows out: how a group's answers become tensors, and what each token of a row may see.

A row is a prompt with one or more of its answers behind it. With packing shared_prefix a row has all of a group's, so
that the prompt is computed once; an answer sees the prompt and itself only, at the positions it was sampled at. With
per_answer each answer has a row and a copy of the prompt: plain causal text, for models that take no other mask.

Shapes: B rows of a micro-batch, L tokens of its longest row, N answer tokens, G answers of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from learners.advantages import Advantages
from rl.trajectory import Group

PADDING = -1
Packing = Literal["shared_prefix", "per_answer"]
Weights = tuple[float | None, ...]


@dataclass(frozen=True)
class PlannedRow:
    """A row before its payload is here: a group by its index in the batch, and which of its trajectories."""

    group: int
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """One row with what the whole batch decides of it, by trajectory; an advantage of None leaves an answer out.

    weights are of each token of an answer. fraction is how much of what is computed of the group is in this row.
    """

    group: Group
    advantages: Advantages
    weights: Weights
    fraction: float = 1.0

    @property
    def weight(self) -> float:
        """What all its tokens weigh together."""
        lengths = [len(trajectory.completion.token_ids) for trajectory in self.group.trajectories]
        parts = zip(self.advantages, self.weights, lengths, strict=True)
        return sum(weight * length for value, weight, length in parts if value is not None and weight is not None)


@dataclass(frozen=True)
class RowLengths:
    """Tokens of a row's prompt and of each answer behind it."""

    prompt: int
    answers: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt + sum(self.answers)


@dataclass(frozen=True)
class Layout:
    """The rows of one forward pass; shorter ones are padded at their end."""

    rows: tuple[RowLengths, ...]

    @property
    def width(self) -> int:
        """L."""
        return max(row.tokens for row in self.rows)

    @property
    def plain(self) -> bool:
        """Whether every row is causal text: a single answer goes on where its prompt ends."""
        return all(len(row.answers) <= 1 for row in self.rows)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest prompt with one of its answers."""
        return max(row.prompt + max(row.answers, default=0) for row in self.rows)

    def segments(self) -> Tensor:
        """[B, L] on the CPU: 0 in the prompt, 1.. in the answers, PADDING behind."""
        width = self.width
        return torch.tensor(
            [
                [0] * row.prompt
                + [number for number, length in enumerate(row.answers, start=1) for _ in range(length)]
                + [PADDING] * (width - row.tokens)
                for row in self.rows
            ]
        )

    def mask(self) -> Tensor:
        """[B, 1, L, L] on the CPU, bool: what sees what. Padding sees padding, since no row of a mask may be empty."""
        segment_BL, width = self.segments(), self.width
        same_BLL = segment_BL[:, :, None] == segment_BL[:, None, :]
        prompt_B1L = (segment_BL == 0)[:, None, :]
        causal_LL = torch.ones(width, width, dtype=torch.bool).tril()
        return (causal_LL & (same_BLL | prompt_B1L))[:, None]


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass. source_N are indices into [B * L]: where each target's logits come from.
    num_real of the B * L tokens are no padding.

    behaviour_N (nats), advantages_N and weights_N are fp64. lags_N, fp64, counts policy versions. sequence_N numbers
    the trajectories from 0; truncated_N marks the tokens of answers that were cut at max_tokens.
    """

    ids_BL: Tensor
    positions_BL: Tensor
    layout: Layout
    source_N: Tensor
    targets_N: Tensor
    behaviour_N: Tensor
    advantages_N: Tensor
    lags_N: Tensor
    weights_N: Tensor
    sequence_N: Tensor
    truncated_N: Tensor
    num_real: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Layout, Tensor, Tensor]:
        """What a forward pass takes, in the order of Policy.forward."""
        return self.ids_BL, self.positions_BL, self.layout, self.source_N, self.targets_N

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def rows_of(group: int, answers: Sequence[int], packing: Packing) -> list[PlannedRow]:
    """The rows in which these answers of a group are computed."""
    if packing == "per_answer":
        return [PlannedRow(group, (answer,)) for answer in answers]
    return [PlannedRow(group, tuple(answers))] if answers else []


def pack(shares: Sequence[Share], version: int) -> MicroBatch:
    """Rows to tensors. version is the learner's, from which a token's lag counts.

    Without rows it gives one of a single token and no answers: a rank takes part in the collectives of a micro-batch
    that only others have work for.
    """
    rows = [_pack_row(share, version) for share in shares] or [_Row([0], [0])]
    layout = Layout(tuple(RowLengths(row.prompt, tuple(row.lengths)) for row in rows))
    lengths, width = [length for row in rows for length in row.lengths], layout.width
    # causal text counts on through its padding: a model would take a position that falls for the start of another text
    behind = range(width) if layout.plain else [0] * width

    def joined(field: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for row in rows for value in getattr(row, field)], dtype=dtype)

    return MicroBatch(
        ids_BL=torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows]),
        positions_BL=torch.tensor([row.positions + list(behind[len(row.ids) :]) for row in rows]),
        layout=layout,
        source_N=torch.tensor([b * width + at for b, row in enumerate(rows) for at in row.source], dtype=torch.long),
        targets_N=joined("targets", torch.long),
        behaviour_N=joined("behaviour", torch.float64),
        advantages_N=joined("advantages", torch.float64),
        lags_N=joined("lags", torch.float64),
        weights_N=joined("weights", torch.float64),
        sequence_N=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long)),
        truncated_N=joined("truncated", torch.bool),
        num_real=sum(len(row.ids) for row in rows) if shares else 0,
    )


class _Row:
    """One row under construction: per token ids and positions, per answer token the rest."""

    def __init__(self, ids: list[int], positions: list[int]) -> None:
        self.ids = ids
        self.positions = positions
        self.prompt = len(ids)
        self.source: list[int] = []
        self.targets: list[int] = []
        self.behaviour: list[float] = []
        self.advantages: list[float] = []
        self.lags: list[int] = []
        self.weights: list[float] = []
        self.truncated: list[bool] = []
        self.lengths: list[int] = []


def _pack_row(share: Share, version: int) -> _Row:
    prompt = share.group.prompt.token_ids
    row = _Row(list(prompt), list(range(len(prompt))))
    for trajectory, value, weight in zip(share.group.trajectories, share.advantages, share.weights, strict=True):
        if value is None:
            continue
        assert weight is not None, "an answer with an advantage has a weight"
        completion, start, count = trajectory.completion, len(row.ids), len(trajectory.completion.token_ids)
        row.ids += completion.token_ids
        row.positions += range(len(prompt), len(prompt) + count)
        # an answer's first token is predicted at the prompt's last position
        row.source += [len(prompt) - 1, *range(start, start + count - 1)][:count]
        row.targets += completion.token_ids
        row.behaviour += completion.logprobs
        row.advantages += [value] * count
        row.weights += [weight] * count
        row.truncated += [completion.finish_reason == "length"] * count
        row.lengths.append(count)
        for span in completion.spans:
            row.lags += [version - span.version] * (span.end - span.start)
    return row
