"""One generator's life from start to quarantine, over processes that die and hang when the test says so."""

from __future__ import annotations

import asyncio

import pytest

from actors.board import Board
from actors.member import Member, MemberDied, Pace
from actors.workload import Workload
from rl.orders import Draw
from rl.waits import Silent, answered
from rl.weights import WeightUpdateError
from tests.fakes import make_prompt
from tests.fakes_engine import World, until

PACE = Pace(max_restarts=2, heartbeat_deadline_s=60, start_deadline_s=20, leave_deadline_s=20)


def draw(number: int = 0) -> Draw:
    return Draw(group_id=f"run/{number}", draw=number, prompt=make_prompt(index=number), seed=number)


@pytest.fixture
async def world(tmp_path):
    return World(tmp_path)


class Lives:
    """Members with their tasks, which the test need not end itself."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tasks: list[asyncio.Task] = []

    async def begin(self, pace: Pace = PACE) -> Member:
        """A member that works already."""
        member = Member(1, self._world.launch, self._world.board, pace)
        await member.begin()
        self.own(member)
        return member

    def own(self, member: Member) -> asyncio.Task:
        self._tasks.append(asyncio.create_task(member.live()))
        return self._tasks[-1]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def lives(world):
    lives = Lives(world)
    yield lives
    await lives.end()


def deaths(world: World) -> list[str]:
    return [event["reason"] for event in world.told("generator_died")]


async def test_a_generator_works_as_soon_as_it_has_begun(lives):
    member = await lives.begin()
    assert member.state == "working" and (await member.sample("rollout", [draw()])).group_id == "run/0"


async def test_the_death_of_the_engine_fails_what_is_in_hand_and_brings_a_new_process(world, lives):
    member = await lives.begin()
    world.process(1).engine.hold.clear()
    pending = asyncio.create_task(member.sample("rollout", [draw()]))
    await until(lambda: world.process(1).engine.requests)
    world.process(1).engine.die()
    with pytest.raises(MemberDied, match="generator 1: engine fake died"):
        await pending
    assert member.state == "dead"
    await until(lambda: member.state == "working")
    assert world.processes[0].killed and world.process(1).attempt == 1
    assert member.restarts == 1 and [event["in_hand"] for event in world.told("generator_died")] == [1]
    assert world.told("generator_restarted") and world.told("generator_joined")[0]["down_s"] >= 0


async def test_the_death_of_an_actor_that_nobody_has_asked_anything_is_heard(world, lives):
    member = await lives.begin()
    await until(lambda: world.process(1).called("watch"))
    world.process(1).vanish()
    await until(lambda: world.process(1).attempt == 1 and member.state == "working")
    assert deaths(world) == ["generator 1: the actor died"]


async def test_a_late_word_of_an_earlier_process_does_no_harm_to_the_next(world, lives):
    member = await lives.begin()
    first = world.process(1)
    first.engine.hold.clear()
    late = asyncio.create_task(member.call("rollout", draw()))
    await until(lambda: first.engine.requests)
    first.vanish()
    await until(lambda: world.process(1).attempt == 1 and member.state == "working")
    with pytest.raises(MemberDied):
        await late
    assert len(deaths(world)) == 1 and member.state == "working"


async def test_an_engine_that_hangs_is_killed_and_what_it_had_in_hand_is_given_back(world, lives):
    member = await lives.begin(Pace(max_restarts=2, heartbeat_deadline_s=0.3, start_deadline_s=20, leave_deadline_s=20))
    world.process(1).engine.hang()
    with pytest.raises(MemberDied, match="engine fake hangs: no answer for 0.27 s"):
        await member.sample("rollout", [draw()])
    await until(lambda: member.state == "working")
    assert world.processes[0].killed


async def test_an_actor_that_hangs_itself_is_noticed_too(world, lives, monkeypatch):
    async def silence(seconds):
        await asyncio.Event().wait()

    world.prepare = lambda process: setattr(process._generator, "beat", silence) if process.attempt == 0 else None
    await lives.begin(Pace(max_restarts=2, heartbeat_deadline_s=0.2, start_deadline_s=20, leave_deadline_s=20))
    await until(lambda: deaths(world))
    assert "it hangs: no answer for 0.2 s to a heartbeat" in deaths(world)[0]


async def test_an_engine_that_is_busy_for_longer_than_the_deadline_but_answers_is_not_taken_for_hung(world, lives):
    member = await lives.begin(Pace(max_restarts=0, heartbeat_deadline_s=0.2, start_deadline_s=20, leave_deadline_s=20))
    process = world.process(1)
    process.engine.loading.clear()
    loading = asyncio.create_task(member.take(world.update(1)))
    await until(lambda: len(process.called("beat")) > 12)  # ten fit into a deadline
    process.engine.loading.set()
    assert (await loading).version == 1 and not deaths(world)


async def test_who_joins_holds_the_newest_version_though_two_came_meanwhile(world, lives):
    member = await lives.begin()
    world.prepare = lambda process: process.engine.loading.clear()
    world.board.show(world.update(1))
    world.process(1).vanish()
    await until(lambda: world.process(1).engine.updates)
    for version in (2, 3):
        world.board.show(world.update(version))
    assert member.state == "joining"
    world.process(1).engine.loading.set()
    await until(lambda: member.state == "working")
    assert [update.version for update in world.process(1).engine.updates] == [1, 3]
    assert member.held is world.board.newest and member.status().version == 3


async def test_a_death_while_joining_is_a_death_like_any_other(world, lives):
    member = await lives.begin()
    world.board.show(world.update(1))
    world.prepare = lambda process: process.engine.loading.clear() if process.attempt == 1 else None
    world.process(1).vanish()
    await until(lambda: world.process(1).engine.updates)
    world.process(1).engine.die()
    await until(lambda: world.process(1).attempt == 2 and member.state == "working")
    assert world.process(1).engine.version == 1


async def test_a_join_that_is_never_verified_ends_in_quarantine_with_the_reason(world, lives):
    member = await lives.begin()
    world.board.show(world.update(1))

    def refuse(update, receipt):
        raise WeightUpdateError("the canary is 9 nats off")

    world.verify = refuse
    world.process(1).vanish()
    await until(lambda: member.state == "quarantined")
    assert "it did not join with version 1: the canary is 9 nats off" in member.detail
    assert len(world.processes) == 3 and all(process.killed for process in world.processes)
    assert [event["restarts"] for event in world.told("generator_quarantined")] == [2]


async def test_a_verification_that_fails_because_the_update_was_overtaken_is_no_death(world, lives):
    member = await lives.begin()
    world.board.show(world.update(1))

    def refuse_the_old(update, receipt):
        if update.version == 1:
            world.board.show(world.update(2))
            raise WeightUpdateError("other bytes than were sent")
        return 0.0

    world.verify = refuse_the_old
    world.process(1).vanish()
    await until(lambda: world.process(1).attempt == 1 and member.state == "working")
    assert member.status().version == 2 and member.restarts == 1


async def test_a_file_that_the_learners_removed_is_no_reason_to_die_but_to_wait_for_the_next(world, lives):
    member = await lives.begin()
    gone = world.update(1)
    world.board.newest = gone  # as where it lies on another node: nothing was pinned here
    (world.folder / "slipstream-test-v1.safetensors").unlink()
    world.process(1).vanish()
    await until(lambda: world.process(1).called("update"))
    world.board.show(world.update(2))
    await until(lambda: member.state == "working")
    assert member.status().version == 2 and member.restarts == 1


async def test_a_group_that_was_finished_makes_up_for_earlier_deaths(world, lives):
    member = await lives.begin()
    for attempt in range(1, 6):
        world.process(1).vanish()
        await until(lambda: world.process(1).attempt == attempt and member.state == "working")  # noqa: B023
        await member.sample("rollout", [draw()])
    assert member.restarts == 5


async def test_deaths_in_a_row_without_a_group_end_in_quarantine(world, lives):
    member = await lives.begin()
    for attempt in range(1, 3):
        world.process(1).vanish()
        await until(lambda: world.process(1).attempt == attempt and member.state == "working")  # noqa: B023
    world.process(1).vanish()
    await until(lambda: member.state == "quarantined")
    assert member.status().detail == "the actor died" and not member.is_active
    assert world.told("generator_quarantined")[0]["reason"] == "generator 1: the actor died"


async def test_a_newcomer_that_does_not_start_is_quarantined_at_once(world, lives):
    world.prepare = lambda process: setattr(process, "refusal", MemoryError("no room for another engine"))
    member = Member(1, world.launch, world.board, PACE)
    await lives.own(member)
    assert member.state == "quarantined" and "MemoryError: no room for another engine" in member.detail
    assert len(world.processes) == 1 and world.processes[0].killed


async def test_a_start_that_takes_longer_than_its_deadline_is_given_up(world, lives):
    world.prepare = lambda process: process.may_start.clear()
    pace = Pace(max_restarts=2, heartbeat_deadline_s=60, start_deadline_s=0.05, leave_deadline_s=20)
    member = Member(1, world.launch, world.board, pace)
    await lives.own(member)
    assert "waited 0 s for generator 1 to start from Ray" in member.detail


async def test_the_next_process_is_not_started_before_the_last_one_is_gone(world, lives):
    member = await lives.begin()
    gone = asyncio.Event()

    async def kill(deadline_s):
        await gone.wait()

    world.process(1).kill = kill
    world.process(1).vanish()
    await until(lambda: member.state == "dead")
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(world.processes) == 1
    gone.set()
    await until(lambda: member.state == "working")


async def test_processes_that_cannot_be_ended_are_told_of_and_do_not_stop_the_run(world, lives):
    member = await lives.begin()

    async def kill(deadline_s):
        raise TimeoutError("processes [7] still run")

    world.process(1).kill = kill
    world.process(1).vanish()
    await until(lambda: world.process(1).attempt == 1 and member.state == "working")
    assert world.told("generator_not_gone")[0]["reason"] == "generator 1: processes [7] still run"


async def test_who_leaves_finishes_first_and_is_closed_politely(world, lives):
    member = Member(1, world.launch, world.board, PACE)
    await member.begin()
    life = lives.own(member)
    world.process(1).engine.hold.clear()
    pending = asyncio.create_task(member.sample("rollout", [draw()]))
    await until(lambda: world.process(1).engine.requests)
    member.leave()
    assert member.state == "leaving"
    world.process(1).engine.hold.set()
    assert (await pending).group_id == "run/0"
    await life
    assert member.state == "left" and world.process(1).closed and world.process(1).killed and not deaths(world)
    assert world.told("generator_left")[0]["reason"] == "generator 1: it was asked to"


async def test_who_leaves_and_does_not_finish_in_time_gives_back_what_it_has(world, lives):
    member = Member(1, world.launch, world.board, Pace(**{**asdict(PACE), "leave_deadline_s": 0.05}))
    await member.begin()
    life = lives.own(member)
    world.process(1).engine.hold.clear()
    pending = asyncio.create_task(member.sample("rollout", [draw()]))
    await until(lambda: world.process(1).engine.requests)
    member.leave()
    with pytest.raises(MemberDied, match="left before it had finished"):
        await pending
    await life
    assert member.state == "left" and world.process(1).killed and "left 1 undone" in member.detail


def asdict(pace: Pace) -> dict:
    return {name: getattr(pace, name) for name in pace.__struct_fields__}


async def test_who_is_still_starting_can_leave_too(world, lives):
    world.prepare = lambda process: process.may_start.clear()
    member = Member(1, world.launch, world.board, PACE)
    life = lives.own(member)
    await until(lambda: world.processes)
    member.leave()
    await life
    assert member.state == "left" and world.process(1).killed


async def test_a_status_tells_processes_requests_and_ages(world, lives):
    clock = [100.0]
    member = Member(1, world.launch, world.board, PACE, clock=lambda: clock[0])
    world.prepare = lambda process: setattr(process.engine, "pids", (71, 72))
    await member.begin()
    lives.own(member)
    world.process(1).engine.hold.clear()
    pending = asyncio.create_task(member.sample("rollout_round", [draw(0), draw(1)]))
    await until(lambda: member.status().pids)
    clock[0] += 5
    status = member.status()
    assert (status.name, status.state, status.node, status.in_hand) == ("generator 1", "working", "here", 2)
    assert status.pids[1:] == (71, 72) and status.heartbeat_age_s == status.oldest_request_s == 5.0
    world.process(1).engine.hold.set()
    await pending


async def test_the_newest_file_outlives_the_learner_that_removes_its_own_name(world, tmp_path):
    board: Board = world.board
    shown = board.show(world.update(1))
    (tmp_path / "slipstream-test-v1.safetensors").unlink()
    with open(str(shown.path), "rb") as file:  # noqa: ASYNC230
        assert file.read() == b"weights"
    board.show(world.update(2))
    board.close()
    assert [path.name for path in tmp_path.iterdir()] == ["slipstream-test-v2.safetensors"]


async def test_patience_counts_only_the_time_in_which_the_asker_was_awake():
    with pytest.raises(Silent, match=r"no answer for 0\.05 s"):
        await answered(asyncio.Event().wait(), 0.05)
    assert await answered(asyncio.sleep(0, "here"), 0.05) == "here"


def test_idle_time_is_working_time_with_nothing_in_hand():
    clock = [0.0]
    workload = Workload(lambda: clock[0])
    clock[0] = 10.0  # down: not counted
    workload.set_working(True)
    clock[0] = 14.0
    with workload.holding(2), workload.holding(1):
        assert workload.in_hand == 3
        clock[0] = 20.0
        assert workload.oldest_s == 6.0
    assert workload.take_times() == (4.0, 10.0) and workload.take_times() == (0.0, 0.0)
