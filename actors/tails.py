"""This file knows what a generator samples, since which policy version, and cuts off what has become too old.

A group is stale once the learner is more than max_lag versions ahead of its oldest token, and nothing that it still
samples makes it younger: with rollout.long_tail drop, its slots in the engine are worth more to another group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from actors.rollout import further_id


class Tail:
    """A group that is being sampled. is_cut says that it was given up, whatever it still brings home."""

    def __init__(self, group_id: str, version: int) -> None:
        self.group_id = group_id
        self.version = version  # the engine's when it began: no token of the group is older
        self.is_cut = False

    @property
    def request_ids(self) -> tuple[str, str]:
        """What it asks of the engine, one after the other."""
        return self.group_id, further_id(self.group_id)


class Tails:
    """All groups that one generator samples, apart from rounds: those end together, within one version."""

    def __init__(self) -> None:
        self._running: dict[str, Tail] = {}

    @contextlib.contextmanager
    def running(self, group_id: str, version: int) -> Iterator[Tail]:
        """List a group while the block runs."""
        tail = self._running[group_id] = Tail(group_id, version)
        try:
            yield tail
        finally:
            self._running.pop(group_id, None)

    def cut(self, oldest_version: int) -> list[str]:
        """Cut off the groups that began before `oldest_version`; returns the requests that the engine must abort.

        A group counts from where it began, also if the engine has not come to it yet: what it waits in the engine it
        waits with the room of another.
        """
        overdue = [tail for tail in self._running.values() if tail.version < oldest_version]
        for tail in overdue:
            tail.is_cut = True
        return [request_id for tail in overdue for request_id in tail.request_ids]
