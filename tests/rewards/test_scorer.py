"""This file tests rewards/scorer.py with real child processes: values, failures by kind, timeouts, versions, the end.

The children are real ones: rewards/child.py behind rewards/child_handle.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from rewards.scorer import JudgeRequest, PartResult, RewardSpec, Scorer

HOSTILE = """
import asyncio, os, signal, subprocess, sys, threading, time

from rewards.base import Failure, Score

def length(completion): return float(len(completion))
def integer(completion): return 3
def boolean(completion): return True
def with_parts(completion): return Score(0.5, {"a": 1}, {"why": threading.Lock()})
async def coroutine(completion):
    await asyncio.sleep(0)
    return 2.0
async def same_loop(completion): return float(id(asyncio.get_running_loop()) % 1_000_003)
def batch(prompts, completions, **columns): return [float(len(prompts[0]) + len(completions[0]))]
def pid(completion): return float(os.getpid())
def main_thread(completion): return threading.current_thread() is threading.main_thread()
def prints(completion):
    print("x" * 200_000)
    return 1.0

def raises(completion): raise ZeroDivisionError("by nothing")
def exits(completion): sys.exit(3)
def none(completion): return None
def nan(completion): return float("nan")
def unpicklable(completion): return lambda: 1.0
def text(completion): return "1.0"
def floods(completion): return Score(1.0, {}, {"text": "x" * (2 << 20)})
def unkeyable(completion): return Score(1.0, {}, {7: 1})
def own_timeout(completion): raise TimeoutError("my judge did not answer")
def own_failure(completion): return Failure("crash", "sandbox gone")
def allocates(completion): return float(len(bytearray(64 << 30)))
def crashes(completion): os._exit(7)
def segfaults(completion): os.kill(os.getpid(), signal.SIGSEGV)
def is_killed(completion): os.kill(os.getpid(), signal.SIGKILL)
def closes_files(completion): os.closerange(3, 1 << 16)
def hangs(completion):
    while True: pass
async def hangs_async(completion): await asyncio.sleep(3600)
def hangs_deaf(completion):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)
    while True: time.sleep(3600)
def hangs_with_child(completion, path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(path + ".new", "w") as file: file.write(str(process.pid))
    os.rename(path + ".new", path)
    process.wait()
def crashes_with_child(completion):
    if os.fork() == 0: time.sleep(3600)
    os._exit(7)
def forks_and_returns(completion):
    os.fork()
    return 1.0

def alarm_user(completion):
    def stop(*_): raise RuntimeError("alarm")
    signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(3600)
    except RuntimeError: return 1.0
def leaves_an_alarm(completion):
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    return 1.0
def slow(completion):
    time.sleep(0.05)
    return 1.0
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "hostile.py"
    path.write_text(HOSTILE)
    return path


@asynccontextmanager
async def running(plugin: Path, *names: str, workers: int = 1, timeout_s: float = 10.0, **options):
    specs = {name: RewardSpec(f"{plugin}:{name}", timeout_s) for name in names}
    scorer = Scorer(specs, workers, **options)
    await scorer.start()
    try:
        yield scorer
    finally:
        await scorer.close()


def ask(*names: str, completion: str = "four", **columns) -> JudgeRequest:
    return JudgeRequest("2+2?", completion, "4", columns, names)


async def ended(pid: int, within_s: float = 10.0) -> bool:
    """Whether the process ends in time, told by the kernel and not by looking again and again."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        return bool(await asyncio.to_thread(poll.poll, within_s * 1000))
    finally:
        os.close(descriptor)


async def test_values_of_every_kind_arrive_as_floats_in_the_order_asked_for(plugin):
    names = ("length", "integer", "boolean", "coroutine", "batch", "with_parts", "prints", "main_thread")
    async with running(plugin, *names) as scorer:
        parts = await scorer.judge(ask(*names))
    assert [part.name for part in parts] == list(names)
    assert [part.value for part in parts] == [4.0, 3.0, 1.0, 2.0, 8.0, 0.5, 1.0, 1.0]
    assert all(type(part.value) is float and part.failure is None and part.version for part in parts)
    assert parts[5].parts == {"a": 1.0} and "lock" in parts[5].extra["why"]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("raises", "exception", "ZeroDivisionError: by nothing"),
        ("exits", "exception", "SystemExit: 3"),
        ("none", "none", "returned None"),
        ("nan", "not_finite", "nan"),
        ("unpicklable", "exception", "function"),
        ("text", "exception", "str"),
        ("floods", "exception", "bytes"),
        ("unkeyable", "exception", "cannot be sent"),
        ("own_timeout", "timeout", "my judge"),
        ("own_failure", "crash", "sandbox gone"),
        ("allocates", "memory", "MemoryError"),
        ("crashes", "crash", "exit status 7"),
        ("segfaults", "crash", "SIGSEGV"),
        ("is_killed", "memory", "SIGKILL"),
        ("closes_files", "crash", "exit status 1"),
        ("crashes_with_child", "crash", "exit status 7"),
    ],
)
async def test_a_failure_has_a_kind_and_no_value_and_the_neighbours_are_judged(plugin, name, kind, message):
    async with running(plugin, name, "length") as scorer:
        group = await scorer.judge_group([ask("length"), ask(name), ask("length", completion="five!")])
    assert [parts[0].value for parts in group] == [4.0, None, 5.0]
    assert group[1][0].failure == kind and message in group[1][0].message


@pytest.mark.parametrize("name", ["hangs", "hangs_async", "hangs_deaf"])
async def test_a_hanging_reward_times_out_alone_and_its_slot_is_back_within_two_seconds(plugin, name):
    async with running(plugin, name, "length", "integer", timeout_s=0.3) as scorer:
        (before,) = scorer.pids
        (hung,) = await scorer.judge(ask(name))
        timed_out_at = time.perf_counter()
        assert (hung.value, hung.failure) == (None, "timeout") and "0.3 s" in hung.message
        assert 0.3 <= hung.seconds < 2.0
        assert [part.value for part in await scorer.judge(ask("length", "integer"))] == [4.0, 3.0]
        assert time.perf_counter() - timed_out_at < 2.0
        assert scorer.pids != (before,)
        with pytest.raises(ProcessLookupError):
            os.kill(before, 0)  # not even a zombie is left


async def test_the_timeout_counts_execution_and_not_the_wait_for_a_slot(plugin):
    async with running(plugin, "slow", workers=2, timeout_s=1.0) as scorer:
        parts = [each[0] for each in await scorer.judge_group([ask("slow")] * 80)]
    assert [part.failure for part in parts] == [None] * 80
    assert max(part.queue_seconds for part in parts) > 1.5, "the last ones waited longer than the timeout"
    assert max(part.seconds for part in parts) < 1.0


async def test_what_a_reward_started_is_killed_with_it(plugin, tmp_path):
    path = str(tmp_path / "pid")
    async with running(plugin, "hangs_with_child", timeout_s=2.0) as scorer:
        (part,) = await scorer.judge(ask("hangs_with_child", path=path))
        assert part.failure == "timeout"
        assert await ended(await asyncio.to_thread(lambda: int(Path(path).read_text())))


async def test_a_reward_that_forks_is_answered_once(plugin):
    async with running(plugin, "forks_and_returns", "length") as scorer:
        parts = await scorer.judge(ask("forks_and_returns", "length", "forks_and_returns", "length"))
    assert [part.value for part in parts] == [1.0, 4.0, 1.0, 4.0]


async def test_signal_alarms_work_and_a_forgotten_one_does_not_hit_the_next_reward(plugin):
    async with running(plugin, "alarm_user", "leaves_an_alarm", "slow", "pid") as scorer:
        parts = await scorer.judge(ask("pid", "alarm_user", "leaves_an_alarm", "slow", "pid"))
    assert [part.value for part in parts[1:4]] == [1.0, 1.0, 1.0], parts
    assert parts[0].value == parts[4].value, "the same child served them all"


async def test_async_rewards_share_one_event_loop(plugin):
    async with running(plugin, "same_loop") as scorer:
        assert len({(await scorer.judge(ask("same_loop")))[0].value for _ in range(3)}) == 1


async def test_memory_is_bounded_as_told(plugin, tmp_path):
    path = tmp_path / "hungry.py"
    path.write_text("def judge(completion): return float(len(bytearray(512 << 20)) > 0)\n")
    for limit, outcome in ((2 << 30, None), (256 << 20, "memory")):
        scorer = Scorer({"hungry": RewardSpec(f"{path}:judge")}, 1, memory_bytes=limit)
        await scorer.start()
        assert (await scorer.judge(ask("hungry")))[0].failure == outcome
        await scorer.close()


async def test_an_edit_is_picked_up_at_a_group_boundary_and_each_result_bears_its_version(tmp_path):
    path = tmp_path / "edited.py"
    body = "import time\ndef judge(completion):\n    time.sleep(0.02)\n    return {}\n"
    path.write_text(body.format("1.0"))
    async with running_file(path) as scorer:
        group = asyncio.create_task(scorer.judge_group([ask("judge")] * 8))
        await asyncio.sleep(0)  # the group has begun: its version is pinned
        path.write_text(body.format("2.0"))
        first, second = [parts[0] for parts in await group], (await scorer.judge(ask("judge")))[0]
        path.write_text("def judge(completion): return 1.0 +\n")
        broken = (await scorer.judge(ask("judge")))[0]
        path.unlink()
        gone = (await scorer.judge(ask("judge")))[0]
        path.write_text(body.format("1.0"))
        back = (await scorer.judge(ask("judge")))[0]
    assert {part.value for part in first} == {1.0} and len({part.version for part in first}) == 1
    assert second.value == 2.0 and second.version != first[0].version
    assert broken.failure == gone.failure == "import" and "SyntaxError" in broken.message
    assert broken.version not in {first[0].version, second.version}
    assert (back.value, back.version) == (1.0, first[0].version)


async def test_an_edit_whose_import_ends_the_child_is_an_import_failure_and_costs_nothing_else(tmp_path):
    path = tmp_path / "edited.py"
    path.write_text("def judge(completion): return 1.0\n")
    async with running_file(path) as scorer:
        path.write_text("import os\nos._exit(9)\ndef judge(completion): return 1.0\n")
        parts = [each[0] for each in await scorer.judge_group([ask("judge")] * 3)]
        path.write_text("def judge(completion): return 3.0\n")
        mended = (await scorer.judge(ask("judge")))[0]
    assert [part.failure for part in parts] == ["import"] * 3 and "exit status 9" in parts[0].message
    assert mended.value == 3.0


def running_file(path: Path):
    return running_specs({"judge": RewardSpec(f"{path}:judge")})


@asynccontextmanager
async def running_specs(specs: dict[str, RewardSpec], workers: int = 1):
    scorer = Scorer(specs, workers)
    await scorer.start()
    try:
        yield scorer
    finally:
        await scorer.close()


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import no_such_package\ndef judge(completion): return 1.0", "ModuleNotFoundError.*no_such_package"),
        ("import os; os._exit(5)\ndef judge(completion): return 1.0", "exit status 5"),
        ("raise SystemExit(2)\ndef judge(completion): return 1.0", "SystemExit"),
        ("def judge(text): return 1.0", "name its parameters completion"),
        ("def judge(completion: return 1.0", "line 1"),
    ],
)
async def test_a_reward_that_does_not_import_is_refused_at_the_start_and_leaves_no_child(tmp_path, source, complaint):
    path = tmp_path / "broken.py"
    path.write_text(source)
    scorer = Scorer({"good": RewardSpec("format", params={"tags": ["a"]}), "bad": RewardSpec(f"{path}:judge")}, 2)
    with pytest.raises(ValueError, match=complaint):
        await scorer.start()
    assert scorer.pids == ()


async def test_a_reward_that_refuses_its_params_is_refused_at_the_start():
    scorer = Scorer({"gym": RewardSpec("reasoning_gym", params={"extract": "first_number"})}, 1)
    with pytest.raises(ValueError, match="first_number"):
        await scorer.start()


async def test_a_cancelled_judgement_frees_its_slot(plugin):
    async with running(plugin, "hangs", "length") as scorer:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(scorer.judge(ask("hangs")), 0.2)
        assert (await scorer.judge(ask("length")))[0].value == 4.0


async def test_closing_while_judging_ends_the_judgement_with_an_error_and_all_children(plugin):
    async with running(plugin, "hangs", workers=2) as scorer:
        pids = scorer.pids
        judging = asyncio.gather(*(scorer.judge(ask("hangs")) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(0)
        await scorer.close()
        assert {type(result) for result in await judging} == {RuntimeError}
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


async def test_a_child_that_dies_between_jobs_costs_no_judgement(plugin):
    async with running(plugin, "length") as scorer:
        (pid,) = scorer.pids
        os.kill(pid, signal.SIGKILL)
        assert await ended(pid)
        await asyncio.sleep(0.05)  # the reaper's word reaches the loop; the outcome is the same if the job comes first
        part = (await scorer.judge(ask("length")))[0]
        assert part.value == 4.0


async def test_children_start_light_and_know_nothing_of_the_parents_main(tmp_path):
    path = tmp_path / "modules.py"
    path.write_text(
        "import sys\nfrom rewards.base import Score\n"
        "def judge(completion): return Score(float(len(sys.modules)), {}, {'modules': sorted(sys.modules)})\n"
    )
    async with running_file(path) as scorer:
        part = (await scorer.judge(ask("judge")))[0]
    assert not {"torch", "vllm", "transformers", "ray", "numpy", "redis", "rl", "actors", "pytest"} & set(
        part.extra["modules"]
    )
    assert part.value is not None and part.value < 350


def test_the_scorer_works_under_uvloop_in_a_thread_as_inside_a_ray_actor(plugin):
    results: list[PartResult] = []

    async def judge_two() -> None:
        async with running(plugin, "crashes", "length") as scorer:
            results.extend(await scorer.judge(ask("crashes", "length")))

    def run_loop() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(judge_two())

    thread = threading.Thread(target=run_loop)
    thread.start()
    thread.join()
    assert [(part.value, part.failure) for part in results] == [(None, "crash"), (4.0, None)]


PARENT = """
import asyncio, json, sys
from rewards.scorer import JudgeRequest, RewardSpec, Scorer

async def main():
    scorer = Scorer({"hangs": RewardSpec(sys.argv[1] + ":hangs", 3600.0)}, 2)
    await scorer.start()
    judging = asyncio.create_task(scorer.judge(JudgeRequest("", "", None, {}, ("hangs",))))
    await asyncio.sleep(0.2)  # one child hangs, one is idle
    print(json.dumps(scorer.pids), flush=True)
    await judging

asyncio.run(main())
"""


async def test_a_parent_killed_with_sigkill_leaves_no_child(plugin):
    command = [sys.executable, "-c", PARENT, str(plugin)]
    parent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pids = json.loads(await parent.stdout.readline())
    finally:
        parent.kill()
        await parent.wait()
    assert len(pids) == 2
    assert [await ended(pid) for pid in pids] == [True, True]


async def test_sixty_four_trivial_completions_are_judged_well_within_a_second(plugin):
    async with running(plugin, "length", workers=2) as scorer:
        began = time.perf_counter()
        group = await asyncio.gather(*(scorer.judge(ask("length")) for _ in range(64)))
        took = time.perf_counter() - began
    assert all(parts[0].value == 4.0 for parts in group)
    assert took < 1.0, f"{took:.3f} s"
