"""This file is what runs inside a reward child process: it imports rewards and judges, one job at a time.

The reward runs in the process's main thread, because signal.alarm, which math-verify and others use, works only there.
The process dies with its parent, leaves no core file, and is killed from outside (`rewards/child_handle.py`) when a
reward takes too long.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import os
import resource
import signal
import socket
import sys
import time
from typing import Any

from rewards.base import Failure, failure_of, judgement_of
from rewards.loading import LoadedReward, load
from rewards.wire import (
    HEADER,
    MAX_REPLY_BYTES,
    Finished,
    Job,
    Load,
    Loaded,
    Reply,
    Started,
    decode_reply,
    decode_request,
    encode_reply,
)

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serves the socket whose descriptor is the first argument; the others: parent's pid, memory limit in bytes."""
    descriptor, parent, memory_bytes = (int(argument) for argument in sys.argv[1:4])
    _die_with_parent(parent)
    _limit(memory_bytes)
    connection = socket.socket(fileno=descriptor)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a reward prints goes where the run's errors go
    requests = connection.makefile("rb")
    rewards: dict[tuple[str, str], LoadedReward] = {}
    with asyncio.Runner() as runner:  # one loop for all async rewards, so that their clients can live on
        while header := requests.read(HEADER.size):
            request = decode_request(requests.read(HEADER.unpack(header)[0]))
            reply: Reply
            if isinstance(request, Load):
                reply = _load(request, rewards)
            else:
                connection.sendall(encode_reply(Started()))
                reply = _judge(request, rewards[request.key], runner)
            connection.sendall(_bounded(reply))


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above took effect
        os._exit(1)


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the parent's thread may have blocked SIGALRM


def _load(request: Load, rewards: dict[tuple[str, str], LoadedReward]) -> Loaded:
    try:
        loaded = load(request.use, request.params, request.source)
    except BaseException as error:  # a plugin may raise anything while it is imported; the parent reports it
        return Loaded(error=failure_of(error).message)
    finally:
        _disarm()
    rewards[request.key] = loaded
    return Loaded(version=loaded.version)


def _judge(job: Job, reward: LoadedReward, runner: asyncio.Runner) -> Finished:
    own_pid = os.getpid()
    started = time.perf_counter()
    try:
        returned = reward(job.prompt, job.completion, job.reference, job.columns)
        if inspect.isawaitable(returned):
            returned = runner.run(_awaited(returned))
        judgement = judgement_of(returned)
    except BaseException as error:  # counted by kind, SystemExit and library-made BaseExceptions included
        judgement = failure_of(error)
    finally:
        _disarm()
    if os.getpid() != own_pid:  # the reward forked and let its copy return: only the original may answer
        os._exit(0)
    seconds = time.perf_counter() - started
    if isinstance(judgement, Failure):
        return Finished(None, judgement.kind, judgement.message, seconds)
    return Finished(judgement.value, seconds=seconds, parts=judgement.parts, extra=judgement.extra)


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _disarm() -> None:
    """An alarm that a reward left behind would kill the next one."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _bounded(reply: Reply) -> bytes:
    """The encoded reply; a Failure in its place where its parts or extra cannot be sent."""
    try:
        frame = encode_reply(reply)
        decode_reply(frame[HEADER.size :])  # what the parent would do: keys that are no strings show here
    except Exception as error:  # whatever a plugin's own repr or key type raises; counted as its failure
        return encode_reply(Finished(None, "exception", f"the Score cannot be sent: {failure_of(error).message}"))
    if len(frame) > MAX_REPLY_BYTES:
        return encode_reply(
            Finished(None, "exception", f"the Score takes {len(frame)} bytes; keep it below {MAX_REPLY_BYTES}")
        )
    return frame
