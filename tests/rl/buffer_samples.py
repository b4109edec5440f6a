"""This file holds what the tests of the buffer share: draws and groups to put into it, and what must always hold.

It imports none of the other fakes, which need the run and with it everything: crash tests start children.
"""

from __future__ import annotations

from collections.abc import Iterable

from rl.buffer import Buffer
from rl.buffer_answers import BufferLimits, BufferStats
from rl.orders import Draw
from rl.trajectory import Completion, Group, GroupEntry, Message, Prompt, TextPart, Trajectory, VersionSpan

LIMITS = BufferLimits(max_bytes=1 << 20, max_groups=1 << 16, reconnect_deadline_s=20.0)


def draw_of(number: int) -> Draw:
    """The draw of a number; the same at every call."""
    prompt = Prompt(
        prompt_id=f"sums/easy/{number}",
        source="sums",
        level="easy",
        messages=(Message("user", (TextPart("1 + 1 = ?"),)),),
        reference="2",
        columns={},
        token_ids=(1, 2, 3),
    )
    return Draw(group_id=f"run/{number}", draw=number, prompt=prompt, seed=number)


def group_of(number: int, version: int = 0, lengths: tuple[int, ...] = (3, 2)) -> Group:
    """The group of a draw, with completions of these lengths, sampled at one version."""
    draw = draw_of(number)
    trajectories = tuple(
        Trajectory(
            completion=Completion(
                text="2",
                token_ids=tuple(range(10, 10 + length)),
                logprobs=tuple(-0.5 - position / 7 for position in range(length)),
                spans=(VersionSpan(version, 0, length),),
                finish_reason="stop",
            ),
            reward=1.0,
            parts=(),
        )
        for length in lengths
    )
    return Group(
        group_id=draw.group_id, draw=number, prompt=draw.prompt, trajectories=trajectories, finished_at=number + 0.5
    )


async def admit(buffer: Buffer, *numbers: int) -> None:
    """Admit the draws of these numbers."""
    for number in numbers:
        await buffer.admit(draw_of(number))


async def publish(buffer: Buffer, *groups: Group) -> None:
    """Admit and put each."""
    for group in groups:
        await admit(buffer, group.draw)
        assert await buffer.put(group)


def ids(things: Iterable[Group | GroupEntry | Draw]) -> list[str]:
    """Their group ids."""
    return [thing.group_id for thing in things]


def balance(stats: BufferStats) -> None:
    """Every sampled token is in exactly one stage; the buffer counts the sum apart from its parts."""
    dropped = sum(tokens for _, tokens in stats.dropped.values())
    assert stats.buffered_tokens + stats.leased_tokens + stats.trained_tokens + dropped == stats.sampled_tokens
    assert stats.in_flight >= 0
