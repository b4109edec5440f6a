"""This file tests what the board keeps readable, and which file of an update a member is given."""

from __future__ import annotations

import pathlib

import msgspec
import pytest

from actors.member import Member, Pace
from rl.weights import WeightUpdate
from tests.fakes_engine import World

PACE = Pace(max_restarts=2, heartbeat_deadline_s=60, start_deadline_s=20, leave_deadline_s=20)


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def with_delta(world: World, version: int, base: WeightUpdate, node: str) -> WeightUpdate:
    update = world.update(version)
    delta = pathlib.Path(update.path).with_suffix(".delta")
    delta.write_bytes(b"delta")
    return msgspec.structs.replace(
        update, node=node, base_version=base.version, base_digest=base.digest, delta_path=str(delta), delta_bytes=5
    )


def test_both_files_of_the_newest_stay_readable_when_the_learners_remove_theirs(world):
    shown = world.board.show(update := with_delta(world, 2, world.update(1), "here"))
    for path in (update.path, update.delta_path):
        pathlib.Path(path).unlink()
    assert pathlib.Path(shown.path).read_bytes() == b"weights"
    assert pathlib.Path(shown.delta_path).read_bytes() == b"delta" and world.board.newest is shown
    again = world.board.show(world.update(2))
    assert (again.path, again.delta_path) == (shown.path, None) and not pathlib.Path(shown.delta_path).exists()
    world.board.close()
    assert not list(world.folder.glob("*pinned*"))


def test_a_file_that_cannot_be_seen_from_here_keeps_its_name(world):
    update = msgspec.structs.replace(
        world.update(1), path="/of/another/node.safetensors", delta_path="/of/another.delta"
    )
    assert world.board.show(update) == update


async def test_a_member_on_another_node_gets_the_delta_once_it_holds_the_base_and_before_that_the_whole(world):
    member = Member(1, world.launch, world.board, PACE)
    await member.begin()
    world.board.payload_of = lambda update: pathlib.Path(update.path).read_bytes()
    process = world.process(1)
    process._generator._write = lambda version, payload: world.folder / f"slipstream-test-v{version}.safetensors"
    base = msgspec.structs.replace(world.update(1), node="elsewhere")
    for update in (base, with_delta(world, 2, base, "elsewhere"), with_delta(world, 3, base, "elsewhere")):
        await member.take(update)
    assert [payload for _, payload in process.called("update")] == [b"weights", b"delta", b"weights"]
    assert member.held.path.endswith("v3.safetensors")
    await member.kill()
