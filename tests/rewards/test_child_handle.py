"""This file tests rewards/child_handle.py and rewards/child.py below the scorer: one child, its frames and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from rewards import child
from rewards.child_handle import Child, ChildLost
from rewards.wire import Job, Load

MEMORY_BYTES = 2 << 30
FORMAT = Load(("format", ""), "format", {"tags": ["a"]}, None)


async def test_a_child_loads_once_judges_and_is_reaped_when_it_is_told_to_go():
    one = await Child.start(MEMORY_BYTES)
    loaded = await one.load(FORMAT, 30.0)
    assert loaded.error == "" and await one.load(FORMAT, 30.0) is loaded
    for completion, value in (("<a>4</a>", 1.0), ("4", 0.0)):
        await one.started(Job(FORMAT.key, "", completion, None, {}), 30.0)
        assert (await one.finished(30.0)).value == value
    assert one.alive
    assert await one.gone() == -signal.SIGKILL and not one.alive
    with pytest.raises(ProcessLookupError):
        os.kill(one.pid, 0)


async def test_a_child_that_answers_out_of_turn_is_killed():
    one = await Child.start(MEMORY_BYTES)
    await one.load(FORMAT, 30.0)
    await one.started(Job(FORMAT.key, "", "", None, {}), 30.0)
    with pytest.raises(ChildLost, match="out of turn") as lost:
        await one.started(Job(FORMAT.key, "", "", None, {}), 30.0)
    assert lost.value.kind == "crash" and not one.alive


async def test_a_child_that_does_not_answer_in_time_is_killed():
    one = await Child.start(MEMORY_BYTES)
    os.kill(one.pid, signal.SIGSTOP)
    with pytest.raises(ChildLost, match="after 0.1 s") as lost:
        await one.load(FORMAT, 0.1)
    assert lost.value.kind == "timeout" and not one.alive


def test_a_child_whose_parent_died_before_it_was_up_serves_nobody():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        boot = f"from {child.__name__} import main; main()"
        arguments = [str(theirs.fileno()), str(os.getppid()), str(MEMORY_BYTES)]
        ended = subprocess.run([sys.executable, "-c", boot, *arguments], pass_fds=(theirs.fileno(),), timeout=60)
    assert ended.returncode == 1
