"""This file holds what all generators of a fleet look at: the newest weights, whom to tell, and a bell for changes."""

from __future__ import annotations

import asyncio
import os
import pathlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from rl.weights import UpdateReceipt, WeightUpdate


class OnEvent(Protocol):
    """Where events of the fleet go: a line of events.jsonl."""

    def __call__(self, kind: str, **facts: Any) -> None: ...


@dataclass(frozen=True)
class FleetHooks:
    """What the composition root gives a fleet.

    verify judges a receipt and returns the canary's gap, or raises WeightUpdateError. regroup is for weights.backend
    nccl: it has generators and sender meet anew, after members died or came.
    """

    verify: Callable[[WeightUpdate, UpdateReceipt], float]
    on_event: OnEvent
    regroup: Callable[[], Awaitable[None]] | None = None


class Board:
    """The newest update, kept readable for those that join later, and a bell that rings whenever anything changes."""

    def __init__(self, hooks: FleetHooks, run_id: str) -> None:
        self.hooks = hooks
        self.newest: WeightUpdate | None = None
        self.payload_of: Callable[[WeightUpdate], Any] | None = None
        self._run_id = run_id
        self._pinned: set[pathlib.Path] = set()
        self._bell = asyncio.Event()

    def ring(self) -> None:
        """Wake everyone who waits for a change."""
        self._bell.set()
        self._bell.clear()  # waiters were woken by set(); whoever comes now waits for the next change

    async def change(self) -> None:
        """Wait until the bell rings. Look first, and without an await in between."""
        await self._bell.wait()

    def show(self, update: WeightUpdate) -> WeightUpdate:
        """Make an update the newest, and return it as members shall load it.

        Learners remove files when two newer versions are written, and with their restart. A second name (a hard link)
        keeps those of the newest that generators were told of readable, at no cost in memory while the first is there.
        """
        before, self._pinned = self._pinned, set()
        path, delta_path = (self._pin(each, update.version) for each in (update.path, update.delta_path))
        update = msgspec.structs.replace(update, path=path, delta_path=delta_path)
        for old in before - self._pinned:
            old.unlink(missing_ok=True)
        self.newest = update
        self.ring()
        return update

    def payload(self, update: WeightUpdate, node: str) -> Any:
        """What a member on `node` needs beside the update: its bytes, through the object store, if it sees no file."""
        if update.path is None or update.node == node:
            return None
        assert self.payload_of is not None, "the composition root says where weights come from"
        return self.payload_of(update)

    def close(self) -> None:
        """Let go of the newest update's files."""
        for pinned in self._pinned:
            pinned.unlink(missing_ok=True)

    def _pin(self, path: str | None, version: int) -> str | None:
        """The second name of a file of this version, or its first where it cannot have one."""
        if path is None:
            return None
        file = pathlib.Path(path)
        pinned = file.with_name(f"slipstream-{self._run_id}-pinned-{version}{file.suffix}")
        try:
            pinned.unlink(missing_ok=True)
            os.link(file, pinned)
        except OSError:  # the file lies on another node, or in a file system without links
            return path
        self._pinned.add(pinned)
        return str(pinned)
