"""This file holds a reward child process from the asyncio side: start, talk, kill with all its descendants, reap.

A fresh interpreter is started and nothing is forked, so a child inherits no vLLM, Ray or CUDA state and does not need
an importable __main__. pebble was considered: its pool stops at a result that does not unpickle, its children
outlive a killed parent, and it sends SIGTERM first and waits seconds for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import TypeVar

import msgspec

from rewards.base import FailureKind
from rewards.wire import HEADER, Finished, Job, Load, Loaded, Reply, Request, Started, decode_reply, encode_request

Frame = TypeVar("Frame", Loaded, Started, Finished)

BOOT = "from rewards.child import main; main()"
LIGHT_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LAST_WORDS_S = 1.0  # for reading what a killed child had already written


class ChildLost(Exception):
    """The child is dead, with the kind of failure that this is for what it was doing."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind


class Child:
    """One reward child process. Its rewards are loaded under (name, version) keys."""

    def __init__(self, process: subprocess.Popen[bytes], streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]):
        self._process = process
        self._reader, self._writer = streams
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._killed = False
        self._loaded: dict[tuple[str, str], Loaded] = {}
        # A thread per child reaps it at once under any event loop; asyncio's own watcher differs between loops.
        threading.Thread(target=self._reap, args=(asyncio.get_running_loop(),), daemon=True).start()

    @classmethod
    async def start(cls, memory_bytes: int) -> Child:
        """Starts the interpreter and returns at once; it takes its first frame when it is up."""
        ours, theirs = socket.socketpair()
        with theirs:
            streams = await asyncio.open_connection(sock=ours)
            return cls(_launch(theirs.fileno(), memory_bytes), streams)

    @property
    def pid(self) -> int:
        """The process id, which is also its process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can take another frame."""
        return not self._killed and not self._exited.done()

    async def load(self, load: Load, deadline_s: float) -> Loaded:
        """The outcome of loading a reward in this child, which happens once; ChildLost if it takes the child down."""
        if load.key not in self._loaded:
            self._send(load)
            self._loaded[load.key] = await self._receive(Loaded, deadline_s)
        return self._loaded[load.key]

    async def started(self, job: Job, deadline_s: float) -> None:
        """Sends a job and returns when its execution begins."""
        self._send(job)
        try:
            await self._receive(Started, deadline_s)
        except ChildLost as lost:
            raise ChildLost("crash", f"before execution: {lost}") from lost

    async def finished(self, timeout_s: float) -> Finished:
        """The judgement of the job that has started; ChildLost of kind timeout, crash or memory."""
        return await self._receive(Finished, timeout_s)

    async def _receive(self, expected: type[Frame], deadline_s: float) -> Frame:
        """The next frame, which must be of the expected kind.

        After deadline_s the child is killed; what it had written by then still counts.
        """
        reading = asyncio.ensure_future(self._read())
        try:
            timed_out = await self._settle(reading, deadline_s)
            frame = reading.result() if reading.done() else None
        finally:
            reading.cancel()
        if isinstance(frame, expected):
            return frame
        killed_by_us = self._killed or not self._exited.done()
        raise _loss(await self.gone(), deadline_s if timed_out else None, killed_by_us)

    async def _settle(self, reading: asyncio.Future[Reply | None], deadline_s: float) -> bool:
        """Waits until a frame is read or none can come any more; True if the deadline passed first."""
        await asyncio.wait({reading, self._exited}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        timed_out = not reading.done() and not self._exited.done()
        if timed_out:
            self.kill()
        elif self._exited.done():
            self._kill_group()  # a forked copy of it may still hold the connection open
        if not reading.done() or reading.result() is None:
            await asyncio.wait({reading, self._exited}, timeout=LAST_WORDS_S)
        return timed_out

    def kill(self) -> None:
        """Kills the child and what it started; a second call does no harm."""
        self._killed = True
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def gone(self) -> int:
        """Kills it if need be, waits until it is reaped, and returns its exit status (negative: a signal)."""
        self.kill()
        await asyncio.wait({self._exited})  # a SIGKILL needs no deadline of its own: the kernel keeps it
        self._writer.close()
        return self._exited.result()

    def _send(self, frame: Request) -> None:
        self._writer.write(encode_request(frame))

    async def _read(self) -> Reply | None:
        """The next frame, or None where the connection is of no more use; its end is judged by _loss."""
        try:
            header = await self._reader.readexactly(HEADER.size)
            return decode_reply(await self._reader.readexactly(HEADER.unpack(header)[0]))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            return None

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._exited.set_result, code)


def _launch(descriptor: int, memory_bytes: int) -> subprocess.Popen[bytes]:
    """Runs rewards/child.py on its end of a connection. It dies with the calling thread, or with the whole process."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # plugins are found as they are here
    return subprocess.Popen(
        [sys.executable, "-P", "-c", BOOT, str(descriptor), str(os.getpid()), str(memory_bytes)],
        stdin=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        start_new_session=True,  # its own process group: killed as one, and not reached by Ctrl-C
        env={**LIGHT_ENVIRONMENT, **os.environ, "PYTHONPATH": path},
    )


def _loss(code: int, deadline_s: float | None, killed_by_us: bool) -> ChildLost:
    """What the end of a child means: deadline_s is set where it passed, code is the exit status or minus the signal."""
    if deadline_s is not None:
        return ChildLost("timeout", f"not finished after {deadline_s:g} s; its process was killed")
    if killed_by_us:
        return ChildLost("crash", "its process broke off the connection or answered out of turn, and was killed")
    if code == -signal.SIGKILL:
        return ChildLost("memory", "its process was killed with SIGKILL from outside, as when memory runs out")
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
    return ChildLost("crash", f"its process ended {how}")
