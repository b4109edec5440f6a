"""This file is the trajectory buffer: it alone speaks Redis, and every group passes through it exactly once.

    admit -> (sampling) -> put -> buffered -> lease -> leased -> commit -> trained
                        -> drop             -> stale, surplus

A lease belongs to the run and survives the process that took it; only `commit` frees a group's memory, once a
checkpoint holds the step that learnt from it. At every moment drawn = trained + dropped + leased + buffered + in
flight, in groups, and the same without in flight in sampled tokens: counters move in the same script as the group
itself, so no crash can part them. Keys carry the run id, as a hash tag for clusters; nothing is flushed or expires.

Commands are not retried: a lease whose answer was lost would be taken twice. `put`, `drop`, `commit` and `lease_again`
are idempotent by group id, so a caller may repeat them.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import redis
import redis.asyncio
from redis.backoff import NoBackoff

from rl import buffer_scripts
from rl.codec import decode_entry, decode_group, encode_entry, encode_group, entry_of
from rl.trajectory import DROP_REASONS, DropReason, Group, GroupEntry

ANSWER_DEADLINE_S = 60.0
BLOCK_S = 10.0  # one blocking read; well below the answer deadline, so that a silent server is told from a quiet run
MAX_CONNECTIONS = 32
OLDEST_REDIS = (6, 2)


class BufferUnavailable(RuntimeError):
    """Redis stopped answering, or refused a command, in the middle of a run."""


class OversizeGroup(ValueError):
    """A single group is larger than the whole buffer may be."""


class Lease(msgspec.Struct, frozen=True):
    """What `lease` did: `entries` to train on (none if too few were fresh), and those dropped as stale on the way."""

    entries: tuple[GroupEntry, ...]
    dropped: tuple[GroupEntry, ...]


class BufferStats(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything that was ever drawn is now; one consistent look.

    Tokens are sampled tokens, bytes are payload. drawn, sampled_tokens (all that was published or dropped), trained and
    dropped (reason -> groups, tokens) are totals since the run began, over restarts. oldest_age_s: seconds since the
    oldest buffered group was published, 0 if there is none.
    """

    drawn: int
    sampled_tokens: int
    buffered_groups: int
    buffered_tokens: int
    buffered_bytes: int
    leased_groups: int
    leased_tokens: int
    leased_bytes: int
    trained_groups: int
    trained_tokens: int
    dropped: dict[DropReason, tuple[int, int]]
    oldest_age_s: float

    @property
    def in_flight(self) -> int:
        """Groups drawn that are neither published nor dropped yet."""
        dropped = sum(groups for groups, _ in self.dropped.values())
        return self.drawn - self.buffered_groups - self.leased_groups - self.trained_groups - dropped


class Buffer:
    """One process's connection to a run's buffer. All methods may be awaited concurrently.

    Every method raises BufferUnavailable where Redis does not answer or refuses.
    """

    def __init__(self, client: redis.asyncio.Redis, url: str, run_id: str, max_bytes: int) -> None:
        self._client = client
        self._where = masked(url)
        self._max_bytes = max_bytes
        self._keys = _keys_of(run_id)
        self._newest = b"0-0"  # stream id up to which `wait_published` has nothing new to tell
        self._scripts = {
            name: client.register_script(buffer_scripts.PRELUDE + body)
            for name, body in vars(buffer_scripts).items()
            if name.isupper() and name != "PRELUDE"
        }

    @classmethod
    async def connect(cls, url: str, run_id: str, max_bytes: int) -> Buffer:
        """Opens the buffer of `run_id`, new or left by an earlier process. max_bytes caps the payloads not yet leased.

        Raises ValueError (what the server said, and the fix) where it is unreachable, refuses, is old, or may evict.
        """
        assert "}" not in run_id, f"run id {run_id!r} would end its own hash tag"
        buffer = cls(_client(url, redis.asyncio), url, run_id, max_bytes)
        try:
            await buffer._open()
        except ValueError:
            await buffer.close()
            raise
        return buffer

    async def _open(self) -> None:
        try:
            check_server(await self._client.info(), self._where)
            await self._scripts["OPEN"](keys=self._keys)
        except redis.RedisError as error:
            raise ValueError(
                f"Redis at {self._where} refused: {error}; start it, or correct buffer.redis "
                "(null starts an embedded server)"
            ) from error

    async def close(self) -> None:
        """Closes the connections; the data stays."""
        await self._client.aclose()

    async def admit(self, count: int = 1) -> int:
        """Counts groups as drawn and returns the first one's number, from 0 and never repeated, over restarts too.

        Await it before they are sampled: whatever is published or dropped must have been counted first.
        """
        with _translated(self._where):
            return await self._client.hincrby(self._keys[3], "drawn:groups", count) - count

    async def has_room(self) -> bool:
        """Whether the payloads not yet leased stay below the cap.

        Leased ones do not count: a cap full of them would keep the next batch, and with it their commit, from coming.
        """
        with _translated(self._where):
            waiting = await self._client.hget(self._keys[3], "buffered:bytes")
        return int(waiting or 0) < self._max_bytes

    async def put(self, group: Group) -> bool:
        """Publishes a group; False if its id is known already, whatever became of it.

        Raises OversizeGroup (a ValueError) if it alone exceeds the cap.
        """
        payload = encode_group(group)
        if len(payload) > self._max_bytes:
            raise OversizeGroup(
                f"oversize: group {group.group_id} has {len(payload)} bytes, buffer.max_bytes is {self._max_bytes}; "
                "raise it, or lower rollout.group_size or rollout.max_tokens"
            )
        entry = entry_of(group, len(payload))
        described = (entry.group_id, entry.draw, entry.oldest_version, entry.num_tokens, encode_entry(entry))
        return bool(await self._run("PUT", *described, payload))

    async def drop(self, group_id: str, tokens: int, reason: DropReason) -> bool:
        """Counts a group that will never be published, with its sampled tokens; False if its id is known already."""
        assert reason in DROP_REASONS, reason
        return bool(await self._run("DROP", group_id, tokens, reason))

    async def lease(self, count: int, version: int, max_lag: int, ordered: bool = False) -> Lease:
        """Leases exactly `count` buffered groups, or none if fewer are fresh at the learner's `version`.

        First come, first leased; with `ordered` the lowest draws, in order of draw. Buffered groups whose lag exceeds
        max_lag are dropped for good, whether or not the lease succeeds.
        """
        assert count > 0, count
        entries, stale, self._newest = await self._run("LEASE", count, version, max_lag, int(ordered))
        return Lease(_entries(entries), _entries(stale))

    async def lease_again(self, group_ids: Sequence[str]) -> tuple[GroupEntry, ...]:
        """Redelivers groups that an earlier process leased and did not commit, in the order asked for.

        Raises ValueError naming those that are not leased.
        """
        missing, entries = await self._run("LEASE_AGAIN", *group_ids)
        if missing:
            raise ValueError(
                f"groups {_names(missing)} are not leased in the buffer at {self._where}, so the step that held them "
                "cannot be repeated; resume from another checkpoint, or with the Redis data the run was using"
            )
        return _entries(entries)

    async def leased(self) -> tuple[GroupEntry, ...]:
        """All groups leased and not committed. After a crash some may stand in no step ledger: give those back."""
        return _entries(await self._run("LEASED"))

    async def give_back(self, group_ids: Sequence[str]) -> int:
        """Makes leased groups available again, behind those that wait; returns how many were leased."""
        return await self._run("GIVE_BACK", *group_ids)

    async def fetch(self, group_ids: Sequence[str]) -> list[Group]:
        """The payloads of live groups, in the order asked for. Raises ValueError naming those that are gone."""
        if not group_ids:
            return []
        with _translated(self._where):
            payloads: Any = await self._client.hmget(self._keys[1], list(group_ids))
        return _groups(group_ids, payloads, self._where)

    async def commit(self, group_ids: Sequence[str]) -> None:
        """Counts leased groups as trained and frees their memory; those committed already are passed over.

        Raises ValueError naming groups that were never leased; then nothing is committed.
        """
        unknown = await self._run("COMMIT", *dict.fromkeys(group_ids))
        if unknown:
            raise ValueError(f"groups {_names(unknown)} are not leased in the buffer at {self._where}: not committed")

    async def drop_buffered(self, reason: DropReason) -> tuple[GroupEntry, ...]:
        """Drops every buffered group, as at the end of a run, and returns what they were."""
        assert reason in DROP_REASONS, reason
        return _entries(await self._run("DROP_BUFFERED", reason))

    async def drop_in_flight(self, reason: DropReason) -> int:
        """Counts what was drawn and never arrived as dropped, without tokens: nobody knows how far it came.

        Only for a moment when no generator is alive, such as a restart or the end. Returns the number of groups.
        """
        assert reason in DROP_REASONS, reason
        return await self._run("DROP_IN_FLIGHT", reason)

    async def wait_published(self, seconds: float) -> bool:
        """Blocks until a group is published after this object's last `lease` or wait; False once `seconds` are over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            block_ms = max(1, int(1000 * min(left, BLOCK_S)))  # 0 would mean forever
            with _translated(self._where):
                reply: Any = await self._client.xread({self._keys[0]: self._newest}, count=1, block=block_ms)
            if reply:
                self._newest = reply[0][1][0][0]
                return True
        return False

    async def stats(self) -> BufferStats:
        """Counters of the whole run so far, taken at one moment."""
        flat, age_ms = await self._run("STATS")
        counted = Counter({name.decode(): int(value) for name, value in zip(flat[::2], flat[1::2], strict=True)})
        return BufferStats(
            drawn=counted["drawn:groups"],
            sampled_tokens=counted["sampled:tokens"],
            buffered_groups=counted["buffered:groups"],
            buffered_tokens=counted["buffered:tokens"],
            buffered_bytes=counted["buffered:bytes"],
            leased_groups=counted["leased:groups"],
            leased_tokens=counted["leased:tokens"],
            leased_bytes=counted["leased:bytes"],
            trained_groups=counted["trained:groups"],
            trained_tokens=counted["trained:tokens"],
            dropped={reason: (counted[f"{reason}:groups"], counted[f"{reason}:tokens"]) for reason in DROP_REASONS},
            oldest_age_s=age_ms / 1000,
        )

    async def delete_run(self) -> None:
        """Removes this run's keys and no others; the object is of no use afterwards."""
        with _translated(self._where):
            await self._client.unlink(*self._keys)

    async def _run(self, name: str, *arguments: Any) -> Any:
        with _translated(self._where):
            return await self._scripts[name](keys=self._keys, args=arguments)


class PayloadReader:
    """A blocking reader of payloads for learner ranks, which run no event loop."""

    def __init__(self, url: str, run_id: str) -> None:
        self._client = _client(url, redis)
        self._where = masked(url)
        self._payloads = _keys_of(run_id)[1]

    def fetch(self, group_ids: Sequence[str]) -> list[Group]:
        """As `Buffer.fetch`."""
        if not group_ids:
            return []
        with _translated(self._where):
            payloads: Any = self._client.hmget(self._payloads, list(group_ids))
        return _groups(group_ids, payloads, self._where)

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()


def masked(url: str) -> str:
    """A Redis URL that may be shown: credentials as three stars, query left out, even where it is malformed."""
    return re.sub("//.*@", "//***@", url).partition("?")[0]


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


@contextmanager
def _translated(where: str) -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise BufferUnavailable(
            f"the trajectory buffer, Redis at {where}, failed: {type(error).__name__}: {error}; "
            "look at the server's log and memory, then resume the run"
        ) from error


def _client(url: str, flavour: Any) -> Any:
    """A client of `redis` or `redis.asyncio` whose calls wait for a free connection and are never repeated silently."""
    try:
        pool = flavour.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=ANSWER_DEADLINE_S,
            socket_timeout=ANSWER_DEADLINE_S,
            socket_read_size=1 << 20,
            protocol=2,
            retry=flavour.retry.Retry(NoBackoff(), 0),
        )
    except ValueError:  # its message may quote a part of the password
        raise ValueError(
            f"buffer.redis {masked(url)!r} is not a Redis URL; write redis://[user:password@]host:port/0 or "
            "rediss://..., with special characters of the password percent-encoded"
        ) from None
    return flavour.Redis.from_pool(pool)


def _keys_of(run_id: str) -> list[str]:
    return [f"slipstream:{{{run_id}}}:{part}" for part in ("stream", "payloads", "groups", "counters")]


def _entries(encoded: list[bytes]) -> tuple[GroupEntry, ...]:
    return tuple(decode_entry(data) for data in encoded)


def _groups(group_ids: Sequence[str], payloads: list[bytes | None], where: str) -> list[Group]:
    gone = [name for name, payload in zip(group_ids, payloads, strict=True) if payload is None]
    if gone:
        raise ValueError(f"groups {', '.join(gone)} are not in the buffer at {where}: committed, dropped or never put")
    return [decode_group(payload) for payload in payloads if payload is not None]


def _names(group_ids: list[bytes]) -> str:
    return ", ".join(group_id.decode() for group_id in group_ids)
