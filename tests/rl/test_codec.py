"""This file tests rl/codec.py: what goes onto the wire comes back, and nothing else is taken for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.codec import SCHEMA, decode, decode_entry, decode_group, encode, encode_entry, encode_group, entry_of
from rl.trajectory import Completion, Group, GroupEntry, Message, Prompt, RewardPart, TextPart, Trajectory, VersionSpan

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text()
columns = st.dictionaries(
    st.text(), st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    logprobs_T = draw(st.lists(st.floats(max_value=0, allow_nan=False), min_size=1, max_size=9))
    length, version = len(logprobs_T), draw(st.integers(0, 9))
    turn = draw(st.integers(1, length))
    spans = [VersionSpan(version, 0, turn)] + [VersionSpan(version + 1, turn, length)] * (turn < length)
    return Completion(
        text=draw(st.text()),
        token_ids=tuple(draw(st.lists(st.integers(0, 2**31), min_size=length, max_size=length))),
        logprobs=tuple(logprobs_T),
        spans=tuple(spans),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    failed = (RewardPart(name="a", value=None, failure="timeout", message="10 s"),)
    judged = (RewardPart(name="a", value=0.1, reward_version="3f", seconds=0.25, weight=0.5),)
    prompt = Prompt(
        prompt_id=draw(st.text()),
        source="sums",
        level="easy",
        messages=(Message("user", (TextPart(draw(st.text())),)),),
        reference=draw(st.none() | st.text()),
        columns=draw(columns),
        token_ids=tuple(draw(st.lists(st.integers(0, 2**31)))),
    )
    return Group(
        group_id=draw(st.text()),
        draw=draw(st.integers(0, 2**53)),
        prompt=prompt,
        trajectories=tuple(
            Trajectory(completion=completion, reward=reward, parts=failed if reward is None else judged)
            for completion in draw(st.lists(completions(), min_size=1, max_size=4))
            for reward in [draw(st.none() | st.floats(allow_nan=False))]
        ),
        finished_at=draw(st.floats(0, 2e9)),
    )


def test_a_part_without_a_weight_has_the_bytes_that_it_had_before_parts_had_weights():
    assert b"weight" not in encode(RewardPart(name="a", value=0.1))
    assert decode(encode(RewardPart(name="a", value=0.1, weight=2.0)), RewardPart).weight == 2.0


@given(groups())
def test_a_group_and_its_entry_survive_the_wire_exactly(group: Group) -> None:
    payload = encode_group(group)
    assert decode_group(payload) == group
    entry = entry_of(group, len(payload))
    assert decode_entry(encode_entry(entry)) == entry
    assert (entry.num_tokens, entry.oldest_version) == (group.num_tokens, group.oldest_version)
    assert decode_entry(encode_entry(entry)).rewards == group.rewards
    assert entry.scored == tuple(reward is not None for reward in group.rewards)
    assert entry.payload_bytes == len(payload)


ENTRY = GroupEntry(
    group_id="run/7",
    draw=7,
    prompt_id="sums/easy/7",
    source="sums",
    level="easy",
    oldest_version=3,
    prompt_tokens=11,
    completion_tokens=(4, 5),
    rewards=(0.1, None),
    payload_bytes=99,
    finished_at=1.5,
)


@given(position=st.integers(0, 200), flip=st.integers(1, 255))
def test_any_damaged_byte_is_noticed(position: int, flip: int) -> None:
    data = bytearray(encode_entry(ENTRY))
    data[position % len(data)] ^= flip
    with pytest.raises(ValueError, match="codec|schema|checksum"):
        decode_entry(bytes(data))


def test_bytes_cut_off_anywhere_are_noticed() -> None:
    data = encode_entry(ENTRY)
    for length in range(len(data)):
        with pytest.raises(ValueError, match="codec|checksum"):
            decode_entry(data[:length])


def test_another_type_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="do not hold a Group"):
        decode_group(encode_entry(ENTRY))


def test_facts_that_disagree_are_refused_when_read() -> None:
    broken = {"text": "", "token_ids": [1], "logprobs": [], "spans": [], "finish_reason": "stop"}
    with pytest.raises(ValueError, match="1 tokens but 0 log-prob"):
        decode(encode(broken), Completion)


@pytest.mark.parametrize("column", [object(), 2**64, "\ud800"])
def test_a_column_that_msgpack_cannot_carry_is_refused(column: object) -> None:
    with pytest.raises(ValueError, match="cannot be written as msgpack"):
        encode({"columns": {"x": column}})


STORED_UNDER_SCHEMA_1 = bytes.fromhex(
    "736c697001bf6a7e2285a867726f75705f6964a572756e2f37a46472617707a670726f6d707487a970726f6d70745f6964a170a6"
    "736f75726365a173a56c6576656ca16ca86d657373616765739182a4726f6c65a475736572a570617274739182a474797065a474"
    "657874a474657874a3312b31a97265666572656e6365a132a7636f6c756d6e7381a16b9101a9746f6b656e5f6964739105ac7472"
    "616a6563746f726965739183aa636f6d706c6574696f6e85a474657874a132a9746f6b656e5f6964739106a86c6f6770726f6273"
    "91cbbfe0000000000000a57370616e739183a776657273696f6e03a5737461727400a3656e6401ad66696e6973685f726561736f"
    "6ea473746f70a6726577617264cb3ff0000000000000a570617274739186a46e616d65a161a576616c7565cb3ff0000000000000"
    "a76661696c757265c0a76d657373616765a0ae7265776172645f76657273696f6ea0a77365636f6e6473cb0000000000000000ab"
    "66696e69736865645f6174cb3ff8000000000000"
)


def test_bytes_written_under_schema_1_can_still_be_read() -> None:
    """If this fails, a change to rl/trajectory.py broke the stored format: raise SCHEMA and renew the bytes."""
    assert SCHEMA == 1
    group = decode_group(STORED_UNDER_SCHEMA_1)
    assert (group.group_id, group.prompt.messages[0].text, group.prompt.columns) == ("run/7", "1+1", {"k": [1]})
    (trajectory,) = group.trajectories
    assert (trajectory.reward, trajectory.completion.logprobs, trajectory.parts[0].name) == (1.0, (-0.5,), "a")
    assert trajectory.completion.spans == (VersionSpan(3, 0, 1),)
