"""This file tests learners/fleet.py with real ranks in Ray actors, two of them, which are killed and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pathlib
import signal
import socket
from collections.abc import Awaitable

import msgspec
import psutil
import pytest

from learners import checkpoint
from learners.fleet import FleetSettings, LearnerFleet, LearnerProcess, read_payload
from rl.checkpoints import Manifest, complete, folder_of, newest_checkpoint
from rl.part_killer import part_pids
from rl.parts import LearnersLost
from tests.learners.tiny import order_of, random_group, save_tiny_llama, settings_for

GROUPS = {f"g{index}": random_group(index) for index in range(4)}
ORDER = order_of(list(GROUPS.values()))
SOON_S = 20.0


class ScriptedProcess(LearnerProcess):
    """A rank that fetches from GROUPS, and stands still where a pipe of the test's tells it to.

    Opening a named pipe blocks until the other side has opened it too, so the test knows where the rank is; reading it
    blocks until the other side closes it.
    """

    def _fetch(self, settings):
        folder = pathlib.Path(settings.log_folder)
        export = checkpoint.export_model

        def fetch(group_ids):
            stand_still(folder / f"fetching_{os.getpid()}")
            return [GROUPS[group_id] for group_id in group_ids]

        def export_model(directory, model_dir, tensors):
            stand_still(folder / "exporting")
            export(directory, model_dir, tensors)

        checkpoint.export_model = export_model
        return fetch


def stand_still(pipe: pathlib.Path) -> None:
    if pipe.exists():
        pipe.read_bytes()


@pytest.fixture(scope="module")
def cluster():
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


class Started:
    """A fleet under test, what it reported, and its processes."""

    def __init__(self, settings: FleetSettings) -> None:
        self.settings = settings
        self.folder = pathlib.Path(settings.log_folder)
        self.events: list[tuple[str, dict]] = []
        self.fleet: LearnerFleet

    async def start(self) -> Started:
        self.fleet = await LearnerFleet.start(self.settings, 2, self._record, ScriptedProcess)
        return self

    def _record(self, kind, **facts):
        self.events.append((kind, facts))

    @property
    def pids(self) -> list[int]:
        return [pid for status in self.fleet.describe() for pid in status.pids]

    async def save(self, step: int) -> pathlib.Path:
        folder = folder_of(self.folder, step)
        await self.fleet.begin_save(str(folder), export=True)
        await self.fleet.finish_save()
        complete(folder, Manifest(self.settings.learner.run_id, step, step))
        return folder

    @contextlib.asynccontextmanager
    async def standing_at(self, name: str, call: Awaitable):
        """Inside, a rank has come as far as that pipe, and stands there."""
        pipe = self.folder / name
        os.mkfifo(pipe)
        pending = asyncio.ensure_future(call)
        descriptor = await asyncio.wait_for(asyncio.to_thread(os.open, pipe, os.O_WRONLY), SOON_S)
        pipe.unlink()
        try:
            yield pending
        finally:
            os.close(descriptor)


@pytest.fixture(scope="module")
async def started(cluster, tmp_path_factory):
    """Two ranks of the tiny model; every test leaves them able to step."""
    folder = tmp_path_factory.mktemp("fleet")
    learner = settings_for(save_tiny_llama(folder / "model"), folder / "ranks", max_logprob_gap=0.01)
    settings = FleetSettings(
        learner=msgspec.structs.replace(learner, deadline_s=120.0),
        redis_url="redis://nobody",
        log_folder=str(folder),
        num_cpus=1,
        num_gpus=0,
        heartbeat_deadline_s=60.0,
    )
    made = await Started(settings).start()
    yield made
    pids = made.pids
    await made.fleet.close()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


async def test_the_ranks_are_described_and_carry_the_marks_of_their_run_and_part(started):
    update = await started.fleet.publish(0)
    statuses = started.fleet.describe()
    assert [status.name for status in statuses] == ["learner rank 0", "learner rank 1"]
    assert {(status.state, status.node, status.version) for status in statuses} == {("working", update.node, 0)}
    for number, pid in enumerate(started.pids):
        assert part_pids(started.settings.learner.run_id, f"learner-{number}-0") == [pid]


async def test_errors_that_are_no_death_pass_unchanged_and_training_can_go_on(started):
    folder = await started.save(1)
    with pytest.raises(ValueError, match=r"learner.max_logprob_gap"):
        await started.fleet.step(order_of(list(GROUPS.values()), first=True))
    await started.fleet.begin_save(str(folder / "complete.json"), export=False)  # a file, where a folder is needed
    with pytest.raises(OSError, match=r"Not a directory.*complete\.json"):
        await started.fleet.finish_save()
    assert (await started.fleet.step(ORDER)).version == 2
    await started.save(2)


async def test_a_rank_answers_beside_a_step_and_a_save_beside_both(started):
    async with started.standing_at("exporting", started.save(3)) as saving:
        report = await started.fleet.step(ORDER)
        async with started.standing_at(f"fetching_{started.pids[1]}", started.fleet.step(ORDER)) as stepping:
            assert all(status.in_hand for status in started.fleet.describe())
            assert not saving.done() and not stepping.done() and report.version == 2
        await stepping
    await saving


async def test_a_kill_during_a_step_and_a_save_is_told_at_once_and_the_ranks_that_replace_them_go_on_bit_for_bit(
    started,
):
    fleet, folder = started.fleet, await started.save(4)
    await fleet.step(ORDER)
    undisturbed = await fleet.publish(5)
    await fleet.load(str(folder))
    old = started.pids
    async with (
        started.standing_at("exporting", started.save(5)) as saving,
        started.standing_at(f"fetching_{old[1]}", fleet.step(ORDER)) as stepping,
    ):
        os.kill(old[1], signal.SIGKILL)
        for pending in (saving, stepping):  # rank 0 stands in a pipe and in a collective of 120 s
            with pytest.raises(LearnersLost, match=rf"learner rank 1 \(pid {old[1]} on .* died .*learner_1.log"):
                await asyncio.wait_for(pending, SOON_S)
    with pytest.raises(LearnersLost):
        await fleet.publish(5)
    assert newest_checkpoint(started.folder)[0] == folder
    assert await fleet.payload(undisturbed) == read_payload(undisturbed.path)
    await fleet.restart()
    assert not [pid for pid in old if psutil.pid_exists(pid)]
    assert [status.restarts for status in fleet.describe()] == [1, 1]
    assert [kind for kind, _ in started.events] == ["learner_rank_lost", "learners_restarted"]
    await fleet.load(str(folder))
    await fleet.publish(4)
    assert read_payload(undisturbed.path)  # generators may still need what the old rank 0 wrote last
    await fleet.step(ORDER)
    again = await fleet.publish(5)
    assert again.digest == undisturbed.digest and again.canary_logprobs == undisturbed.canary_logprobs


async def test_a_stopped_rank_is_told_by_its_silence_and_replaced(started):
    fleet, old = started.fleet, started.pids
    started.events.clear()
    os.kill(old[0], signal.SIGSTOP)
    stepping = asyncio.ensure_future(fleet.step(ORDER))
    fleet._watch._deadline_s = 0.5  # to start up, ranks need more than a test would wait
    with pytest.raises(LearnersLost, match="learner rank 0 .* gave no sign of life for"):
        await asyncio.wait_for(stepping, SOON_S)
    await fleet.restart()
    assert old[0] in started.events[-1][1]["killed"] and not psutil.pid_exists(old[0])
    await fleet.load(str(newest_checkpoint(started.folder)[0]))
    await fleet.step(ORDER)


def test_a_rank_names_a_port_that_can_be_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("os.dup2", lambda *_: None)  # the process under test is this one: its output stays where it is
    address, port = LearnerProcess(str(tmp_path / "log")).free_port()
    with socket.socket() as probe:
        probe.bind((address, port))
