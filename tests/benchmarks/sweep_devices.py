"""What the planner predicts up to 1,024 devices, beside what was published: writes the table of docs/planner.md.

Run with `.venv/bin/python tests/benchmarks/sweep_devices.py`: about a minute, on one core, with nothing started. Every
cost is guessed (rl/planner_guess.py) and so is every workload below: what is compared are ratios, not seconds.
"""

from __future__ import annotations

import math
import pathlib
import time
from dataclasses import dataclass

import msgspec
from report import Table, options, publish

from rl.planner import Option, Pool, best_splits, predict, synchronous
from rl.planner_costs import Lengths
from rl.planner_guess import DEVICES, guess_for, least_ranks
from rl.prediction import Setting

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "planner.md"
BEGIN, END = "<!-- sweep -->", "<!-- end of sweep -->"
GPU = DEVICES["h100"]
GROUPS, ANSWERS, MAX_LAG, IN_FLIGHT = 256, 4, 4, 256
SHORT = (Lengths(mean_tokens=500, sigma=0.7), 2048)
LONG = (Lengths(mean_tokens=5000, sigma=0.9), 28_000)


@dataclass(frozen=True)
class Case:
    """A model on so many GPUs, or on this part `of` more, with as large a part of the batch.

    published is the speed-up that its authors report over their synchronous baseline.
    """

    name: str
    billions: float
    devices: int
    per_engine: int
    workload: tuple[Lengths, int] = SHORT
    published: str = ""
    of: int = 0


CASES = (
    Case("LlamaRL 8B (arXiv 2505.24034)", 8, 256, 1, published="2.52x"),
    Case("LlamaRL 70B (arXiv 2505.24034)", 70, 256, 4, published="3.98x"),
    Case("LlamaRL 405B (arXiv 2505.24034)", 405, 1024, 16, published="10.7x"),
    Case("AReaL, 1.5B (arXiv 2505.24298)", 1.5, 16, 1, LONG, "up to 2.77x", of=128),
    Case("verl fully async, 7B (its documentation)", 7, 16, 1, LONG, "2.35x to 2.67x", of=128),
    *(Case(f"8B on {devices}", 8, devices, 1) for devices in (8, 32, 128, 512, 1024)),
)


def compared(case: Case) -> tuple[str, ...]:
    """A row: the best split, who waits, and its pace over taking turns, apart and on the same devices."""
    lengths, max_tokens = case.workload
    per_rank = max(1, case.devices // GROUPS)  # a rank without a group would have no work
    parameters = round(case.billions * 1e9)
    costs = guess_for(parameters, GPU, lengths, 300, ANSWERS, case.per_engine, per_rank)
    costs = msgspec.structs.replace(costs, zero_advantage_share=0.0)  # the published baselines sample none again
    pool = Pool(
        devices=case.devices,
        per_generator=case.per_engine,
        per_rank=per_rank,
        least_ranks=math.ceil(least_ranks(parameters, GPU) / per_rank),
    )
    setting = Setting(
        generators=1,
        ranks=1,
        max_sequences=IN_FLIGHT,
        group_size=ANSWERS,
        max_tokens=max_tokens,
        groups_per_step=GROUPS,
        max_lag=MAX_LAG,
        judge_workers=8,
        waits_for_delivery=True,
    )
    best = best_splits(setting, costs, pool)[0]
    apart = best_splits(synchronous(setting), costs, pool)[0]
    together = predict(on_the_same(setting, pool), costs)
    return row(case, best, apart, together, per_rank)


def on_the_same(setting: Setting, pool: Pool) -> Setting:
    """All devices sample, then all train, and changing over costs nothing: what a colocated loop could reach."""
    engines, ranks = pool.devices // pool.per_generator, min(GROUPS, pool.devices // pool.per_rank)
    return msgspec.structs.replace(synchronous(setting), generators=engines, ranks=ranks)


def row(case: Case, best: Option, apart: Option, together: Option, per_rank: int) -> tuple[str, ...]:
    """The cells of a case."""
    setting, found = best.setting, best.prediction
    sampling = setting.generators * case.per_engine
    return (
        case.name,
        f"{case.devices} of {case.of}" if case.of else str(case.devices),
        f"{sampling} : {setting.ranks * per_rank}",
        f"{found.learner_idle:.0%}, {found.generator_idle:.0%}",
        f"{found.lag_mean:.1f}",
        f"{apart.prediction.step_s / found.step_s:.1f}x",
        f"{together.prediction.step_s / found.step_s:.1f}x",
        case.published or "-",
    )


def write(table: Table) -> None:
    """Put the table between its markers in the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE} has no {BEGIN} ... {END}"
    PAGE.write_text(f"{before}{BEGIN}\n\n{table.markdown()}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Sweep, print, and write the page; --quick does two cases and leaves the page alone."""
    asked = options(__doc__ or "").parse_args()
    start = time.perf_counter()
    cases = CASES[:1] + CASES[5:6] if asked.quick else CASES
    columns = ("case", "GPUs", "sampling : training", "idle: learner, generators", "mean lag", "over turns, apart")
    columns += ("over turns, all devices in both", "published, over its own baseline")
    table = Table("Predicted on H100, with guessed costs", columns, tuple(compared(case) for case in cases))
    publish("sweep_devices", [table], seconds=time.perf_counter() - start)
    if not asked.quick:
        write(table)
    print(f"\n{time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of one core")


if __name__ == "__main__":
    main()
