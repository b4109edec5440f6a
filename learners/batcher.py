"""This file lays a batch out: which rank trains which groups together, and how a group becomes one packed row.

A group's prompt is computed once: its row is the prompt followed by every scored answer, and a mask lets an answer see
the prompt and itself only, at the positions it was sampled at. This is exact, and two to three times less work.

Shapes: B rows (groups) of a micro-batch, L tokens of its longest row, N answer tokens, G answers of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learners.advantages import Advantages
from learners.aggregations import Aggregation
from rl.trajectory import Group, GroupEntry

PADDING = -1


@dataclass(frozen=True)
class BatchPlan:
    """Who trains what. micro_batches[rank][i] holds indices into the batch's entries, [] where a rank just takes part.

    Every rank has the same number of micro-batches, because a forward pass is a collective under FSDP.
    rank_tokens are the answer tokens of each rank. weights[group][i] is what each token of the group's i-th scored
    trajectory weighs in the loss.
    """

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    rank_tokens: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Answer tokens of the batch."""
        return sum(self.rank_tokens)


@dataclass(frozen=True)
class Share:
    """A group with what the whole batch decides of it: advantages by trajectory, weights by scored trajectory."""

    group: Group
    advantages: Advantages
    weights: tuple[float, ...]

    @property
    def weight(self) -> float:
        """What all its tokens weigh together."""
        lengths = [len(t.completion.token_ids) for t in self.group.trajectories if t.reward is not None]
        return sum(weight * length for weight, length in zip(self.weights, lengths, strict=True))


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass. source_N are indices into [B * L]: where each target's logits come from.
    num_real of the B * L tokens are no padding.

    behaviour_N (nats), advantages_N and weights_N are fp64. lags_N, fp64, counts policy versions. sequence_N numbers
    the trajectories from 0; truncated_N marks the tokens of answers that were cut at max_tokens.
    """

    ids_BL: Tensor
    positions_BL: Tensor
    mask_B1LL: Tensor
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
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a forward pass takes, in the order of Policy.forward."""
        return self.ids_BL, self.positions_BL, self.mask_B1LL, self.source_N, self.targets_N

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def plan_batch(
    entries: Sequence[GroupEntry], world_size: int, micro_batch_tokens: int, aggregation: Aggregation, max_tokens: int
) -> BatchPlan:
    """Spread groups over ranks and micro-batches; the same everywhere, because it looks at nothing but its arguments.

    Longest first to the least loaded rank; within a rank, rows of similar length share a micro-batch of at most
    micro_batch_tokens padded tokens.

    Raises:
        ValueError: no trajectory has a reward, or a row is longer than micro_batch_tokens.
    """
    lengths = [entry.prompt_tokens + _scored_tokens(entry) for entry in entries]
    rows = sorted((i for i, entry in enumerate(entries) if _scored_tokens(entry)), key=lambda i: (-lengths[i], i))
    if not rows:
        raise ValueError(
            f"none of the {len(entries)} groups of this batch has a scored trajectory; nothing to train on"
        )
    if lengths[rows[0]] > micro_batch_tokens:
        raise ValueError(
            f"group {entries[rows[0]].group_id} needs a row of {lengths[rows[0]]} tokens, but "
            f"learner.micro_batch_tokens is {micro_batch_tokens}; raise it to {lengths[rows[0]]} or more"
        )
    of_rank: list[list[int]] = [[] for _ in range(world_size)]
    for row in rows:
        min(of_rank, key=lambda mine: sum(lengths[i] for i in mine)).append(row)
    split = [_split_rows(mine, lengths, micro_batch_tokens) for mine in of_rank]
    count = max(len(micro_batches) for micro_batches in split)
    return BatchPlan(
        micro_batches=tuple(tuple(mine) + ((),) * (count - len(mine)) for mine in split),
        rank_tokens=tuple(sum(_scored_tokens(entries[i]) for i in mine) for mine in of_rank),
        weights=tuple(map(tuple, aggregation([_scored_lengths(entry) for entry in entries], max_tokens))),
    )


def pack(shares: Sequence[Share], version: int) -> MicroBatch:
    """Groups to tensors, one row each. version is the learner's, from which a token's lag counts.

    Without groups it gives one row of one token and no answers: a rank takes part in the collectives of a micro-batch
    that only others have work for.
    """
    rows = [_pack_row(share, version) for share in shares] or [_Row([0], [0], [0])]
    lengths = [length for row in rows for length in row.lengths]
    length = max(len(row.ids) for row in rows)
    ids_BL = torch.tensor([row.ids + [0] * (length - len(row.ids)) for row in rows])
    positions_BL = torch.tensor([row.positions + [0] * (length - len(row.ids)) for row in rows])
    segment_BL = torch.tensor([row.segment + [PADDING] * (length - len(row.ids)) for row in rows])
    same_BLL = segment_BL[:, :, None] == segment_BL[:, None, :]  # padding sees padding: no row of the mask is empty
    prompt_B1L = (segment_BL == 0)[:, None, :]
    causal_LL = torch.ones(length, length, dtype=torch.bool).tril()

    def joined(field: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for row in rows for value in getattr(row, field)], dtype=dtype)

    return MicroBatch(
        ids_BL=ids_BL,
        positions_BL=positions_BL,
        mask_B1LL=(causal_LL & (same_BLL | prompt_B1L))[:, None],
        source_N=torch.tensor([b * length + at for b, row in enumerate(rows) for at in row.source], dtype=torch.long),
        targets_N=joined("targets", torch.long),
        behaviour_N=joined("behaviour", torch.float64),
        advantages_N=joined("advantages", torch.float64),
        lags_N=joined("lags", torch.float64),
        weights_N=joined("weights", torch.float64),
        sequence_N=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long)),
        truncated_N=joined("truncated", torch.bool),
        num_real=sum(len(row.ids) for row in rows) if shares else 0,
    )


def check_payload(entry: GroupEntry, group: Group) -> None:
    """Raise ValueError where a payload is not what its entry promised: the plan and the normaliser would be wrong."""
    lengths = tuple(len(trajectory.completion.token_ids) for trajectory in group.trajectories)
    scored = tuple(reward is not None for reward in group.rewards)
    found = (group.group_id, len(group.prompt.token_ids), lengths, scored)
    promised = (entry.group_id, entry.prompt_tokens, entry.completion_tokens, entry.scored)
    if found != promised:
        raise ValueError(
            f"the payload of group {entry.group_id} is {found}, but its entry in the buffer says {promised} "
            "(id, prompt tokens, completion tokens, scored); the buffer was written by something else"
        )


class _Row:
    """One group under construction: per token ids, positions and segment (0 the prompt), per answer token the rest."""

    def __init__(self, ids: list[int], positions: list[int], segment: list[int]) -> None:
        self.ids = ids
        self.positions = positions
        self.segment = segment
        self.source: list[int] = []
        self.targets: list[int] = []
        self.behaviour: list[float] = []
        self.advantages: list[float] = []
        self.lags: list[int] = []
        self.weights: list[float] = []
        self.truncated: list[bool] = []
        self.lengths: list[int] = []


def _pack_row(share: Share, version: int) -> _Row:
    group, weights = share.group, iter(share.weights)
    prompt = group.prompt.token_ids
    row = _Row(list(prompt), list(range(len(prompt))), [0] * len(prompt))
    for index, (trajectory, value) in enumerate(zip(group.trajectories, share.advantages, strict=True)):
        if value is None:
            continue
        completion, start, count = trajectory.completion, len(row.ids), len(trajectory.completion.token_ids)
        row.ids += completion.token_ids
        row.positions += range(len(prompt), len(prompt) + count)
        row.segment += [index + 1] * count
        # an answer's first token is predicted at the prompt's last position
        row.source += [len(prompt) - 1, *range(start, start + count - 1)][:count]
        row.targets += completion.token_ids
        row.behaviour += completion.logprobs
        row.advantages += [value] * count
        row.weights += [next(weights)] * count
        row.truncated += [completion.finish_reason == "length"] * count
        row.lengths.append(count)
        for span in completion.spans:
            row.lags += [version - span.version] * (span.end - span.start)
    return row


def _split_rows(rows: list[int], lengths: list[int], micro_batch_tokens: int) -> list[tuple[int, ...]]:
    """Cut rows, longest first, into runs whose padded size fits; every second of them comes first.

    So the first half of the micro-batches is as long as the second, and both are samples of one batch.
    """
    runs: list[list[int]] = []
    for row in rows:
        if runs and (len(runs[-1]) + 1) * lengths[runs[-1][0]] <= micro_batch_tokens:
            runs[-1].append(row)
        else:
            runs.append([row])
    return [tuple(run) for run in runs[::2] + runs[1::2]]


def _scored_lengths(entry: GroupEntry) -> list[int]:
    return [count for count, scored in zip(entry.completion_tokens, entry.scored, strict=True) if scored]


def _scored_tokens(entry: GroupEntry) -> int:
    return sum(_scored_lengths(entry))
