"""This file tests rewards/wire.py: what is sent is what arrives, and what cannot be sent says so."""

from __future__ import annotations

import threading

import msgspec
import pytest

from rewards.wire import (
    HEADER,
    Finished,
    Job,
    Load,
    Loaded,
    Started,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)


@pytest.mark.parametrize(
    "frame",
    [
        Load(("format", ""), "format", {"tags": ["think"]}, b"source\xff"),
        Job(("format", "v"), "prompt", "completion \U0001f600", None, {"entry": {"metadata": [1, None, b"\x00"]}}),
    ],
)
def test_requests_survive_the_wire(frame):
    data = encode_request(frame)
    assert HEADER.unpack(data[: HEADER.size]) == (len(data) - HEADER.size,)
    assert decode_request(data[HEADER.size :]) == frame


@pytest.mark.parametrize(
    "frame",
    [Loaded("v", "error"), Started(), Finished(1.5, None, "", 0.1, {"a": 1.0}, {"b": ["c"]}), Finished(None, "none")],
)
def test_replies_survive_the_wire(frame):
    assert decode_reply(encode_reply(frame)[HEADER.size :]) == frame


def test_an_object_in_extra_arrives_as_its_repr_but_an_object_in_columns_is_refused():
    lock = threading.Lock()
    reply = decode_reply(encode_reply(Finished(1.0, extra={"lock": lock}))[HEADER.size :])
    assert isinstance(reply, Finished) and reply.extra == {"lock": repr(lock)}
    with pytest.raises(TypeError):
        encode_request(Job(("a", ""), "", "", None, {"lock": lock}))


def test_foreign_bytes_are_refused():
    with pytest.raises(msgspec.DecodeError):
        decode_reply(b"print of a reward")
