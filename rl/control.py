"""This file carries requests to a running driver: files in its run directory, so no port, no password, any file system.

A command writes requests/<time>-<random>.json and waits for the .answer.json beside it; the driver's Desk looks once a
second. driver.json says who drives the run; a lock that the kernel frees with the process keeps a second driver out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import pathlib
import secrets
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import psutil

from rl.recorder import RunDirectory, write_atomically
from rl.run_outcome import Outcome
from rl.waits import within

REQUESTS, DRIVER, LOCK = "requests", "driver.json", "driver.lock"
ANSWER = ".answer.json"
ANSWER_DEADLINE_S = 60.0  # NFS may show a new file to another node only after half of that
HANDLER_DEADLINE_S = 30.0
LOOK_EVERY_S = 1.0
POLL_S = 0.1
PATIENCE_S = 20.0  # for a killed driver's guard, which ends what is left of the run before anything of it starts anew
CLOCK_SLACK_S = 2.0  # psutil derives a process's start from the time since boot
MAX_BYTES = 1 << 16
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that was mounted without

Handler = Callable[[Mapping[str, Any]], Awaitable[str]]


class NotRunning(ValueError):
    """No driver is there that could answer."""


class AlreadyRunning(ValueError):
    """Another driver has the run directory."""


class NoAnswer(RuntimeError):
    """The driver is there and did not answer in time."""


class Driver(msgspec.Struct, frozen=True):
    """Who drives a run; times are seconds since 1970. process_started tells it from a later process of its number."""

    pid: int
    host: str
    process_started: float

    @classmethod
    def myself(cls) -> Driver:
        """This process."""
        return cls(os.getpid(), socket.gethostname(), psutil.Process().create_time())

    def is_gone(self) -> bool:
        """Whether it has certainly ended; of a process on another host nothing is certain."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started) < CLOCK_SLACK_S
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Answer(msgspec.Struct, frozen=True):
    """What became of a request, in a sentence."""

    accepted: bool
    text: str


class Request(msgspec.Struct, frozen=True):
    """A request as it lies in the folder; values are whatever its kind needs."""

    path: str
    kind: str
    values: dict[str, Any]


def living_driver(directory: pathlib.Path) -> Driver:
    """The driver that announced itself and is not known to be gone. Raises NotRunning, saying what is known instead."""
    driver = _announced(directory)
    if driver is None:
        raise NotRunning(f"run {directory.name} is not running: {_how_it_ended(directory)}")
    if driver.is_gone():
        raise NotRunning(
            f"run {directory.name} is not running: its driver, {driver}, is gone; go on with: rl resume {directory}"
        )
    return driver


def _announced(directory: pathlib.Path) -> Driver | None:
    try:
        return msgspec.json.decode((directory / DRIVER).read_bytes(), type=Driver)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise NotRunning(f"{directory / DRIVER} is unreadable ({error}); remove it if the run has ended") from None


def _how_it_ended(directory: pathlib.Path) -> str:
    try:
        outcome = msgspec.json.decode(RunDirectory(directory).outcome.read_bytes(), type=Outcome)
    except (OSError, msgspec.DecodeError):
        return f"no driver has announced itself in {directory}"
    return f"it is {outcome.status} at step {outcome.step}"


def ask(directory: pathlib.Path, request: Mapping[str, Any], seconds: float = ANSWER_DEADLINE_S) -> Answer:
    """Put a request, whose "kind" says of what sort it is, to the run's driver, and wait for the answer.

    Raises:
        NotRunning: nobody is there to answer, or nobody any more.
        NoAnswer: none within `seconds`. The request is withdrawn, but may be in the driver's hands already.
        OSError: the run directory is not writable.
    """
    driver = living_driver(directory)
    folder = directory / REQUESTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{time.time_ns()}-{secrets.token_hex(4)}.json"
    deadline = time.monotonic() + seconds
    try:
        write_atomically(path, msgspec.json.encode(request).decode())
        while time.monotonic() < deadline:
            removed = not path.exists()  # asked before the answer is looked for, so that no answer can be missed
            with contextlib.suppress(FileNotFoundError):
                return msgspec.json.decode(_answer_to(path).read_bytes(), type=Answer)
            if removed:
                raise NoAnswer(f"{driver} could not read the request and removed it; ask again")
            if driver.is_gone():
                raise NotRunning(f"run {directory.name}: its driver, {driver}, ended before it answered")
            time.sleep(POLL_S)
    finally:  # in this order: a request without an answer would be served again
        path.unlink(missing_ok=True)
        _answer_to(path).unlink(missing_ok=True)
    raise NoAnswer(
        f"{driver} did not answer within {seconds:.0f} s: it may still be starting, or it is stuck; "
        f"`kill -USR1 {driver.pid}` there has it write a stall report"
    )


def _answer_to(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name.removesuffix(".json") + ANSWER)


@contextmanager
def announce(directory: pathlib.Path, patience_s: float = PATIENCE_S) -> Iterator[Desk]:
    """Be the one driver of a run directory while the block runs; the Desk hears requests from now on.

    Raises:
        AlreadyRunning: another driver lives, or what a killed one left behind is not gone after patience_s.
    """
    lock = _take_lock(directory, patience_s)
    try:
        desk = Desk(directory, lock)
        try:
            write_atomically(directory / DRIVER, msgspec.json.encode(Driver.myself()).decode() + "\n")
            yield desk
        finally:
            (directory / DRIVER).unlink(missing_ok=True)
            desk.close()
    finally:
        os.close(lock)


def _take_lock(directory: pathlib.Path, patience_s: float) -> int:
    """Lock the directory against other drivers. The kernel frees the lock with the last process that holds the file."""
    lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + patience_s
    try:
        while not _locked(lock, directory):
            other = _announced(directory)
            if other is not None and not other.is_gone():
                raise AlreadyRunning(
                    f"run {directory.name} is driven by {other}; end that one first (or remove {directory / DRIVER}, "
                    "if its host is gone for good)"
                )
            if time.monotonic() >= deadline:
                raise AlreadyRunning(
                    f"run {directory.name} has no driver any more, but processes that it left still hold "
                    f"{directory / LOCK}; wait for them to end, or end them"
                )
            time.sleep(POLL_S)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _locked(lock: int, directory: pathlib.Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        other = _announced(directory)
        return other is None or other.is_gone()
    return True


class Desk:
    """The driver's end. Requests that lay there before are answered as expired: they were put to another driver.

    lock is the descriptor of the directory's lock: a guard process that inherits it keeps a new driver out until it has
    ended what is left of the run.
    """

    def __init__(self, directory: pathlib.Path, lock: int = -1) -> None:
        self.lock = lock
        self._folder = directory / REQUESTS
        self._folder.mkdir(exist_ok=True)
        self._seen: set[pathlib.Path] = set()
        for path in self._files():
            if _answer_to(path).exists():  # whoever asked was killed before reading it
                path.unlink(missing_ok=True)
        self._turn_away("expired: it was put before this driver started; ask again")

    def pending(self) -> tuple[list[Request], list[Answer]]:
        """New requests, each told once and in the order of asking, and what is no request and was removed.

        Raises OSError where the folder cannot be read at this moment.
        """
        files = self._files()
        self._seen.intersection_update(files)
        self._clean(self._seen)
        requests, refused = [], []
        for path in files:
            if path in self._seen:
                continue
            self._seen.add(path)
            try:
                requests.append(_read(path))
            except FileNotFoundError:  # withdrawn a moment ago
                continue
            except (OSError, ValueError) as error:
                with contextlib.suppress(OSError):
                    path.unlink()
                refused.append(Answer(False, f"{path.name} is no request: {error}"))
        return requests, refused

    def reply(self, request: Request, answer: Answer) -> None:
        """Answer, unless the asker has left."""
        path = pathlib.Path(request.path)
        if path.exists():
            write_atomically(_answer_to(path), msgspec.json.encode(answer).decode())

    async def serve(
        self,
        handlers: Mapping[str, Handler],
        told: Callable[[str, Answer], None],
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        """Answer requests until cancelled; `told` hears of each, by kind ("" for what was no request).

        A handler returns the answer's sentence. Its ValueError is a refusal, and so is any other failure of it: what
        somebody asked for must not end a run.
        """
        while True:
            try:
                requests, refused = self.pending()
            except OSError as error:  # a network file system's bad moment
                requests, refused = [], [Answer(False, f"requests cannot be read: {error}")]
            for answer in refused:
                told("", answer)
            for request in requests:
                answer = await _handled(request, handlers)
                told(request.kind, answer)
                with contextlib.suppress(OSError):  # the asker hears nothing then, and says so itself
                    self.reply(request, answer)
            await asyncio.sleep(look_every_s)

    def close(self) -> None:
        """Tell whoever still waits that the run has ended."""
        with contextlib.suppress(OSError):
            self._turn_away("the run has ended")

    def _turn_away(self, why: str) -> None:
        requests, _ = self.pending()
        for request in requests:
            self.reply(request, Answer(False, why))

    def _files(self) -> list[pathlib.Path]:
        """The requests; their names begin with the time of asking."""
        return sorted(path for path in self._folder.glob("*.json") if not path.name.endswith(ANSWER))

    def _clean(self, known: set[pathlib.Path]) -> None:
        """Remove answers that nobody asked for or whose asker has left."""
        answered = {_answer_to(path) for path in known}
        for path in self._folder.glob(f"*{ANSWER}"):
            if path not in answered:
                path.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> Request:
    """Raises ValueError for what is no request; never blocks, whatever kind of file it is."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
        raise ValueError("no plain small file")
    values = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    kind = values.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError('it has no "kind"')
    return Request(str(path), kind, values)


async def _handled(request: Request, handlers: Mapping[str, Handler]) -> Answer:
    handler = handlers.get(request.kind)
    if handler is None:
        return Answer(False, f"{request.kind!r} is no request this run knows; it knows {', '.join(sorted(handlers))}")
    try:
        what = f"the request {request.kind!r}"
        return Answer(True, await within(handler(request.values), HANDLER_DEADLINE_S, what, "its handler"))
    except ValueError as error:
        return Answer(False, str(error))
    except Exception as error:  # it is told to the asker and in the events; the run goes on
        return Answer(False, f"it failed: {type(error).__name__}: {error}")
