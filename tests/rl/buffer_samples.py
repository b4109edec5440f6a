"""This file holds what the tests of the buffer share: groups to put into it, and the balance that must always hold."""

from __future__ import annotations

from collections.abc import Iterable

from rl.buffer import Buffer, BufferStats
from rl.trajectory import Group, GroupEntry, Trajectory
from tests.fakes import make_completion, make_prompt


def group_of(draw: int, version: int = 0, lengths: tuple[int, ...] = (3, 2)) -> Group:
    """The group of a draw, with completions of these lengths, sampled at one version."""
    return Group(
        group_id=f"run/{draw}",
        draw=draw,
        prompt=make_prompt(index=draw),
        trajectories=tuple(
            Trajectory(completion=make_completion(length, version), reward=1.0, parts=()) for length in lengths
        ),
        finished_at=1.5,
    )


async def publish(buffer: Buffer, *groups: Group) -> None:
    """Admit and put each."""
    await buffer.admit(len(groups))
    for group in groups:
        assert await buffer.put(group)


def ids(things: Iterable[Group | GroupEntry]) -> list[str]:
    """Their group ids."""
    return [thing.group_id for thing in things]


def balance(stats: BufferStats) -> None:
    """Every sampled token is in exactly one stage; the buffer counts the sum apart from its parts."""
    dropped = sum(tokens for _, tokens in stats.dropped.values())
    assert stats.buffered_tokens + stats.leased_tokens + stats.trained_tokens + dropped == stats.sampled_tokens
    assert stats.in_flight >= 0
