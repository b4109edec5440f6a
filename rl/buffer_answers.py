"""This file says what the trajectory buffer is given and what it answers: limits, leases, holdings, counts, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from rl.trajectory import DROP_REASONS, DropReason, GroupEntry


class BufferRewound(RuntimeError):
    """Redis lost its last writes: it knows nothing of a step that was leased. Reconcile, then lease again."""


class OversizeGroup(ValueError):
    """A single group is larger than the whole buffer may be."""


class MissingGroups(ValueError):
    """Groups that were asked for are not in the buffer; `group_ids` names them."""

    def __init__(self, group_ids: Sequence[str], where: str) -> None:
        super().__init__(
            f"groups {', '.join(group_ids)} are not in the buffer at {where}: committed, dropped, never put, or lost "
            "with the last second of a server that ended; restore them from the archive, or sample their draws again"
        )
        self.group_ids = tuple(group_ids)


class BufferLimits(msgspec.Struct, frozen=True):
    """What may wait in the buffer before admission pauses, and how long a lost server is awaited."""

    max_bytes: int
    max_groups: int
    reconnect_deadline_s: float = 60.0


class Lease(msgspec.Struct, frozen=True):
    """What `lease` did: `entries` to train on (none if too few were fresh), and those dropped as stale on the way."""

    entries: tuple[GroupEntry, ...]
    dropped: tuple[GroupEntry, ...]


class Holdings(msgspec.Struct, frozen=True):
    """Every live group: those waiting, by arrival, and the step of each leased one, by step and place in its batch."""

    waiting: tuple[GroupEntry, ...]
    leased: dict[str, int]


class BufferStats(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything that was ever drawn is now; one consistent look.

    Tokens are sampled tokens, bytes are payload. drawn, sampled_tokens (all that was published or dropped), trained and
    dropped (reason -> groups, tokens) are totals since the run began, over restarts. oldest_age_s: seconds since the
    first of the buffered groups was published, 0 if there is none.
    """

    drawn: int
    sampled_tokens: int
    buffered_groups: int
    buffered_tokens: int
    buffered_bytes: int
    leased_groups: int
    leased_tokens: int
    leased_bytes: int
    trained_groups: int
    trained_tokens: int
    dropped: dict[DropReason, tuple[int, int]]
    oldest_age_s: float

    @property
    def in_flight(self) -> int:
        """Groups drawn that are neither published nor dropped yet."""
        dropped = sum(groups for groups, _ in self.dropped.values())
        return self.drawn - self.buffered_groups - self.leased_groups - self.trained_groups - dropped


def stats_of(flat: list[bytes], age_ms: int) -> BufferStats:
    """The counters as Redis tells them: names and values in turn, and the age of the first waiting group."""
    named = {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
    counted = Counter({name: int(value) for name, value in named.items() if name not in ("owner", "schema")})
    return BufferStats(
        drawn=counted["drawn"],
        sampled_tokens=counted["sampled:tokens"],
        buffered_groups=counted["buffered:groups"],
        buffered_tokens=counted["buffered:tokens"],
        buffered_bytes=counted["buffered:bytes"],
        leased_groups=counted["leased:groups"],
        leased_tokens=counted["leased:tokens"],
        leased_bytes=counted["leased:bytes"],
        trained_groups=counted["trained:groups"],
        trained_tokens=counted["trained:tokens"],
        dropped={reason: (counted[f"{reason}:groups"], counted[f"{reason}:tokens"]) for reason in DROP_REASONS},
        oldest_age_s=age_ms / 1000,
    )
