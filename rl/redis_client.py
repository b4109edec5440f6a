"""This file reaches Redis: it reads the server's URL, opens clients, and waits out a server that is gone for a while.

    redis://[user:password@]host:port[/db]                                        plain
    rediss://...[?ssl_ca_certs=ca.pem&...]                                        TLS
    redis+sentinel://[user:password@]host:port[,host:port]/service[/db][?...]     the master that Sentinel names
    rediss+sentinel://...                                                         the same, TLS to all of them

A call that failed for want of a server is repeated, with exponential backoff and full jitter, until a deadline. Only
calls that may be repeated go through here: the answer of the first attempt may have been lost, not its effect. What a
server refuses (wrong password, no memory, a defect of ours) is not repeated.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.exceptions
import redis.sentinel
from redis.backoff import NoBackoff

T = TypeVar("T")
SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
TLS_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
TLS_WORDS = {"ssl_cert_reqs": ("none", "optional", "required"), "ssl_check_hostname": ("true", "false")}
SENTINEL_NAMES = ("sentinel_username", "sentinel_password")
DEFAULT_PORTS = {False: 6379, True: 26379}  # by whether Sentinel is asked

ANSWER_DEADLINE_S = 20.0  # for one answer; a stopped server holds its connections open, so only silence tells
SHORTEST_ANSWER_DEADLINE_S = 2.0  # below this a slow fsync would count as an outage
MAX_CONNECTIONS = 32
OLDEST_REDIS = (6, 2)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
# A failover shows in these answers, some of them inside the message of a script that hit them.
PASSING = re.compile(r"\b(READONLY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|LOADING)\b")
PASSING_TYPES = (
    redis.ConnectionError,
    redis.TimeoutError,
    OSError,
    redis.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
)
REFUSALS = (redis.AuthenticationError, redis.exceptions.AuthorizationError)  # both are ConnectionErrors to redis-py


class BufferUnavailable(RuntimeError):
    """Redis stayed away for longer than the deadline, or refused a command, in the middle of a run."""


@dataclass(frozen=True)
class Address:
    """A Redis URL, taken apart. Its text never shows a credential.

    hosts are the server, or the Sentinels where `service` names a master; `tls` holds redis-py's ssl_ arguments.
    """

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    service: str | None = None
    db: int = 0
    login: dict[str, str] = field(default_factory=dict, repr=False)
    sentinel_login: dict[str, str] = field(default_factory=dict, repr=False)
    tls: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        user = "***@" if self.login else ""
        path = f"{self.service}/{self.db}" if self.service else str(self.db)
        return f"{self.scheme}://{user}{hosts}/{path}"


def parse_url(url: str) -> Address:
    """Takes a URL apart. Raises ValueError (what is wrong, and the fix, without any part of a password)."""
    try:
        return _parse(url)
    except _Malformed as error:
        raise ValueError(
            f"buffer.redis {_scheme_of(url)}://... is not a usable Redis URL: {error}; write "
            "redis://[user:password@]host:port/0, rediss://... or redis+sentinel://host:port,host:port/service, "
            "with special characters of a password percent-encoded"
        ) from None


def masked(url: str) -> str:
    """A Redis URL that may be shown. Where it is malformed nobody can tell password from host, so both are left out."""
    try:
        return str(_parse(url))
    except _Malformed:
        return f"{_scheme_of(url)}://***"


class _Malformed(ValueError):
    """Its message must not quote the URL: any part of it may belong to a password."""


def _scheme_of(url: str) -> str:
    scheme = url.partition("://")[0]
    return scheme if scheme in SCHEMES else "?"


def _parse(url: str) -> Address:
    if _scheme_of(url) == "?":
        raise _Malformed(f"it starts with none of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise _Malformed("brackets or query do not parse") from None
    if parts.fragment:
        raise _Malformed("a # cuts it off")
    by_sentinel = parts.scheme.endswith("+sentinel")
    credentials, at, names = parts.netloc.rpartition("@")
    hosts = tuple(_host(name, by_sentinel) for name in (names.split(",") if by_sentinel else [names]))
    service, db = _path(parts, by_sentinel)
    options = _options(query, parts.scheme.startswith("rediss"), by_sentinel)
    return Address(
        scheme=parts.scheme,
        hosts=hosts,
        service=service,
        db=db,
        login=_login(credentials) if at else {},
        sentinel_login={name.split("_")[1]: options.pop(name) for name in SENTINEL_NAMES if name in options},
        tls=options,
    )


def _login(credentials: str) -> dict[str, str]:
    user, colon, password = credentials.partition(":")
    if not colon or not password:
        raise _Malformed("what stands before the @ is not user:password or :password")
    login = {"password": unquote(password)}
    return {"username": unquote(user), **login} if user else login


def _host(text: str, by_sentinel: bool) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9_.-]+))(?::(\d{1,5}))?", text)
    port = int(match[3] or DEFAULT_PORTS[by_sentinel]) if match else 0
    if not match or not 0 < port < 65536:
        raise _Malformed("the host or port is missing or malformed")
    return match[1] or match[2], port


def _path(parts: SplitResult, by_sentinel: bool) -> tuple[str | None, int]:
    pieces = parts.path.strip("/").split("/") if parts.path.strip("/") else []
    service = unquote(pieces.pop(0)) if by_sentinel and pieces else None
    if by_sentinel and service is None:
        raise _Malformed("the name of the Sentinel service is missing behind the hosts")
    if len(pieces) > 1 or (pieces and not re.fullmatch(r"\d{1,6}", pieces[0])):
        raise _Malformed("the database behind the host is not a number")
    return service, int(pieces[0]) if pieces else 0


def _options(query: list[tuple[str, str]], tls: bool, by_sentinel: bool) -> dict[str, Any]:
    allowed = (*TLS_FILES, *TLS_WORDS) if tls else ()
    allowed = (*allowed, *SENTINEL_NAMES) if by_sentinel else allowed
    options: dict[str, Any] = {}
    for name, value in query:
        if name not in allowed or name in options:
            raise _Malformed(f"a query parameter is unknown or given twice; allowed are {', '.join(allowed) or 'none'}")
        if not value or (name in TLS_WORDS and value not in TLS_WORDS[name]):
            raise _Malformed(f"{name} must be {' or '.join(TLS_WORDS.get(name, ('given a value',)))}")
        options[name] = value == "true" if name == "ssl_check_hostname" else value
    return options


def open_client(address: Address, deadline_s: float, flavour: Any, sentinel: Any) -> tuple[Any, list[Any]]:
    """A client of `redis` (with redis.sentinel) or `redis.asyncio`, and everything to close after it.

    It fails at once: whoever calls repeats. Nothing is connected yet.
    """
    answer_s = min(ANSWER_DEADLINE_S, max(SHORTEST_ANSWER_DEADLINE_S, deadline_s / 3))
    settings: dict[str, Any] = {
        "socket_timeout": answer_s,
        "socket_connect_timeout": answer_s,
        "socket_keepalive": True,
        "protocol": 2,
        "retry": flavour.retry.Retry(NoBackoff(), 0),
    }
    if address.scheme.startswith("rediss"):
        settings |= {"ssl": True, **address.tls}
    data = {**settings, **address.login, "db": address.db, "socket_read_size": 1 << 20}
    if address.service is None:
        host, port = address.hosts[0]
        kind = flavour.connection.SSLConnection if data.pop("ssl", False) else flavour.connection.Connection
        pool = flavour.ConnectionPool(connection_class=kind, host=host, port=port, **data)
        return flavour.Redis.from_pool(pool), []
    guards = sentinel.Sentinel(address.hosts, sentinel_kwargs={**settings, **address.sentinel_login}, **data)
    return guards.master_for(address.service), list(guards.sentinels)


class Patience:
    """How long one call is repeated, and how long to wait in between."""

    def __init__(self, where: str, deadline_s: float) -> None:
        self._where = where
        self._deadline_s = deadline_s
        self._failures = 0
        self._began = 0.0

    def pause_s(self, error: Exception) -> float:
        """Seconds to wait before the next attempt.

        Raises BufferUnavailable where `error` is no outage, or the outage has lasted longer than the deadline.
        """
        said = f"{type(error).__name__}: {error}"
        if not is_passing(error):
            raise BufferUnavailable(
                f"the trajectory buffer, Redis at {self._where}, refused: {said}; look at the server's log and memory, "
                "then resume the run: nothing is lost"
            ) from error
        if not self._failures:
            self._began = time.monotonic()
        left = self._deadline_s - (time.monotonic() - self._began)
        if left <= 0:
            raise BufferUnavailable(
                f"the trajectory buffer, Redis at {self._where}, has been away for {self._deadline_s:.0f} s, which is "
                f"buffer.reconnect_deadline_s; it last failed with {said}; start it again with its data, then resume "
                "the run"
            ) from error
        limit = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures, 10))
        self._failures += 1
        return min(left, random.uniform(0, limit))


def is_passing(error: Exception) -> bool:
    """Whether an error says that the server is away, starting or changing its role, and not that it refuses."""
    if isinstance(error, REFUSALS):
        return False
    if isinstance(error, PASSING_TYPES):
        return True
    return isinstance(error, redis.ResponseError) and bool(PASSING.search(str(error)))


def check_server(info: dict[str, Any], where: str) -> None:
    """Refuses, by ValueError, a server whose INFO tells that it lacks commands or may evict trajectories."""
    version = str(info.get("redis_version", "0.0"))
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST_REDIS:
        raise ValueError(f"Redis at {where} is version {version}; Slipstream needs 6.2 or newer: upgrade the server")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys"):  # volatile-* touches only keys that expire, and none of ours does
        raise ValueError(
            f"Redis at {where} has maxmemory-policy {policy} and would silently evict trajectories; "
            "set maxmemory-policy noeviction there, or set buffer.redis to another server"
        )


def durability_warning(info: dict[str, Any], where: str) -> str | None:
    """What a person should know of a server that would forget everything at its end; None if it would not."""
    if int(info.get("aof_enabled", 1)):
        return None
    return (
        f"Redis at {where} appends nothing to disk: if it ends, what it holds is sampled again; "
        "set appendonly yes and appendfsync everysec there"
    )


class Link:
    """One process's asyncio connection to the server, which outlives the server's restarts and failovers.

    `reconnects` counts the outages survived. `greet` is called before the first call that follows a failure, on the
    server that answers then, which may be another one.
    """

    def __init__(self, url: str, deadline_s: float) -> None:
        address = parse_url(url)
        self.where = str(address)
        self.deadline_s = deadline_s
        self.reconnects = 0
        self.client, self._others = open_client(address, deadline_s, redis.asyncio, redis.asyncio.sentinel)
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._lost = False
        self.greet: Callable[[], Awaitable[None]] | None = None

    async def call(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of `attempt`, which is repeated while the server is away. Raises BufferUnavailable."""
        cancels = _cancels()
        patience: Patience | None = None
        while True:
            try:
                async with self._slots:
                    if self._lost and self.greet:
                        await self.greet()
                    result = await attempt()
                if self._lost:
                    self._lost = False
                    self.reconnects += 1
                return result
            except (redis.RedisError, OSError) as error:
                if _cancels() > cancels:  # redis-py took our cancellation for a time-out of its own
                    raise asyncio.CancelledError from error
                patience = patience or Patience(self.where, self.deadline_s)
                pause_s = patience.pause_s(error)
                self._lost = True
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        """Closes every connection."""
        for client in (self.client, *self._others):
            await client.aclose()


def _cancels() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task else 0


class BlockingLink:
    """The same for processes without an event loop."""

    def __init__(self, url: str, deadline_s: float) -> None:
        address = parse_url(url)
        self.where = str(address)
        self.deadline_s = deadline_s
        self.client, self._others = open_client(address, deadline_s, redis, redis.sentinel)

    def call(self, attempt: Callable[[], T]) -> T:
        """As `Link.call`."""
        patience = Patience(self.where, self.deadline_s)
        while True:
            try:
                return attempt()
            except (redis.RedisError, OSError) as error:
                pause_s = patience.pause_s(error)
            time.sleep(pause_s)

    def close(self) -> None:
        """Closes every connection."""
        for client in (self.client, *self._others):
            client.close()
