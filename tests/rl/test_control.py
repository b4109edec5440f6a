"""Requests to a driver through its run directory: answered once, refused with a reason, never the driver's end."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from rl import control
from rl.control import (
    AlreadyRunning,
    Answer,
    Desk,
    Driver,
    NoAnswer,
    NotRunning,
    announce,
    ask,
    living_driver,
)
from rl.recorder import RunDirectory
from rl.run_outcome import Outcome, write_outcome

DRIVER = """
import pathlib, subprocess, sys, time
from rl.control import announce
with announce(pathlib.Path(sys.argv[1])) as desk:
    if sys.argv[2:]:
        subprocess.Popen(["sh", "-c", "echo $$ > %s/guard; exec sleep 600" % sys.argv[1]], pass_fds=(desk.lock,))
        while not pathlib.Path(sys.argv[1], "guard").exists() or not pathlib.Path(sys.argv[1], "guard").read_text():
            time.sleep(0.01)
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def driver(tmp_path):
    """Starts a driver in a process of its own; all are gone after the test."""
    children = []

    def begin(*options: str) -> subprocess.Popen:
        command = [sys.executable, "-c", DRIVER, str(tmp_path), *options]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout.readline() == "up\n"
        return child

    yield begin
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.fixture
def heard():
    """What the driver was told of each request."""
    return []


@pytest.fixture
async def served(tmp_path, heard):
    """A driver whose handlers are these."""

    async def scale(request):
        if request["generators"] > 8:
            raise ValueError("8 at most")
        return f"{request['generators']} generators soon"

    async def breaks(request):
        raise RuntimeError("a defect")

    handlers = {"scale": scale, "break": breaks}
    with announce(tmp_path) as desk:
        task = asyncio.create_task(desk.serve(handlers, lambda kind, answer: heard.append((kind, answer)), 0.01))
        yield tmp_path
        assert not task.done()
        task.cancel()


async def put(directory: pathlib.Path, request: dict, seconds: float = 20.0) -> Answer:
    return await asyncio.to_thread(ask, directory, request, seconds)


def requests_in(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (directory / "requests").iterdir())


async def test_a_request_is_answered_and_leaves_no_file(served, heard):
    answer = await put(served, {"kind": "scale", "generators": 3})
    assert answer == Answer(True, "3 generators soon")
    assert heard == [("scale", answer)] and requests_in(served) == []


async def test_a_refusal_has_its_reason(served):
    assert await put(served, {"kind": "scale", "generators": 9}) == Answer(False, "8 at most")


async def test_a_handler_that_fails_is_the_askers_answer_and_not_the_runs_end(served):
    assert await put(served, {"kind": "break"}) == Answer(False, "it failed: RuntimeError: a defect")
    assert (await put(served, {"kind": "scale", "generators": 1})).accepted


async def test_an_unknown_kind_is_refused_with_those_that_are_known(served):
    answer = await put(served, {"kind": "explode"})
    assert not answer.accepted and "'explode'" in answer.text and "break, scale" in answer.text


async def test_requests_at_once_each_get_their_own_answer(served):
    answers = await asyncio.gather(*(put(served, {"kind": "scale", "generators": count}) for count in range(1, 7)))
    assert [answer.text for answer in answers] == [f"{count} generators soon" for count in range(1, 7)]


async def test_a_handler_that_hangs_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "HANDLER_DEADLINE_S", 0.05)
    with announce(tmp_path) as desk:
        hangs = {"scale": lambda request: asyncio.Event().wait()}
        task = asyncio.create_task(desk.serve(hangs, lambda kind, answer: None, 0.01))
        answer = await put(tmp_path, {"kind": "scale"})
        task.cancel()
    assert not answer.accepted and "WaitExpired" in answer.text


def torn(path: pathlib.Path) -> None:
    path.write_text('{"kind": "sca')


def other_json(path: pathlib.Path) -> None:
    path.write_text("[1, 2]")


def without_kind(path: pathlib.Path) -> None:
    path.write_text('{"generators": 2}')


def far_too_large(path: pathlib.Path) -> None:
    path.write_text(json.dumps({"kind": "x" * 100_000}))


def pipe_that_would_block(path: pathlib.Path) -> None:
    os.mkfifo(path)


def link(path: pathlib.Path) -> None:
    path.symlink_to("/etc/hostname")


def folder(path: pathlib.Path) -> None:
    path.mkdir()


FOREIGN = (torn, other_json, without_kind, far_too_large, pipe_that_would_block, link, folder)


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
async def test_what_is_no_request_is_told_and_removed_and_harms_nobody(served, heard, make):
    make(served / "requests" / "0-foreign.json")
    assert (await put(served, {"kind": "scale", "generators": 2})).accepted
    (refused,) = [answer for kind, answer in heard if kind == ""]
    assert "0-foreign.json is no request" in refused.text
    assert requests_in(served) == (["0-foreign.json"] if make is folder else [])


async def test_other_files_in_the_folder_are_left_alone(served):
    (served / "requests" / "notes.txt").write_text("mine")
    await put(served, {"kind": "scale", "generators": 2})
    assert requests_in(served) == ["notes.txt"]


async def test_a_request_is_served_once_however_often_the_driver_looks(tmp_path):
    with announce(tmp_path) as desk:
        (tmp_path / "requests" / "1-a.json").write_text('{"kind": "scale"}')
        assert [len(desk.pending()[0]) for _ in range(3)] == [1, 0, 0]


async def test_an_answer_whose_asker_left_is_not_kept(tmp_path):
    with announce(tmp_path) as desk:
        path = tmp_path / "requests" / "1-a.json"
        path.write_text('{"kind": "scale"}')
        (request,), _ = desk.pending()
        path.unlink()
        desk.reply(request, Answer(True, "done"))
        assert requests_in(tmp_path) == []
        (tmp_path / "requests" / "2-b.answer.json").write_text("{}")  # the asker left between look and answer
        desk.pending()
        assert requests_in(tmp_path) == []


def test_requests_put_before_the_driver_started_expire(tmp_path):
    folder = tmp_path / "requests"
    folder.mkdir()
    (folder / "1-a.json").write_text('{"kind": "scale"}')
    (folder / "2-b.json").write_text('{"kind": "scale"}')
    (folder / "2-b.answer.json").write_text("{}")  # its asker was killed
    desk = Desk(tmp_path)
    assert "expired" in json.loads((folder / "1-a.answer.json").read_text())["text"]
    assert desk.pending() == ([], [])
    assert requests_in(tmp_path) == ["1-a.answer.json", "1-a.json"]


async def test_the_end_of_the_run_answers_those_who_wait(tmp_path):
    with announce(tmp_path):
        asking = asyncio.create_task(put(tmp_path, {"kind": "scale"}))
        while not list((tmp_path / "requests").glob("*.json")):  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert await asking == Answer(False, "the run has ended")


def test_a_driver_that_does_not_answer_is_named_and_the_request_withdrawn(tmp_path):
    with announce(tmp_path), pytest.raises(NoAnswer, match=f"process {os.getpid()} on .* within 0 s"):
        ask(tmp_path, {"kind": "scale"}, seconds=0.05)
    assert requests_in(tmp_path) == []


async def test_a_request_that_the_driver_removed_unread_is_not_waited_for(tmp_path):
    with announce(tmp_path):
        asking = asyncio.create_task(put(tmp_path, {"kind": "scale"}))
        while not (found := list((tmp_path / "requests").glob("*.json"))):  # noqa: ASYNC110
            await asyncio.sleep(0)
        found[0].unlink()
        with pytest.raises(NoAnswer, match="could not read"):
            await asking


def test_where_nobody_drives_the_run_it_says_how_it_ended(tmp_path):
    with pytest.raises(NotRunning, match="no driver has announced itself"):
        ask(tmp_path, {"kind": "scale"})
    write_outcome(RunDirectory(tmp_path), Outcome(status="finished", step=12))
    with pytest.raises(NotRunning, match="finished at step 12"):
        ask(tmp_path, {"kind": "scale"})
    assert not (tmp_path / "requests").exists()


def test_a_killed_driver_is_known_to_be_gone_and_another_may_start(tmp_path, driver):
    child = driver()
    assert living_driver(tmp_path).pid == child.pid
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie answers no more than a reaped one
    with pytest.raises(NotRunning, match="is gone; go on with: rl resume"):
        ask(tmp_path, {"kind": "scale"})
    child.wait()
    with pytest.raises(NotRunning, match="is gone"):
        ask(tmp_path, {"kind": "scale"})
    with announce(tmp_path, patience_s=0):
        assert living_driver(tmp_path).pid == os.getpid()
    assert not (tmp_path / "driver.json").exists()


def test_a_driver_that_dies_while_asked_is_noticed(tmp_path, driver, monkeypatch):
    child = driver()

    def kill_it(seconds: float) -> None:
        child.kill()
        child.wait()

    monkeypatch.setattr(control.time, "sleep", kill_it)  # between two looks for the answer
    with pytest.raises(NotRunning, match="ended before it answered"):
        ask(tmp_path, {"kind": "scale"})
    assert requests_in(tmp_path) == []


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path, driver):
    child = driver()
    with (
        pytest.raises(AlreadyRunning, match=f"driven by process {child.pid} on {socket.gethostname()}"),
        announce(tmp_path),
    ):
        pass
    assert living_driver(tmp_path).pid == child.pid


def test_a_stopped_driver_still_counts_as_one(tmp_path, driver):
    child = driver()
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(AlreadyRunning), announce(tmp_path):
        pass


def test_a_guard_that_holds_the_lock_keeps_the_next_driver_out_until_it_is_done(tmp_path, driver):
    child = driver("with a guard")
    guard = int((tmp_path / "guard").read_text())
    child.kill()
    child.wait()
    try:
        with (
            pytest.raises(AlreadyRunning, match="processes that it left still hold"),
            announce(tmp_path, patience_s=0.2),
        ):
            pass
    finally:
        os.kill(guard, signal.SIGKILL)
    with announce(tmp_path, patience_s=20):
        pass


def test_a_process_number_that_was_given_again_is_not_taken_for_the_driver(tmp_path):
    mine = Driver.myself()
    assert not mine.is_gone()
    assert Driver(mine.pid, mine.host, mine.process_started - 3600).is_gone()
    assert not Driver(mine.pid, "another-host", 0.0).is_gone()  # nobody here can know


def test_without_locks_the_announcement_alone_keeps_a_second_driver_out(tmp_path, driver, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    child = driver()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(AlreadyRunning), announce(tmp_path):
        pass
    child.kill()
    child.wait()
    with announce(tmp_path):
        assert living_driver(tmp_path).pid == os.getpid()


def test_an_unreadable_announcement_is_named_with_what_to_do(tmp_path):
    (tmp_path / "driver.json").write_text("{")
    with pytest.raises(NotRunning, match="driver.json is unreadable .* remove it"):
        living_driver(tmp_path)


def test_a_look_that_fails_is_told_and_the_next_one_works(tmp_path, heard, monkeypatch):
    async def story() -> Answer:
        with announce(tmp_path) as desk:
            true_files = desk._files
            failures = iter([OSError("stale file handle")])

            def files():
                for failure in failures:
                    raise failure
                return true_files()

            monkeypatch.setattr(desk, "_files", files)
            task = asyncio.create_task(desk.serve({}, lambda kind, answer: heard.append((kind, answer)), 0.01))
            answer = await put(tmp_path, {"kind": "scale"})
            task.cancel()
            return answer

    assert not asyncio.run(story()).accepted
    assert "stale file handle" in heard[0][1].text
