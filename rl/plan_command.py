"""This file answers `rl plan`: what a configuration will do, what holds it up, and which split of devices is best."""

from __future__ import annotations

import pathlib

import msgspec
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from rl.check import available_cores, share_threads
from rl.config import RunConfig
from rl.config_loading import load_config
from rl.model_size import count_parameters
from rl.planner import Option, Pool, best_splits, predict, setting_of, synchronous
from rl.planner_costs import Costs, dump_costs, load_costs
from rl.planner_fit import fit, read_steps
from rl.planner_guess import DEVICES, guess, least_ranks
from rl.planner_validation import Compared, compare
from rl.recorder import RunDirectory

GPUS = sorted(DEVICES.keys() - {"cpu"})


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks. gpu names the device that a guess on CUDA goes by."""

    from_run: str | None = None
    costs: str | None = None
    devices: int | None = None
    gpu: str = "h100"
    write: str | None = None


def plan(config: RunConfig, asked: Asked, console: Console) -> None:
    """Print predictions, the bottleneck, the best splits, and with a run how near its own prediction comes.

    Raises:
        ValueError: the costs cannot be had, or no split fits the devices.
    """
    device = "cpu" if config.device == "cpu" else asked.gpu
    if config.device != "cpu" and device not in GPUS:
        raise ValueError(f"--gpu {device} is not in the table; it has {', '.join(GPUS)}")
    pool = _pool(config, asked.devices, device)
    costs = _costs(config, asked, device, pool)
    setting = setting_of(config)
    options = best_splits(setting, costs, pool)
    as_it_is, in_turns = predict(setting, costs), predict(synchronous(setting), costs)
    console.print(_described(costs), soft_wrap=True)
    console.print(_predictions(as_it_is, in_turns))
    console.print(_verdict(as_it_is, in_turns))
    console.print(_splits(options, as_it_is, pool, "cores" if device == "cpu" else "devices"))
    if asked.from_run is not None:
        console.print(_validation(*_validated(_directory(asked.from_run), costs)))
    if asked.write is not None:
        pathlib.Path(asked.write).write_text(dump_costs(costs), encoding="utf-8")
        console.print(f"[dim]costs written to {escape(asked.write)}; --costs reads them[/dim]", soft_wrap=True)


def _directory(run: str) -> RunDirectory:
    directory = RunDirectory(run if pathlib.Path(run).is_dir() else pathlib.Path("runs") / run)
    if not directory.config.exists():
        raise ValueError(f"--from {run}: {directory.config} does not exist; name a run directory, or a run id in runs/")
    return directory


def _costs(config: RunConfig, asked: Asked, device: str, pool: Pool) -> Costs:
    if asked.costs is not None and asked.from_run is not None:
        raise ValueError("--costs and --from both say what things cost; give one of them")
    if asked.costs is not None:
        return load_costs(asked.costs)
    if asked.from_run is not None:
        directory = _directory(asked.from_run)
        return fit(load_config(str(directory.config), []), directory, device)
    return guess(config, device, pool.per_generator, pool.per_rank)


def _pool(config: RunConfig, devices: int | None, device: str) -> Pool:
    """Devices are GPUs, and on CPU cores: as many as the configuration takes where no number is given."""
    engines, ranks = config.generators.count, config.learner.ranks
    if device == "cpu":
        threads = share_threads(config, available_cores())
        given = devices or engines * threads.engine + ranks * threads.rank
        return Pool(devices=given, per_generator=threads.engine, per_rank=threads.rank)
    parameters = count_parameters(config.model.path)
    return Pool(
        devices=devices or engines * config.generators.tensor_parallel + ranks,
        per_generator=config.generators.tensor_parallel,
        least_ranks=least_ranks(parameters, DEVICES[device]) if parameters else 1,
    )


def _described(costs: Costs) -> str:
    a, b = 1000 * costs.engine_fixed_s, 1000 * costs.engine_sequence_s
    return (
        f"[bold]costs[/bold]  {escape(costs.origin)}\n[dim]an engine step of n sequences takes {a:.2f} + {b:.3f} n ms; "
        f"answers have {costs.lengths.mean:.0f} tokens; {costs.zero_advantage_share:.0%} of the groups have equal "
        f"rewards; a learner step takes {costs.learner_fixed_s:.2f} s + {1000 * costs.learner_token_s:.3g} ms/token; "
        f"an update stops engines for {costs.pause_s:.2f} s[/dim]"
    )


def _predictions(as_it_is: Option, in_turns: Option) -> Table:
    view = _table("prediction", "", f"max_lag {as_it_is.setting.max_lag}, as configured", "max_lag 0")
    both = (as_it_is.prediction, in_turns.prediction)
    rows = {
        "seconds a step": [f"{each.step_s:.2f}  (90%: {each.step_p90_s:.2f})" for each in both],
        "trajectories/s": [f"{each.trajectories_per_s:,.2f}" for each in both],
        "sampled tokens/s": [f"{each.sampled_tokens_per_s:,.0f}" for each in both],
        "sequences in flight, per engine": [f"{each.sequences_mean:.1f}" for each in both],
        "learner idle": [f"{each.learner_idle:.0%}" for each in both],
        "generators idle": [f"{each.generator_idle:.0%}" for each in both],
        "both compute": [f"{each.overlap:.0%}" for each in both],
        "lag, versions": [f"{each.lag_mean:.2f}  (at most {each.lag_max})" for each in both],
        "dropped as stale": [f"{each.stale_groups / each.drawn:.1%}" for each in both],
    }
    for what, cells in rows.items():
        view.add_row(what, *cells)
    return view


def _verdict(as_it_is: Option, in_turns: Option) -> str:
    found, gain = as_it_is.prediction, in_turns.prediction.step_s / as_it_is.prediction.step_s
    return f"[bold]bottleneck[/bold]  {found.bottleneck}\n[bold]asynchrony[/bold]  {gain:.2f}x as fast as max_lag 0"


def _splits(options: list[Option], as_it_is: Option, pool: Pool, unit: str) -> RenderableType:
    title = f"best splits of {pool.devices} {unit}"
    view = _table(title, "generators", "ranks", "in flight", "step, s", "learner idle", "gen. idle", "gain")
    for option in options:
        setting, found = option.setting, option.prediction
        here = setting == as_it_is.setting
        view.add_row(
            str(setting.generators),
            str(setting.ranks),
            str(setting.max_sequences),
            f"{found.step_s:.2f}",
            f"{found.learner_idle:.0%}",
            f"{found.generator_idle:.0%}",
            "as it is" if here else f"{as_it_is.prediction.step_s / found.step_s:.2f}x",
            style="bold" if here else "",
        )
    best = options[0].setting
    orders = (
        f"generators.count={best.generators} learner.ranks={best.ranks} generators.max_sequences={best.max_sequences}"
    )
    return Group(view, f"[dim]{orders}[/dim]")


def _validated(directory: RunDirectory, costs: Costs) -> tuple[str, list[Compared]]:
    """The run's own figures against the prediction for its own configuration."""
    config, steps = load_config(str(directory.config), []), read_steps(directory)
    finished = max(row["step"] for row in steps) == config.run.steps
    return directory.run_id, compare(setting_of(config), costs, steps, finished)


def _validation(run_id: str, rows: list[Compared]) -> Table:
    view = _table(f"{escape(run_id)}, against its own prediction", "", "measured", "predicted", "error")
    for row in rows:
        view.add_row(*row.cells())
    return view


def _table(title: str, *columns: str) -> Table:
    view = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for at, name in enumerate(columns):
        view.add_column(name, justify="left" if at == 0 else "right")
    return view
