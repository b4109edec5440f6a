"""This file is the trajectory buffer: every group passes through it exactly once, whatever crashes in between.

    admit -> (sampling) -> put -> waiting -> lease -> leased -> commit -> trained
                        -> drop           -> stale, surplus

The driver alone admits, leases, commits and drops; generators put, learner ranks fetch. A lease belongs to an optimizer
step and survives the process that took it; only `commit` frees a group's memory, once a checkpoint holds the step that
learnt from it. At every moment drawn = trained + dropped + leased + buffered + in flight, in groups, and the same
without in flight in sampled tokens: counters move in the same script as the group, so no crash can part them. Keys
carry the run id, as a hash tag for clusters; nothing is flushed, trimmed or expires.

Every operation may be repeated, so it is, while the server is away (rl/redis_client.py). A server that comes back may
have lost its last second: the driver finds that out from `holdings`, `drawn` and BufferRewound, and does it again.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import redis.exceptions

from rl import buffer_scripts
from rl.buffer_answers import (
    BufferLimits,
    BufferRewound,
    BufferStats,
    Holdings,
    Lease,
    MissingGroups,
    OversizeGroup,
    stats_of,
)
from rl.buffer_scripts import PER_STEP, SCHEMA
from rl.codec import decode, decode_entry, decode_group, encode, encode_entry, encode_group, entry_of
from rl.orders import Draw
from rl.redis_client import BlockingLink, BufferUnavailable, Link, check_server, durability_warning
from rl.trajectory import DROP_REASONS, DropReason, Group, GroupEntry

FETCHED_AT_ONCE = 32  # payloads in one answer, which must come within the answer deadline
COMMITTED_AT_ONCE = 512  # groups in one script, which nobody else can interrupt
WRITTEN_OFF_AT_ONCE = 1000
SCRIPTS = {  # name -> Lua; `PUT` does without the functions
    name: buffer_scripts.HEADER + ("" if name == "PUT" else buffer_scripts.FUNCTIONS) + body
    for name, body in vars(buffer_scripts).items()
    if isinstance(body, str) and name.isupper() and name not in ("HEADER", "FUNCTIONS")
}


class Buffer:
    """One process's connection to a run's buffer. All methods may be awaited concurrently.

    Every method raises BufferUnavailable where Redis refuses, or stays away for longer than the deadline. `warning`
    says what is unsafe about the server, if anything; `reconnects` counts the outages that were survived.
    """

    def __init__(self, link: Link, run_id: str, limits: BufferLimits, owner: str | None) -> None:
        self.warning: str | None = None
        self._link = link
        self._limits = limits
        self._owner = owner
        self._keys = {name: key.encode() for name, key in _keys_of(run_id).items()}
        self._requests = 0
        self._name = secrets.token_hex(8)  # no other process's requests look like ours
        keys = (len(self._keys), *self._keys.values())
        self._heads = {name: (hashlib.sha1(lua.encode()).hexdigest(), *keys) for name, lua in SCRIPTS.items()}

    @classmethod
    async def connect(cls, url: str, run_id: str, limits: BufferLimits, owner: str | None = None) -> Buffer:
        """Opens the buffer of `run_id`, new or left by an earlier process.

        owner is a token of the run directory, which keeps runs of one name apart; whoever joins a run gives none, and
        waits for its server to come back where the owner fails at once.
        Raises ValueError (what the server said, and the fix) where it is unreachable, refuses, is old, may evict, or
        holds keys of this run id that are not this run's. Nothing is ever removed.
        """
        assert "}" not in run_id, f"run id {run_id!r} would end its own hash tag"
        buffer = cls(Link(url, limits.reconnect_deadline_s), run_id, limits, owner)
        try:
            await buffer._open()
        except BaseException:
            await buffer.close()
            raise
        buffer._link.greet = buffer._claim_again
        return buffer

    async def _open(self) -> None:
        try:
            if self._owner is None:
                info = await self._link.call(self._link.client.info)
            else:
                info = await self._link.client.info()
            check_server(info, self._link.where)
            self.warning = durability_warning(info, self._link.where)
            await self._claim()
        except (redis.RedisError, OSError, BufferUnavailable) as error:
            raise ValueError(
                f"Redis at {self._link.where} refused: {error}; start it, or correct buffer.redis "
                "(null starts an embedded server)"
            ) from error

    async def _claim(self) -> None:
        """Sees that the keys are this run's, and marks them."""
        types = buffer_scripts.KEYS.values()
        problem = await self._script("OPEN", (SCHEMA, self._owner or "", *types))
        if problem:
            kind, key, found = (part.decode() for part in problem)
            raise ValueError(_foreign(kind, key, found, self._link.where))

    async def _claim_again(self) -> None:
        """After an outage, when the server may be another one, or may have lost the marks."""
        try:
            await self._claim()
        except ValueError as error:
            raise BufferUnavailable(str(error)) from error

    @property
    def reconnects(self) -> int:
        """How many outages of the server this connection has survived."""
        return self._link.reconnects

    async def close(self) -> None:
        """Closes the connections; the data stays."""
        await self._link.close()

    async def delete_run(self) -> None:
        """Removes this run's keys and no others; the object is of no use afterwards."""
        await self._command("UNLINK", *self._keys.values())

    # Drawing

    async def admit(self, draw: Draw, state: bytes | None = None) -> None:
        """Stores a draw, before it is sampled, until its group is put or dropped; with the sampling state after it."""
        kept = () if state is None else (state,)
        await self._run("ADMIT", draw.group_id, draw.draw, encode(draw), *kept)

    async def drawn(self) -> tuple[Draw, ...]:
        """Draws neither published nor dropped, by number: in flight, or lost with the process that sampled them."""
        draws = [decode(data, Draw) for data in await self._command("HVALS", self._keys["drawn"])]
        return tuple(sorted(draws, key=lambda draw: draw.draw))

    async def has_room(self) -> bool:
        """Whether what waits is below both caps.

        Leased payloads do not count: a cap full of them would keep the next batch, and with it their commit, from
        coming.
        """
        held = await self._command("HMGET", self._keys["counters"], "buffered:bytes", "buffered:groups")
        return int(held[0] or 0) < self._limits.max_bytes and int(held[1] or 0) < self._limits.max_groups

    async def put(self, group: Group) -> bool:
        """Publishes a group; False if it is known already, whatever became of it.

        Raises OversizeGroup (a ValueError) if it alone exceeds the cap.
        """
        payload = encode_group(group)
        if len(payload) > self._limits.max_bytes:
            raise OversizeGroup(
                f"oversize: group {group.group_id} has {len(payload)} bytes, buffer.max_bytes is "
                f"{self._limits.max_bytes}; raise it, or lower rollout.group_size or rollout.max_tokens"
            )
        return bool(await self._run("PUT", *described(group, payload)))

    async def drop(self, draw: int, group_id: str, tokens: int, reason: DropReason) -> bool:
        """Counts a group that will never be published, with its sampled tokens; repeating it changes nothing.

        False if it is in the buffer: a generator that was taken for dead had published it, and it stays.
        """
        assert reason in DROP_REASONS, reason
        return bool(await self._run("DROP", group_id, draw, tokens, reason))

    # Training

    async def lease(self, step: int, count: int, version: int, max_lag: int, ordered: bool = False) -> Lease:
        """Leases exactly `count` waiting groups for `step`, or none if fewer are fresh at the learner's `version`.

        First come, first leased; with `ordered` the lowest draws, in order of draw. Waiting groups whose lag exceeds
        max_lag are dropped for good, whether or not the lease succeeds. A step that has a batch gets the same again.
        Raises BufferRewound, with nothing done, where Redis does not know that the step before was leased.
        """
        assert 0 < count < PER_STEP and step > 0, (step, count)
        last, entries, stale = await self._run("LEASE", self._request(), step, count, version, max_lag, int(ordered))
        if step > last + 1:
            raise BufferRewound(
                f"Redis at {self._link.where} last leased for step {last}, and step {step - 1} has been leased: the "
                "server lost its last writes"
            )
        return Lease(_entries(entries), _entries(stale))

    async def lease_exactly(self, step: int, group_ids: Sequence[str]) -> tuple[GroupEntry, ...]:
        """Leases these groups, waiting or leased, for `step`, in this order: the redelivery of a batch.

        Raises MissingGroups, with nothing done, where some are not in the buffer.
        """
        missing, entries = await self._run("LEASE_EXACTLY", step, *group_ids)
        if missing:
            raise MissingGroups([group_id.decode() for group_id in missing], self._link.where)
        return _entries(entries)

    async def restore(self, step: int, group: Group) -> None:
        """Brings a group back from the archive, leased for `step` as the last of its batch.

        For what Redis lost, and for what was committed for a checkpoint that turned out damaged.
        """
        await self._run("RESTORE", step, *described(group, encode_group(group)))

    async def fetch(self, group_ids: Sequence[str]) -> list[Group]:
        """The payloads of live groups, in the order asked for. Raises MissingGroups."""
        payloads: list[bytes | None] = []
        for some in _slices(group_ids, FETCHED_AT_ONCE):
            payloads += await self._command("HMGET", self._keys["payloads"], *some)
        return _groups(group_ids, payloads, self._link.where)

    async def commit(self, entries: Sequence[GroupEntry], step: int = 0) -> None:
        """Counts groups as trained and frees their memory; what has ended already is passed over.

        Groups that Redis knows nothing of, because it lost them with its last second, are counted as well. With `step`
        Redis also learns that this step has been leased.
        """
        facts = list({entry.group_id: (entry.group_id, entry.draw, entry.num_tokens) for entry in entries}.values())
        for some in _slices(facts, COMMITTED_AT_ONCE):
            await self._run("COMMIT", step, msgspec.msgpack.encode(some))

    async def confirm_leases(self, step: int) -> None:
        """Tells Redis, which may have lost it, that all steps up to this one have been leased."""
        await self._run("COMMIT", step, msgspec.msgpack.encode([]))

    async def release(self, step: int) -> list[str]:
        """Has the groups that are leased for `step` wait again, behind all others; returns their ids."""
        return [group_id.decode() for group_id in await self._run("RELEASE", self._request(), step)]

    async def write_off(self, next_draw: int) -> int:
        """Counts draws below next_draw that nobody has as aborted; returns how many.

        For the start of a resumed run, when nothing moves: Redis may have lost its last second together with a driver.
        """
        floor = int(await self._command("HGET", self._keys["counters"], "floor") or 0)
        known = {int(number) for number in await self._command("SMEMBERS", self._keys["ended"])}
        known |= {draw.draw for draw in await self.drawn()}
        known |= {int(draw_of(facts)) for facts in await self._command("HVALS", self._keys["entries"])}
        lost = [draw for draw in range(floor, next_draw) if draw not in known]
        for some in _slices(lost, WRITTEN_OFF_AT_ONCE):
            await self._run("WRITE_OFF", *some)
        return len(lost)

    async def drop_waiting(self, reason: DropReason) -> tuple[GroupEntry, ...]:
        """Drops every waiting group, as at the end of a run, and returns what they were."""
        assert reason in DROP_REASONS, reason
        return _entries(await self._run("DROP_WAITING", self._request(), reason))

    # Looking, and the driver's own state

    async def holdings(self) -> Holdings:
        """Every live group."""
        waiting, leased = await self._run("HOLDINGS")
        scores = zip(leased[::2], leased[1::2], strict=True)
        return Holdings(_entries(waiting), {name.decode(): int(score) // PER_STEP for name, score in scores})

    async def keep_state(self, state: bytes) -> None:
        """Stores the driver's sampling state in place of the last one."""
        await self._command("SET", self._keys["state"], state)

    async def read_state(self) -> bytes | None:
        """The sampling state that was stored last."""
        return await self._command("GET", self._keys["state"])

    async def server_id(self) -> str:
        """Changes when another server answers, or the same one has been started again."""
        info: Any = await self._link.call(lambda: self._link.client.info("server"))
        return str(info["run_id"])

    async def stats(self) -> BufferStats:
        """Counters of the whole run so far, taken at one moment."""
        return stats_of(*await self._run("STATS"))

    def _request(self) -> str:
        """A name for one operation, the same in all its attempts, by which Redis tells a repetition from the next."""
        self._requests += 1
        return f"{self._name}/{self._requests}"

    async def _command(self, *words: Any) -> Any:
        return await self._link.call(lambda: self._link.client.execute_command(*words))

    async def _run(self, name: str, *arguments: Any) -> Any:
        return await self._link.call(lambda: self._script(name, arguments))

    async def _script(self, name: str, arguments: Iterable[Any]) -> Any:
        head = self._heads[name]
        try:
            return await self._link.client.execute_command("EVALSHA", *head, *arguments)
        except redis.exceptions.NoScriptError:  # a server that has just started
            return await self._link.client.execute_command("EVAL", SCRIPTS[name], *head[1:], *arguments)


class PayloadReader:
    """A blocking reader of payloads for learner ranks, which run no event loop."""

    def __init__(self, url: str, run_id: str, deadline_s: float = 60.0) -> None:
        self._link = BlockingLink(url, deadline_s)
        self._payloads = _keys_of(run_id)["payloads"]

    def fetch(self, group_ids: Sequence[str]) -> list[Group]:
        """As `Buffer.fetch`."""
        payloads: list[bytes | None] = []
        for some in _slices(group_ids, FETCHED_AT_ONCE):
            words = ("HMGET", self._payloads, *some)
            payloads += self._link.call(lambda words=words: self._link.client.execute_command(*words))
        return _groups(group_ids, payloads, self._link.where)

    def close(self) -> None:
        """Closes the connection."""
        self._link.close()


def _foreign(kind: str, key: str, found: str, where: str) -> str:
    what = {
        "type": f"is a {found}, which this version of Slipstream does not make",
        "schema": f"has layout {found} where this version writes {SCHEMA}",
        "owner": "belongs to another run of the same id",
    }[kind]
    return (
        f"key {key} in Redis at {where} {what}; nothing was touched: give the run another run.name, use another "
        "database, or remove the keys that start like it if nobody needs them"
    )


def draw_of(facts: bytes) -> float:
    """The draw's number in a value of the hash `entries`, whose layout `keep` in rl/buffer_scripts.py decides."""
    return struct.unpack_from(">d", facts)[0]


def described(group: Group, payload: bytes) -> tuple[Any, ...]:
    """A group as the scripts are told of it: id, draw, oldest version, tokens, entry, payload."""
    entry = entry_of(group, len(payload))
    return entry.group_id, entry.draw, entry.oldest_version, entry.num_tokens, encode_entry(entry), payload


def _keys_of(run_id: str) -> dict[str, str]:
    return {part: f"slipstream:{{{run_id}}}:{part}" for part in buffer_scripts.KEYS}


def _entries(encoded: list[bytes]) -> tuple[GroupEntry, ...]:
    return tuple(decode_entry(data) for data in encoded)


def _groups(group_ids: Sequence[str], payloads: list[bytes | None], where: str) -> list[Group]:
    gone = [name for name, payload in zip(group_ids, payloads, strict=True) if payload is None]
    if gone:
        raise MissingGroups(gone, where)
    return [decode_group(payload) for payload in payloads if payload is not None]


def _slices(things: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [things[first : first + size] for first in range(0, len(things), size)]
