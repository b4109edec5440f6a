"""This file puts the types of rl/trajectory.py on the wire: msgpack behind a header that tells foreign or torn bytes.

Layout: magic `slip`, one byte of schema, CRC-32 of the body (big-endian), msgpack body. Nothing is ever pickled. A
field added with a default keeps the schema; anything else that changes a stored group's meaning raises SCHEMA. Entries
live no longer than their run: another version's are refused by their shape.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, TypeVar

import msgspec

from rl.trajectory import Group, GroupEntry

T = TypeVar("T")
MAGIC = b"slip"
SCHEMA = 1
HEADER = struct.Struct(">4sBI")


def encode(value: Any) -> bytes:
    """Any msgspec-able value as bytes. Raises ValueError where a part of it is not msgpack, such as a callable."""
    try:
        body = msgspec.msgpack.encode(value)
    except (TypeError, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(
            f"a {type(value).__name__} cannot be written as msgpack: {error}; prompt columns may hold only text, "
            "64-bit numbers, booleans, null, lists and mappings of these"
        ) from error
    return HEADER.pack(MAGIC, SCHEMA, zlib.crc32(body)) + body


def decode(data: bytes, type: type[T]) -> T:
    """What `encode` wrote, as `type`. Raises ValueError on foreign, torn or differently shaped bytes."""
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise ValueError(f"{len(data)} bytes starting {data[:8]!r} were not written by this project's codec")
    _, schema, checksum = HEADER.unpack_from(data)
    if schema != SCHEMA:
        raise ValueError(f"bytes carry schema {schema}, this version reads {SCHEMA}; use the version that wrote them")
    body = memoryview(data)[HEADER.size :]
    if zlib.crc32(body) != checksum:
        raise ValueError(f"the checksum of {len(body)} bytes is not the one they carry: they are damaged or cut off")
    try:
        return msgspec.msgpack.decode(body, type=type)
    except msgspec.DecodeError as error:
        raise ValueError(f"bytes do not hold a {type.__name__}: {error}") from error


def encode_group(group: Group) -> bytes:
    """A group's payload."""
    return encode(group)


def decode_group(data: bytes) -> Group:
    """The inverse of `encode_group`; sequences inside prompt columns come back as lists."""
    return decode(data, Group)


def encode_entry(entry: GroupEntry) -> bytes:
    """A group's metadata for the stream."""
    return encode(entry)


def decode_entry(data: bytes) -> GroupEntry:
    """The inverse of `encode_entry`."""
    return decode(data, GroupEntry)


def entry_of(group: Group, payload_bytes: int) -> GroupEntry:
    """The metadata of a group whose encoding has `payload_bytes` bytes."""
    return GroupEntry(
        group_id=group.group_id,
        draw=group.draw,
        prompt_id=group.prompt.prompt_id,
        source=group.prompt.source,
        level=group.prompt.level,
        oldest_version=group.oldest_version,
        prompt_tokens=len(group.prompt.token_ids),
        completion_tokens=tuple(len(trajectory.completion.token_ids) for trajectory in group.trajectories),
        rewards=group.rewards,
        payload_bytes=payload_bytes,
        finished_at=group.finished_at,
    )
