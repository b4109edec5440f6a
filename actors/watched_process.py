"""This file watches and ends a process that need not be our child, without polling and without mistaking its pid.

A pidfd becomes readable when its process ends, and a signal through it can never reach a later process with that pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal


class WatchedProcess:
    """A running process; `ended` is set, in the event loop that made this object, when it is gone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(pid)
        self._loop.add_reader(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        self.ended.set()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)

    def kill(self) -> None:
        """Send SIGKILL, if it still runs."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
