"""This file holds an inference engine that answers from a script, for tests of everything around an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.engine import EngineDied, LoadReceipt, SampleRequest
from rl.trajectory import Completion, VersionSpan
from rl.weights import NcclGroup, TensorDigest, WeightUpdate, WeightUpdateError


def scripted_completion(text: str, version: int) -> Completion:
    """A completion with one token per character; the log-probability follows from the token."""
    token_ids = tuple(ord(letter) for letter in text)
    return Completion(
        text=text,
        token_ids=token_ids,
        logprobs=tuple(-1.0 / (1 + token) for token in token_ids),
        spans=(VersionSpan(version, 0, len(token_ids)),) if token_ids else (),
        finish_reason="stop",
    )


class FakeEngine:
    """Answers sample i of a request with answer(request, i), at once unless `hold` is cleared.

    Switches: fail_updates refuses that many updates, altered puts other digests into receipts, die() is a SIGKILL.
    """

    def __init__(self, answer: Callable[[SampleRequest, int], str] = lambda request, index: str(index)) -> None:
        self.version = 0
        self.answer = answer
        self.requests: list[SampleRequest] = []
        self.updates: list[WeightUpdate] = []
        self.joined: NcclGroup | None = None
        self.fail_updates = 0
        self.altered: tuple[TensorDigest, ...] | None = None
        self.canary_logprobs: tuple[float, ...] | None = None
        self.stopped = False
        self.hold = asyncio.Event()
        self.hold.set()
        self._death = asyncio.Event()

    def die(self) -> None:
        """Everything pending and everything asked from now on raises EngineDied."""
        self._death.set()

    async def sample(self, request: SampleRequest) -> tuple[Completion, ...]:
        self.requests.append(request)
        version = self.version
        waits = {asyncio.create_task(self.hold.wait()), asyncio.create_task(self._death.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        await self.check_alive()
        return tuple(scripted_completion(self.answer(request, index), version) for index in range(request.count))

    async def sample_round(self, requests: Sequence[SampleRequest]) -> list[tuple[Completion, ...]]:
        return list(await asyncio.gather(*(self.sample(request) for request in requests)))

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        await self.check_alive()
        if self.canary_logprobs is not None:
            return self.canary_logprobs
        return self.updates[-1].canary_logprobs if self.updates else (-1.0,) * (len(token_ids) - 1)

    async def join(self, group: NcclGroup, index: int) -> None:
        self.joined = group

    async def load(self, update: WeightUpdate) -> LoadReceipt:
        await self.check_alive()
        if self.fail_updates > 0:
            self.fail_updates -= 1
            raise WeightUpdateError(f"the fake engine refused version {update.version}")
        self.version = update.version
        self.updates.append(update)
        seconds = {"pause": 0.0, "load": 0.0, "resume": 0.0}
        return LoadReceipt(version=update.version, tensors=self.altered or update.tensors, missing=(), seconds=seconds)

    async def check_alive(self) -> None:
        if self._death.is_set():
            raise EngineDied("engine fake died: the test killed it")

    async def stop(self) -> None:
        self.stopped = True
