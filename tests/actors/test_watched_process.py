from __future__ import annotations

import asyncio
import sys

from actors.watched_process import WatchedProcess


async def start_sleeper() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)


async def test_the_end_of_a_process_is_noticed_whoever_ends_it():
    sleeper = await start_sleeper()
    watched = WatchedProcess(sleeper.pid)
    assert not watched.ended.is_set()
    sleeper.stdin.close()
    async with asyncio.timeout(10):
        await watched.ended.wait()
        await sleeper.wait()


async def test_a_kill_ends_the_process_and_a_second_one_harms_nobody():
    sleeper = await start_sleeper()
    watched = WatchedProcess(sleeper.pid)
    watched.kill()
    async with asyncio.timeout(10):
        await watched.ended.wait()
        assert await sleeper.wait() == -9
    watched.kill()
