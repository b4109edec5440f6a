"""This file writes one page about a run that stands still: who waits for whom, what is where, each process's stack.

It is for the moment in which something is broken. So every piece is asked for at most a few seconds, and one that fails
is told as failed in its place; the report itself never fails.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import psutil

from rl.doctor import available_memory
from rl.orders import PartStatus
from rl.process_guard import marked_processes
from rl.recorder import write_atomically
from rl.stacks import ProcessStack, stack_lines, take_stacks, task_lines
from rl.staleness import Gate
from rl.waits import WAITS, Wait, Waits

if TYPE_CHECKING:
    from rl.buffer import BufferStats

T = TypeVar("T")
PIECE_S = 5.0  # one question, such as the buffer's counts
STACKS_S = 25.0  # finding the processes and looking into all of them; rl/stacks.py ends earlier by itself
PAGE_LINES = 200
PAGE_WIDTH = 160
MAX_WAITS, MAX_PARTS, MAX_TASKS = 15, 40, 15
MIN_STACK, MAX_PART_STACK, MAX_OTHER_STACK = 4, 30, 6
GIB = 1 << 30
PASSWORD = re.compile(r"(\w://[^:@/\s]*:)[^@\s]+@")


class Versions(NamedTuple):
    """Policy versions: the learners', and the newest that every generator confirmed."""

    learner: int
    generators: int


@dataclass(frozen=True)
class Unknown:
    """A piece that could not be had, and why."""

    why: str


@dataclass(frozen=True)
class Witnesses:
    """Whom to ask. Each is called when a report is made, and may fail or hang then."""

    run_id: str
    directory: pathlib.Path
    gate: Gate
    buffer_stats: Callable[[], Awaitable[BufferStats]]
    generators: Callable[[], Sequence[PartStatus]]
    learners: Callable[[], Sequence[PartStatus]]
    versions: Callable[[], Versions]
    waits: Waits = WAITS


@dataclass(frozen=True)
class Situation:
    """What was found. now is the monotonic moment that the waits' ages count to; labels name processes by number."""

    reason: str
    run_id: str
    moment: float
    now: float
    waits: tuple[Wait, ...]
    versions: Versions | Unknown
    gate: Mapping[str, int] | Unknown
    buffer: BufferStats | Unknown
    generators: tuple[PartStatus, ...] | Unknown
    learners: tuple[PartStatus, ...] | Unknown
    machine: tuple[str, ...] | Unknown
    tasks: tuple[str, ...] | Unknown
    processes: tuple[ProcessStack, ...] | Unknown
    labels: Mapping[int, str]

    @property
    def parts(self) -> tuple[PartStatus, ...]:
        """Generators and learner ranks, as far as they are known."""
        known = (each for each in (self.generators, self.learners) if not isinstance(each, Unknown))
        return tuple(part for parts in known for part in parts)


async def report(reason: str, witnesses: Witnesses) -> str:
    """Gather, and write the page into the run directory; the sentence says where it is, or why there is none."""
    try:
        path = write(render(await gather(reason, witnesses)), witnesses.directory)
    except Exception as error:  # the run is failing for another reason, and that one must stay the one that is told
        return f"there is no stall report: {type(error).__name__}: {error}"
    return f"see {path.name}"


async def gather(reason: str, witnesses: Witnesses) -> Situation:
    """Ask every witness, side by side. Takes half a second where all is well, and never longer than STACKS_S."""
    now, waits = time.monotonic(), tuple(witnesses.waits.pending())
    tasks = _told(lambda: tuple(task_lines(MAX_TASKS)))
    generators = _told(lambda: tuple(witnesses.generators()))
    learners = _told(lambda: tuple(witnesses.learners()))
    versions = _told(witnesses.versions)
    labels = _labels(generators, learners)
    buffer, machine, found = await asyncio.gather(
        _asked(lambda: witnesses.buffer_stats(), PIECE_S),
        _asked(lambda: asyncio.to_thread(_machine, witnesses.directory), PIECE_S),
        _asked(lambda: _processes(witnesses.run_id, labels), STACKS_S),
    )
    processes, labels = (found, labels) if isinstance(found, Unknown) else found
    return Situation(
        reason=reason,
        run_id=witnesses.run_id,
        moment=time.time(),
        now=now,
        waits=waits,
        versions=versions,
        gate=_told(lambda: _gate(witnesses.gate, versions)),
        buffer=buffer,
        generators=generators,
        learners=learners,
        machine=machine,
        tasks=tasks,
        processes=processes,
        labels=labels,
    )


def _told(ask: Callable[[], T]) -> T | Unknown:
    """An answer that is there at once, or why not."""
    try:
        return ask()
    except Exception as error:  # whatever is broken is what the report is about
        return Unknown(f"{type(error).__name__}: {error}")


async def _asked(ask: Callable[[], Awaitable[T]], seconds: float) -> T | Unknown:
    """An answer within `seconds`, or why not. One that does not come is left alone: its cancellation may hang too."""
    try:
        task = asyncio.ensure_future(ask())
    except Exception as error:  # as in _told
        return Unknown(f"{type(error).__name__}: {error}")
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else will look
    if not task.done():
        return Unknown(f"no answer within {seconds:.0f} s")
    return _told(task.result) if not task.cancelled() else Unknown("the question was cancelled")


def _gate(gate: Gate, versions: Versions | Unknown) -> dict[str, int]:
    room = {} if isinstance(versions, Unknown) else {"room": gate.room(versions.generators)}
    return {"accepted": gate.accepted, "running": gate.running, **room, "max_lag": gate.max_lag}


def _labels(*fleets: Sequence[PartStatus] | Unknown) -> dict[int, str]:
    parts = [part for fleet in fleets if not isinstance(fleet, Unknown) for part in fleet]
    return {pid: part.name for part in parts for pid in part.pids} | {os.getpid(): "driver"}


async def _processes(run_id: str, labels: Mapping[int, str]) -> tuple[tuple[ProcessStack, ...], dict[int, str]]:
    """The stacks of the run's processes on this node: the driver first, then those of the parts, then all others."""
    marked = [process.pid for process in await asyncio.to_thread(marked_processes, run_id)]
    known = {pid: label for pid in [os.getpid(), *marked] if (label := _label(pid, labels))}

    def rank(pid: int) -> tuple[bool, str, str, int]:
        label = known.get(pid, "")
        return pid != os.getpid(), label.removeprefix("under ") or "~", label, pid  # "~" sorts behind every name

    return tuple(await take_stacks(sorted({os.getpid(), *marked}, key=rank))), known


def _label(pid: int, labels: Mapping[int, str]) -> str:
    """The part that a process is, or works under; nothing for one that only the driver stands above."""
    if pid in labels:
        return labels[pid]
    try:
        above = [parent.pid for parent in psutil.Process(pid).parents()]
    except psutil.Error:  # it has just ended, and so will its stack say
        return ""
    named = [labels[parent] for parent in above if labels.get(parent, "driver") != "driver"]
    return f"under {named[0]}" if named else ""


def _machine(directory: pathlib.Path) -> tuple[str, ...]:
    """What this node is short of, if it is."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    memory = psutil.virtual_memory()
    return (
        f"load {load} on {os.cpu_count()} cores",
        f"memory {available_memory() / GIB:.1f} GiB available of {memory.total / GIB:.1f}, "
        f"swap used {psutil.swap_memory().used / GIB:.1f} GiB, OOM kills: {_oom_kills()}",
        f"free disk for the run {_free(directory)}, free shared memory {_free(pathlib.Path('/dev/shm'))}",
    )


def _free(folder: pathlib.Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / GIB:.1f} GiB"
    except OSError as error:
        return f"unknown ({error})"


def _oom_kills() -> str:
    """Processes that the kernel killed for memory: in this container, else since the node booted."""
    for file, scope in (("/sys/fs/cgroup/memory.events", "in this container"), ("/proc/vmstat", "since boot")):
        try:
            lines = pathlib.Path(file).read_text().splitlines()
        except OSError:  # no cgroup v2, or no Linux
            continue
        for line in lines:
            if line.startswith("oom_kill "):
                return f"{line.split()[1]} {scope}"
    return "unknown"


def render(situation: Situation) -> str:
    """The page: at most PAGE_LINES lines, whatever the size of the run."""
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(situation.moment))
    page = [
        f"stall report of {situation.run_id}, {moment}, driver {os.getpid()} on {socket.gethostname()}",
        *_cut(situation.reason.splitlines(), 5),
        "",
        *_wait_section(situation),
        *_flow_section(situation),
        *_part_section(situation),
        *_listed("machine", situation.machine, 10),
        *_listed("tasks of the driver, with the calls they wait in, innermost first", situation.tasks, MAX_TASKS + 1),
    ]
    page += _stack_section(situation, PAGE_LINES - len(page))
    return PASSWORD.sub(r"\1***@", "\n".join(line[:PAGE_WIDTH].rstrip() for line in page)) + "\n"


def _cut(lines: Sequence[str], limit: int) -> list[str]:
    return [*lines] if len(lines) <= limit else [*lines[: limit - 1], f"... {len(lines) - limit + 1} more"]


def _listed(title: str, lines: Sequence[str] | Unknown, limit: int) -> list[str]:
    told = [f"unknown: {lines.why}"] if isinstance(lines, Unknown) else _cut(lines, limit) or ["none"]
    return [title, *(f"  {line}" for line in told), ""]


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _wait_section(situation: Situation) -> list[str]:
    lines = [
        f"{_age(wait.age_s(situation.now))} of {_age(wait.seconds)}: {wait.what}"
        + (f" from {wait.whom}" if wait.whom else "")
        for wait in situation.waits
    ]
    return _listed(f"{len(lines)} waits that last, the oldest first", lines, MAX_WAITS)


def _flow_section(situation: Situation) -> list[str]:
    """Where the groups are: versions, gate and buffer."""
    versions, gate, buffer = situation.versions, situation.gate, situation.buffer
    lines = [
        f"versions: unknown: {versions.why}"
        if isinstance(versions, Unknown)
        else f"policy version: learners {versions.learner}, confirmed by the generators {versions.generators}",
        f"gate: unknown: {gate.why}"
        if isinstance(gate, Unknown)
        else "gate, in groups: " + ", ".join(f"{name} {value}" for name, value in gate.items()),
    ]
    if isinstance(buffer, Unknown):
        return _listed("flow", [*lines, f"buffer: unreachable: {buffer.why}"], 10)
    dropped = ", ".join(f"{reason} {groups}" for reason, (groups, _) in buffer.dropped.items() if groups)
    lines += [
        f"buffer: {buffer.buffered_groups} groups wait ({buffer.buffered_bytes} bytes, the oldest for "
        f"{_age(buffer.oldest_age_s)}), {buffer.leased_groups} leased ({buffer.leased_bytes} bytes), "
        f"{buffer.in_flight} in flight",
        f"since the start: {buffer.drawn} drawn, {buffer.trained_groups} trained, dropped: {dropped or 'none'}",
    ]
    return _listed("flow", lines, 10)


def _part_section(situation: Situation) -> list[str]:
    """A row for each part, those that do not work first; what it does, or why it is gone, comes last in the row."""
    rows = [("part", "state", "version", "heartbeat", "in hand", "restarts", "node, processes; detail")]
    for part in sorted(situation.parts, key=lambda part: part.state == "working"):
        oldest = f", oldest {_age(part.oldest_request_s)}" if part.in_hand else ""
        where = f"{part.node} {' '.join(map(str, part.pids))}".strip()
        rows.append(
            (
                part.name,
                part.state,
                str(part.version),
                f"{_age(part.heartbeat_age_s)} ago",
                f"{part.in_hand}{oldest}",
                str(part.restarts),
                f"{where}; {' '.join(part.detail.split())}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] + [0]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for name, fleet in (("generators", situation.generators), ("learners", situation.learners)):
        if isinstance(fleet, Unknown):
            lines.append(f"{name}: unknown: {fleet.why}")
    return _listed("parts, those in trouble first", lines, MAX_PARTS)


def _stack_section(situation: Situation, budget: int) -> list[str]:
    """Every process in a line, alike ones in one, and below it as many calls as the page has room for."""
    if isinstance(situation.processes, Unknown):
        return _listed("processes", situation.processes, 1)[:budget]
    here = {process.pid for process in situation.processes}
    elsewhere = [part.name for part in situation.parts if part.pids and not here & set(part.pids)]
    lines = ["processes of the run on this node, innermost call first"]
    if elsewhere:
        lines.append(f"  not seen here, for they are on other nodes or gone: {', '.join(elsewhere)}")
    alike: dict[tuple[str, ...], list[ProcessStack]] = {}
    for process in situation.processes:
        same = stack_lines(process, 1000) if process.threads else [str(process.pid)]
        alike.setdefault((situation.labels.get(process.pid, ""), *same), []).append(process)
    groups = list(alike.values())
    for index, group in enumerate(groups):
        left = budget - len(lines) - 1  # a line is kept for those that find no room
        if left < 1 + (MIN_STACK if group[0].threads else 0):
            hidden = sum(len(each) for each in groups[index:])
            return [*lines, f"... {hidden} more; `py-spy dump --nonblocking --pid N` shows each"]
        lines += _process_lines(group, situation.labels, left - (len(groups) - index - 1), groups[index:])
    return lines


def _process_lines(
    group: list[ProcessStack], labels: Mapping[int, str], spare: int, to_come: list[list[ProcessStack]]
) -> list[str]:
    """One process, or several that stand at the same place; `spare` lines are shared with those to come.

    In a crowd the first get MIN_STACK lines each, and the last none at all: a title without a stack tells little.
    """
    first = group[0]
    label = labels.get(first.pid, "")
    numbers = " ".join(str(process.pid) for process in group)
    title = f"{label + ', ' if label else ''}{numbers}: {first.command or '?'}; {first.facts}"
    if not first.threads:
        return [f"{title}; no stack: {first.missing}" if first.missing else title]
    share = (spare - 1) // max(1, sum(bool(each[0].threads) for each in to_come))
    limit = min(max(share, MIN_STACK), MAX_PART_STACK if label else MAX_OTHER_STACK)
    return [title, *stack_lines(first, limit)]


def write(text: str, directory: pathlib.Path) -> pathlib.Path:
    """Write a page as stall_report.txt, or with the next free number: earlier pages stay. Raises OSError."""
    path, number = directory / "stall_report.txt", 1
    while path.exists():
        number += 1
        path = directory / f"stall_report_{number}.txt"
    write_atomically(path, text)
    return path
