"""What fleets and signals reach of a run, before and after there is one."""

from __future__ import annotations

import asyncio
import io
import os
import signal

import pytest
from rich.console import Console

from rl.config_loading import load_config
from rl.recorder import Recorder, RunDirectory
from rl.wiring import Stopper, Wiring
from tests.fakes import make_run


@pytest.fixture
async def wiring(tmp_path):
    directory = RunDirectory(tmp_path / "r")
    directory.create()
    yield Wiring(load_config("smoke", []), Recorder(directory), Console(file=io.StringIO(), width=200))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        asyncio.get_running_loop().remove_signal_handler(number)


async def signalled(number: int) -> None:
    """Send this process a signal, and give the loop the turns that its handler needs."""
    os.kill(os.getpid(), number)
    for _ in range(3):
        await asyncio.sleep(0)


async def test_the_first_signal_asks_the_run_to_stop_and_the_second_ends_the_task(wiring, tmp_path):
    async def driver() -> None:
        Stopper(Console(file=io.StringIO()), wiring)
        wiring.run = make_run(tmp_path / "r", buffer=None)
        ready.set()
        await asyncio.Event().wait()

    ready = asyncio.Event()
    task = asyncio.create_task(driver())
    await ready.wait()
    await signalled(signal.SIGTERM)
    assert wiring.run.stop_requested.is_set() and not task.done()
    await signalled(signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_sigusr1_before_there_is_a_run_does_nothing(wiring):
    Stopper(Console(file=io.StringIO()), wiring)
    await signalled(signal.SIGUSR1)
    assert not (wiring.directory.path / "stall_report.txt").exists()


async def test_a_stall_report_is_written_into_the_run_directory_and_told(wiring, tmp_path):
    wiring.run = make_run(tmp_path / "r", buffer=None)
    await wiring.report_stall("somebody asked")
    assert "somebody asked" in (wiring.directory.path / "stall_report.txt").read_text()
    assert '"event": "stall_report"' in (wiring.directory.path / "events.jsonl").read_text()


def test_what_a_fleet_tells_is_an_event_and_a_line_for_the_person_who_watches(wiring):
    wiring.told("generator_died", generator=0, reason="its engine [0] ended")
    assert '"reason": "its engine [0] ended"' in (wiring.directory.path / "events.jsonl").read_text()
    assert "its engine [0] ended" in wiring.progress._console.file.getvalue()
