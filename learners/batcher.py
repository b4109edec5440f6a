"""This file plans a batch: which answers are computed, on which rank, and which rows share a forward pass.

It looks at entries alone, before any payload is fetched, so that every rank plans the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from learners.advantages import Advantages
from learners.aggregations import Aggregation
from learners.layouts import Packing, PlannedRow, Share, Weights, rows_of
from rl.trajectory import Group, GroupEntry


@dataclass(frozen=True)
class BatchPlan:
    """Who computes what. micro_batches[rank][i] are rows, () where a rank just takes part.

    Every rank has the same number of micro-batches, because a forward pass is a collective under FSDP; none has any
    where nothing has a gradient. rank_tokens are the answer tokens that each rank computes, num_tokens all scored ones
    of the batch. advantages[group][i] is None where the i-th trajectory is not computed; weights[group][i] is what each
    of its tokens weighs in the loss, None where it is not scored.
    """

    micro_batches: tuple[tuple[tuple[PlannedRow, ...], ...], ...]
    rank_tokens: tuple[int, ...]
    num_tokens: int
    advantages: tuple[Advantages, ...]
    weights: tuple[Weights, ...]

    @property
    def computed_tokens(self) -> int:
        """Answer tokens that some rank computes."""
        return sum(self.rank_tokens)

    def groups_of(self, rank: int) -> list[int]:
        """The groups that a rank must fetch, by their index in the batch. No other rank has any of them."""
        return sorted({row.group for rows in self.micro_batches[rank] for row in rows})

    def shares(self, rank: int, groups: dict[int, Group]) -> list[list[Share]]:
        """A rank's rows, by micro-batch. groups are its own, by their index in the batch."""
        return [[self._share(row, groups[row.group]) for row in rows] for rows in self.micro_batches[rank]]

    def _share(self, row: PlannedRow, group: Group) -> Share:
        values = self.advantages[row.group]
        mine = tuple(value if answer in row.answers else None for answer, value in enumerate(values))
        computed = sum(value is not None for value in values)
        return Share(group, mine, self.weights[row.group], len(row.answers) / computed)


@dataclass(frozen=True)
class RowLimits:
    """How rows are made and bounded: padded tokens of a forward pass per rank, and the model's width, for costs."""

    micro_batch_tokens: int
    hidden_size: int
    packing: Packing = "shared_prefix"


def row_cost(prompt_tokens: int, answer_tokens: Sequence[int], hidden_size: int) -> float:
    """What a row costs, in tokens without attention: its tokens, and every pair of which one sees the other.

    A block multiplies a token with about 12 H² weights, and a pair costs 2 H products: a pair is 1/(6 H) of a token.
    """
    pairs = prompt_tokens**2 / 2 + sum(length * (prompt_tokens + length / 2) for length in answer_tokens)
    return prompt_tokens + sum(answer_tokens) + pairs / (6 * hidden_size)


def weigh(entries: Sequence[GroupEntry], aggregation: Aggregation, max_tokens: int) -> tuple[Weights, ...]:
    """What each token weighs, by group and trajectory, counted over all that is scored, computed or not."""
    found = aggregation([_scored_lengths(entry) for entry in entries], max_tokens)
    return tuple(
        tuple(next(weights) if scored else None for scored in entry.scored)
        for entry, weights in zip(entries, map(iter, found), strict=True)
    )


def plan_batch(
    entries: Sequence[GroupEntry],
    advantages: Sequence[Advantages],
    weights: Sequence[Weights],
    ranks: int,
    limits: RowLimits,
) -> BatchPlan:
    """Spread what has an advantage over ranks and micro-batches; the same everywhere, given the same arguments.

    Costliest group first to the least loaded rank; within a rank, rows of similar length share a micro-batch.

    Raises:
        ValueError: no trajectory has a reward, or a row is longer than limits.micro_batch_tokens.
    """
    num_tokens = sum(map(sum, map(_scored_lengths, entries)))
    if not num_tokens:
        raise ValueError(
            f"none of the {len(entries)} groups of this batch has a scored trajectory; nothing to train on"
        )
    rows = {
        group: rows_of(group, _computed(entry, values), limits.packing)
        for group, (entry, values) in enumerate(zip(entries, advantages, strict=True))
    }
    every = [row for mine in rows.values() for row in mine]
    lengths = {row: _row_tokens(row, entries[row.group]) for row in every}
    _check_fits(entries, lengths, limits.micro_batch_tokens)
    costs = {group: sum(_cost(row, entries[group], limits) for row in mine) for group, mine in rows.items() if mine}
    of_rank: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(costs, key=lambda group: (-costs[group], group)):
        min(of_rank, key=lambda mine: sum(costs[each] for each in mine)).append(group)
    split = [
        _split_rows([row for group in mine for row in rows[group]], lengths, limits.micro_batch_tokens)
        for mine in of_rank
    ]
    count = max(len(micro_batches) for micro_batches in split)
    return BatchPlan(
        micro_batches=tuple(tuple(mine) + ((),) * (count - len(mine)) for mine in split),
        rank_tokens=tuple(
            sum(sum(_answers(row, entries[row.group])) for rows in mine for row in rows) for mine in split
        ),
        num_tokens=num_tokens,
        advantages=tuple(advantages),
        weights=tuple(weights),
    )


def check_payload(entry: GroupEntry, group: Group) -> None:
    """Raise ValueError where a payload is not what its entry promised: plan, advantages and weights would be wrong."""
    lengths = tuple(len(trajectory.completion.token_ids) for trajectory in group.trajectories)
    found = (group.group_id, len(group.prompt.token_ids), lengths, group.rewards)
    promised = (entry.group_id, entry.prompt_tokens, entry.completion_tokens, entry.rewards)
    if found != promised:
        raise ValueError(
            f"the payload of group {entry.group_id} is {found}, but its entry in the buffer says {promised} "
            "(id, prompt tokens, completion tokens, rewards); the buffer was written by something else"
        )


def _computed(entry: GroupEntry, advantages: Advantages) -> list[int]:
    """Which trajectories are computed."""
    lengths = zip(advantages, entry.completion_tokens, strict=True)
    return [answer for answer, (value, length) in enumerate(lengths) if value is not None and length]


def _answers(row: PlannedRow, entry: GroupEntry) -> list[int]:
    return [entry.completion_tokens[answer] for answer in row.answers]


def _row_tokens(row: PlannedRow, entry: GroupEntry) -> int:
    return entry.prompt_tokens + sum(_answers(row, entry))


def _cost(row: PlannedRow, entry: GroupEntry, limits: RowLimits) -> float:
    return row_cost(entry.prompt_tokens, _answers(row, entry), limits.hidden_size)


def _check_fits(entries: Sequence[GroupEntry], lengths: dict[PlannedRow, int], micro_batch_tokens: int) -> None:
    longest = max(lengths, key=lambda row: lengths[row], default=None)
    if longest is not None and lengths[longest] > micro_batch_tokens:
        raise ValueError(
            f"group {entries[longest.group].group_id} needs a row of {lengths[longest]} tokens, but "
            f"learner.micro_batch_tokens is {micro_batch_tokens}; raise it to {lengths[longest]} or more"
        )


def _split_rows(
    rows: list[PlannedRow], lengths: dict[PlannedRow, int], micro_batch_tokens: int
) -> list[tuple[PlannedRow, ...]]:
    """Cut rows, longest first, into runs whose padded size fits; every second of them comes first.

    So the first half of the micro-batches is as long as the second, and both are samples of one batch.
    """
    runs: list[list[PlannedRow]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row.group, row.answers)):
        if runs and (len(runs[-1]) + 1) * lengths[runs[-1][0]] <= micro_batch_tokens:
            runs[-1].append(row)
        else:
            runs.append([row])
    return [tuple(run) for run in runs[::2] + runs[1::2]]


def _scored_lengths(entry: GroupEntry) -> list[int]:
    return [count for count, scored in zip(entry.completion_tokens, entry.scored, strict=True) if scored]
