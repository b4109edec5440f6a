"""This file defines what the scorer and a reward child process say to each other: length-prefixed msgpack frames.

Parent to child: Load, Job. Child to parent: Loaded for each Load; Started, then Finished, for each Job. Started is sent
as the very last thing before the reward runs, so that its clock counts execution only. Nothing is pickled.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from rewards.base import FailureKind

HEADER = struct.Struct(">I")
MAX_REPLY_BYTES = 1 << 20


class Load(msgspec.Struct, frozen=True, tag=True):
    """Import a reward. source is a file-based reward's content, so that child and parent mean the same version."""

    key: tuple[str, str]
    use: str
    params: dict[str, Any]
    source: bytes | None


class Job(msgspec.Struct, frozen=True, tag=True):
    """Judge one completion with the reward loaded under key: its name and, if file-based, its content's version."""

    key: tuple[str, str]
    prompt: str
    completion: str
    reference: str | None
    columns: dict[str, Any]


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """A Load was carried out. error is empty, or says why the reward does not import."""

    version: str = ""
    error: str = ""


class Started(msgspec.Struct, frozen=True, tag=True):
    """The reward is about to run."""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """What the reward said: a value, or the kind and message of its failure. seconds is execution time."""

    value: float | None
    failure: FailureKind | None = None
    message: str = ""
    seconds: float = 0.0
    parts: dict[str, float] = {}
    extra: dict[str, Any] = {}


Request = Load | Job
Reply = Loaded | Started | Finished


def encode_request(frame: Request) -> bytes:
    """A frame with its length in front; TypeError where columns or params hold what msgpack does not know."""
    return _with_length(msgspec.msgpack.encode(frame))


def encode_reply(frame: Reply) -> bytes:
    """A frame with its length in front. What msgpack does not know, such as an object in extra, becomes its repr."""
    return _with_length(msgspec.msgpack.encode(frame, enc_hook=repr))


def _with_length(body: bytes) -> bytes:
    return HEADER.pack(len(body)) + body


def decode_request(body: bytes) -> Request:
    """The frame that the parent sent."""
    return msgspec.msgpack.decode(body, type=Request)


def decode_reply(body: bytes) -> Reply:
    """The frame that the child sent; msgspec.DecodeError for anything else."""
    return msgspec.msgpack.decode(body, type=Reply)
