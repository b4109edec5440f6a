"""This file holds what the loops of one run share: where learners and generators stand, and signals between them."""

from __future__ import annotations

import asyncio


class Shared:
    """The state that more than one loop looks at. All loops live in one event loop, so plain attributes suffice.

    step is the learners' policy version, which equals the number of steps made. sampling_version is the version that
    every working generator confirmed; after a rollback it may be ahead of step.
    """

    def __init__(self, start_step: int) -> None:
        self.step = start_step
        self.sampling_version = start_step
        self.engines = asyncio.Lock()  # held while weights change, or must not
        self.changed = asyncio.Event()  # a group came back, a version arrived, payloads left the buffer
        self.published = asyncio.Event()  # a group is in the buffer that was not there before
