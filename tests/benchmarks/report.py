"""This file is how a benchmark takes turns, compares, and reports: markdown to read and JSON to keep."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "runs" / "benchmarks"  # not kept in the repository


@dataclass(frozen=True)
class Ratio:
    """How one arm compares with another: the ratio of medians, and the least and largest ratio of one round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Table:
    """A table of a report; cells are shown as they are, numbers with three digits."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def markdown(self) -> str:
        """The table as markdown, under its title."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        return "\n".join([*lines, *("| " + " | ".join(map(_shown, row)) + " |" for row in self.rows)])


def options(description: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks share: --quick, --rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="less than a minute, to see that it runs")
    parser.add_argument("--rounds", type=int, default=None, help="how often each arm takes its turn")
    return parser


def in_turns(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each arm measures (seconds, or whatever it returns), in turns A B A B, so that noise hits all alike."""
    measured: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            measured[name].append(arm())
    return measured


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """above / below, of two arms that took turns."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(statistics.median(above) / statistics.median(below), min(each), max(each))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "processor": platform.machine(), "load": os.getloadavg()[0], "time": time.strftime("%F %T")}


def publish(name: str, tables: Sequence[Table], **facts: Any) -> Path:
    """Print the tables and keep them, with facts, as runs/benchmarks/<name>.json; returns its path."""
    for table in tables:
        print(f"\n{table.markdown()}", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine(), "tables": [asdict(table) for table in tables], **facts}
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    return path


def _shown(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Ratio) else str(value)
