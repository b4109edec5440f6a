"""This file owns the tasks of a run: they work side by side, and the first failure ends all and is the one told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
CANCEL_AGAIN_S = 0.2
OnFailure = Callable[[BaseException], Awaitable[None]]


async def together(*work: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run coroutines side by side and return their results in order; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Crew:
    """Tasks with an owner. A task that raises makes `run` raise the same error; later failures are consequences."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task; its failure becomes the crew's."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None or self._failed.done():
            return
        error = task.exception()
        assert error is not None
        error.add_note(f"in {task.get_name()}")
        self._failed.set_exception(error)

    async def run(self, main: Coroutine[Any, Any, T], name: str, on_failure: OnFailure | None = None) -> T:
        """Run `main` to its end, or until any task of the crew fails; then cancel and await what still works.

        on_failure is awaited between the two: it sees the others as they stand.

        Raises:
            whatever the first failing task raised, with a note that names the task.
        """
        task = self.spawn(main, name)
        try:
            await asyncio.wait({task, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                error = self._failed.exception()
                if on_failure is not None and error is not None:
                    await on_failure(error)
                self._failed.result()
            return task.result()
        finally:
            await self.dismiss()
            if self._failed.done():
                self._failed.exception()

    async def dismiss(self) -> None:
        """Cancel every task and wait until all have ended, as long as that takes.

        A cancellation can be lost inside a library that takes it for a time-out of its own (redis-py does), so it is
        repeated for whoever has not ended.
        """
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=CANCEL_AGAIN_S)
