"""This file runs `rl` as a person would: a process of its own, a run directory, and a look at what is left behind."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas
import psutil

from rl.process_guard import marked_processes

DEADLINE_S = 420


@dataclass
class RunProcess:
    """A started `rl` and the run directory it wrote."""

    process: subprocess.Popen
    parent: pathlib.Path
    output: pathlib.Path
    path: pathlib.Path | None = field(default=None)

    @property
    def directory(self) -> pathlib.Path:
        """The run directory, once there is one."""
        if self.path is None:
            self.await_condition("a run directory", lambda: any(self.parent.glob("*")))
            (self.path,) = self.parent.iterdir()
            assert self.path.is_dir()
        return self.path

    def await_condition(self, what: str, condition, seconds: float = DEADLINE_S):
        """Poll until the condition holds while the process lives; returns what the condition returned."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, f"rl ended while waiting for {what}:\n{self.output.read_text()}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}:\n{self.output.read_text()}"
            time.sleep(0.05)  # the other side of the wait is another process's file
        return found

    def events(self, kind: str) -> list[dict]:
        """The run's events of one kind."""
        return [row for row in self.events_of_all_kinds() if row["event"] == kind]

    def events_of_all_kinds(self) -> list[dict]:
        """All whole lines of events.jsonl."""
        path = self.directory / "events.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines if line]

    def press_ctrl_c(self) -> None:
        """What a terminal does: the signal reaches the driver and every process that stayed in its group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, seconds: float = DEADLINE_S) -> int:
        """Wait for the end; returns the exit status."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            raise AssertionError(f"rl did not end within {seconds} s:\n{self.output.read_text()}") from None

    @property
    def outcome(self) -> dict:
        """outcome.json."""
        return json.loads((self.directory / "outcome.json").read_text())

    @property
    def metrics(self) -> pandas.DataFrame:
        """metrics.jsonl, a row per step."""
        return pandas.read_json(self.directory / "metrics.jsonl", lines=True)

    def family(self) -> list[psutil.Process]:
        """Living processes of the run, the driver not counted."""
        return marked_processes(self.directory.name)

    def engine_core(self) -> int:
        """The vLLM engine's scheduling process, which names itself."""
        (pid,) = [process.pid for process in self.family() if "".join(_cmdline(process)).startswith("VLLM::EngineCore")]
        return pid

    def await_no_family(self, seconds: float = 30) -> None:
        """Fail unless every process of the run ends in time."""
        _, alive = psutil.wait_procs(self.family(), timeout=seconds)
        assert not alive, f"still alive: {[process.cmdline() for process in alive]}"


def _cmdline(process: psutil.Process) -> list[str]:
    """Empty for a process that has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def start_rl(
    arguments: Sequence[str], folder: pathlib.Path, model_dir: str, path: pathlib.Path | None = None
) -> RunProcess:
    """Start `rl` with arguments; a new run puts its directory below `folder`, a resumed one has it at `path`."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder.with_name(f"{folder.name}-{arguments[0]}-output.txt")
    command = [sys.executable, "-m", "rl.cli", *arguments]
    if arguments[0] == "run":
        command += [f"model.path={model_dir}", f"run.dir={folder}", "checkpoint.keep=1"]
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": "200"},
            start_new_session=True,
        )
    return RunProcess(process, folder, output, path)
