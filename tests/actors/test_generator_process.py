"""A fleet over real Ray actors and real processes, which are killed and stopped; only the model is missing."""

from __future__ import annotations

import asyncio
import functools
import os
import pathlib
import signal

import msgspec
import pytest
import ray

from actors.board import Board, FleetHooks
from actors.engine import EngineSettings
from actors.fleet import FleetSettings, GeneratorFleet
from actors.generator_process import RayProcess
from actors.member import MemberDied, Pace
from rl.buffer import BufferLimits
from rl.orders import Draw
from rl.part_killer import part_pids, part_segments
from rl.weights import verify
from tests.fakes import make_prompt
from tests.fakes_engine import FakeGeneratorProcess, World, generator_settings

RUN_ID = f"test-generator-process-{os.getpid()}"


@pytest.fixture(scope="module")
def local_ray():
    root = str(pathlib.Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root  # the actors import tests.fakes_engine
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """For logs and for what stands for shared memory."""
    return tmp_path_factory.mktemp("generators")


@pytest.fixture(scope="module")
def settings(folder) -> FleetSettings:
    return FleetSettings(
        engine=EngineSettings(
            name="", model_dir="", device="cpu", weight_backend="shared_memory", max_context_tokens=64
        ),
        generator=generator_settings(str(folder), RUN_ID),
        rewards={},
        reward_workers=0,
        redis_url="",
        limits=BufferLimits(1, 1),
        log_folder=str(folder),
        num_cpus=0,
        num_gpus=0,
        max_restarts=3,
        heartbeat_deadline_s=2.0,
        start_deadline_s=60.0,
    )


@pytest.fixture(scope="module")
async def world(folder):
    return World(folder)


@pytest.fixture(scope="module")
async def fleet(local_ray, settings, world):
    """One generator, that all tests share: each leaves it working."""
    pace = Pace(max_restarts=3, heartbeat_deadline_s=2.0, start_deadline_s=60.0, leave_deadline_s=10.0)
    hooks = FleetHooks(verify=lambda *both: verify(*both, None, 0.1), on_event=world._on_event)
    launch = functools.partial(RayProcess, settings, actor=FakeGeneratorProcess)
    fleet = GeneratorFleet(launch, pace, Board(hooks, RUN_ID), max_tokens=8)
    await fleet.begin(1)
    yield fleet
    await fleet.close()
    assert not [pid for attempt in range(5) for pid in part_pids(RUN_ID, f"generator-0-{attempt}")]


def draw(number: int) -> Draw:
    return Draw(group_id=f"run/{number}", draw=number, prompt=make_prompt(index=number), seed=number)


async def poll(condition, seconds: float = 30.0):
    """What the condition gives, once it gives anything; what happens in other processes rings no bell here."""
    async with asyncio.timeout(seconds):
        while not (found := condition()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return found


@pytest.mark.parametrize("victim", ["actor", "engine core"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_whatever_becomes_of_a_process_the_next_one_has_the_newest_weights_and_answers(
    fleet, world, folder, victim, number
):
    (before,), version = fleet.describe(), fleet.describe()[0].version + 1
    part = f"generator-0-{before.restarts}"
    update = msgspec.structs.replace(world.update(version), node=before.node)
    assert [receipt.version for receipt in await fleet.update(update)] == [version]
    left = folder / f"slipstream-{RUN_ID}-generator-0-version-{version}.safetensors"
    left.write_bytes(b"half an update")
    actor, core = await poll(lambda: fleet.describe()[0].pids)
    assert {actor, core} <= set(part_pids(RUN_ID, part))
    (segment,) = part_segments(RUN_ID, part)
    assert os.path.exists(segment)  # noqa: ASYNC240
    os.kill(actor if victim == "actor" else core, number)
    await poll(lambda: (fleet.describe()[0].restarts, fleet.describe()[0].state) == (before.restarts + 1, "working"))
    assert not part_pids(RUN_ID, part) and not left.exists() and not os.path.exists(segment)  # noqa: ASYNC240
    assert fleet.describe()[0].version == version
    assert (await fleet.rollout(draw(version))).group_id == f"run/{version}"
    death = world.told("generator_died")[-1]
    assert ("hang" in death["reason"]) == (number == signal.SIGSTOP)
    assert (
        "\n" not in death["reason"]
        and death["seconds"] > 0
        and world.told("generator_joined")[-1]["version"] == version
    )


async def test_an_error_of_the_generator_passes_through_ray_unchanged(fleet, world):
    gone = msgspec.structs.replace(world.update(99), path="/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="version 99 is no longer at /nowhere/at/all"):
        await fleet._members[0].call("update", gone)
    assert fleet.describe()[0].state == "working"


async def test_a_long_tail_is_cut_off_through_ray_and_its_rollout_tells_of_it(fleet):
    endless = msgspec.structs.replace(draw(0), group_id="run/endless")
    rollout = asyncio.create_task(fleet.rollout(endless))
    while not rollout.done():  # what is cut before the actor has begun it is cut the next time
        await fleet.cut_tails(100)
        await asyncio.sleep(0.01)
    report = await rollout
    assert (report.dropped, report.num_tokens) == ("stale", 3) and fleet.describe()[0].in_hand == 0


class SlowToStart(FakeGeneratorProcess):
    """An actor whose engine never comes up."""

    async def build(self, settings, index):
        await asyncio.Event().wait()


async def test_an_actor_that_is_killed_while_it_starts_is_told_and_leaves_nothing(local_ray, settings):
    process = RayProcess(settings, 5, 0, SlowToStart)
    starting = asyncio.create_task(process.start())
    await poll(lambda: part_pids(RUN_ID, "generator-5-0"))
    await process.kill(10)
    with pytest.raises(MemberDied):
        await starting
    assert not part_pids(RUN_ID, "generator-5-0")
