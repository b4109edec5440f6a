"""This file turns a run's Redis back to an earlier moment, as a server does that lost its last second in a crash."""

from __future__ import annotations

import redis


class Rewinding:
    """The keys of one run as they were when this object was made."""

    def __init__(self, url: str, run_id: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._pattern = f"slipstream:{{{run_id}}}:*"
        self._saved = {key: self._client.dump(key) for key in self._client.keys(self._pattern)}

    def turn_back(self) -> None:
        """Have the server forget all that happened to the run since then."""
        self.wipe()
        for key, value in self._saved.items():
            self._client.restore(key, 0, value)

    def wipe(self) -> None:
        """Have the server forget the run altogether."""
        for key in self._client.keys(self._pattern):
            self._client.delete(key)
