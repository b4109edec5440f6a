"""This file is the command `rl`: it reads arguments, prints, and turns errors into one screen and an exit status."""

from __future__ import annotations

import asyncio
import datetime
import pathlib
import re
import secrets
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from rl.config import RunConfig
from rl.config_loading import dump_config, load_config
from rl.recorder import RunDirectory
from rl.replay import TOLERANCE
from rl.run_outcome import Outcome, write_outcome

application = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
ConfigArgument = Annotated[str, typer.Argument(help="a YAML file, or the bare name of one in configs/")]
RunArgument = Annotated[str, typer.Argument(help="a run id under runs/, or a run directory")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value, any number")]

EXIT_BAD_INPUT = 2
PASSWORD = re.compile(r"(rediss?://[^:@\s]*:)[^@\s]+@")


def _refuse(error: Exception, console: Console, directory: RunDirectory) -> typer.Exit:
    """Print what is wrong and leave an outcome file, so that whoever started the run finds out without the screen."""
    directory.path.mkdir(parents=True, exist_ok=True)
    write_outcome(directory, Outcome.of_error("refused", error))
    console.print(f"[bold red]refused[/bold red]  {escape(str(error))}\n[dim]{directory.outcome}[/dim]", soft_wrap=True)
    return typer.Exit(EXIT_BAD_INPUT)


def new_run_id(name: str) -> str:
    """A run's id: its name, the moment, and eight random digits against two runs of one second."""
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{name}-{moment}-{secrets.token_hex(4)}"


def _name_of(config: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_-]", "_", pathlib.Path(config).stem)[:40] or "run"


@application.command()
def run(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train: one command from a config to a checkpoint."""
    console = Console(highlight=False)
    try:
        settings = load_config(config, overrides or [])
    except (ValueError, OSError) as error:
        raise _refuse(error, console, RunDirectory(pathlib.Path("runs") / new_run_id(_name_of(config)))) from None
    directory = RunDirectory(pathlib.Path(settings.run.dir) / new_run_id(settings.run.name))
    try:
        directory.create()
        directory.config.touch(mode=0o600)  # buffer.redis may hold a password, and a resume needs it
        directory.config.write_text(dump_config(settings))
    except OSError as error:
        refused = ValueError(f"run.dir {settings.run.dir} cannot hold a run: {error}; set run.dir to a writable folder")
        raise _refuse(refused, console, RunDirectory(pathlib.Path("runs") / directory.run_id)) from None
    raise typer.Exit(_launch(settings, directory, console, resume=False))


@application.command()
def resume(
    run: Annotated[str, typer.Argument(help="a run id under runs/, or a run directory")],
    step: Annotated[int | None, typer.Option(help="an older checkpoint; those after it are removed")] = None,
) -> None:
    """Go on from a run's newest complete checkpoint, with the very batches that came after it."""
    console = Console(highlight=False)
    directory = RunDirectory(run if pathlib.Path(run).is_dir() else pathlib.Path("runs") / run)
    if not directory.config.exists():
        console.print(
            f"[bold red]refused[/bold red]  {directory.config} does not exist; name a run directory", soft_wrap=True
        )
        raise typer.Exit(EXIT_BAD_INPUT)
    try:
        settings = load_config(str(directory.config), [])
    except ValueError as error:
        raise _refuse(error, console, directory) from None
    raise typer.Exit(_launch(settings, directory, console, resume=True, step=step))


def _launch(
    settings: RunConfig, directory: RunDirectory, console: Console, resume: bool, step: int | None = None
) -> int:
    from rl.control import AlreadyRunning
    from rl.launch import launch

    try:
        outcome = asyncio.run(launch(settings, directory, console, resume, step))
    except AlreadyRunning as error:  # the directory is that run's, its outcome too
        console.print(f"[bold red]refused[/bold red]  {escape(str(error))}", soft_wrap=True)
        return EXIT_BAD_INPUT
    write_outcome(directory, outcome)
    colour = {"finished": "green", "stopped": "yellow"}.get(outcome.status, "red")
    console.print(f"[bold {colour}]{outcome.status}[/bold {colour}]  {escape(outcome.summary)}", soft_wrap=True)
    console.print(f"[dim]{directory.path}[/dim]", soft_wrap=True)
    return outcome.exit_status


@application.command()
def scale(
    run: Annotated[str, typer.Argument(help="a run id under runs/, or a run directory")],
    change: Annotated[str, typer.Argument(help="generators=N, the number of engines to sample with")],
) -> None:
    """Have a run that is under way go on with more or fewer generators."""
    from rl.control import NoAnswer, ask

    console = Console(highlight=False)
    directory = RunDirectory(run if pathlib.Path(run).is_dir() else pathlib.Path("runs") / run)
    try:
        answer = ask(directory.path, {"kind": "scale", **_scaled(change)})
    except NoAnswer as error:
        console.print(f"[bold red]no answer[/bold red]  {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/bold red]  {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    verdict = "[bold green]accepted[/bold green]" if answer.accepted else "[bold red]refused[/bold red]"
    console.print(f"{verdict}  {escape(answer.text)}", soft_wrap=True)
    raise typer.Exit(0 if answer.accepted else EXIT_BAD_INPUT)


def _scaled(change: str) -> dict[str, int]:
    """What `generators=3` asks for. Raises ValueError for anything else."""
    name, _, count = change.partition("=")
    if name != "generators":
        raise ValueError(f"{name or 'nothing'} cannot be scaled while a run is under way; generators can: generators=3")
    if not count.isascii() or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"generators={count} is no number of generators; give a whole number of 1 or more")
    return {name: int(count)}


def _recorded(run: str) -> RunDirectory:
    """The directory of a run that was started. Raises ValueError where there is none."""
    directory = RunDirectory(run if pathlib.Path(run).is_dir() else pathlib.Path("runs") / run)
    if not directory.config.exists():
        raise ValueError(f"{directory.config} does not exist; name a run directory, or a run id under runs/")
    return directory


@application.command()
def replay(
    run: RunArgument,
    step: Annotated[int, typer.Option(min=1, help="the step whose loss to compute again")],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            help="largest difference of the losses, relative to the sum of the tokens' |losses|. On the machine that "
            "trained the difference is 0, bit for bit, or next to it; where bf16 rounds otherwise (other hardware or "
            "libraries) allow 1e-3 from a checkpoint, 1e-2 if steps are trained again",
        ),
    ] = TOLERANCE,
) -> None:
    """Compute a step's loss again, from archive and checkpoint, and compare it with the recorded one.

    Archived steps between the newest checkpoint before it and the step are trained again.

    It only reads, so the run may be going on. Exit status 0: agrees, 1: differs, 2: cannot be computed.
    """
    from rl.replay import plan_replay, render

    console = Console(highlight=False)
    try:
        directory = _recorded(run)
        settings = load_config(str(directory.config), [])
        plan = plan_replay(directory, step)
        for problem in plan.passed_over:
            console.print(f"[yellow]passed over[/yellow]  {escape(problem)}", soft_wrap=True)
        start = plan.checkpoint.name if plan.checkpoint else "the starting model"
        console.print(f"[dim]from {start}: {len(plan.steps)} step(s) to compute[/dim]")
        from rl.launch import replay as make_again

        replayed = make_again(settings, directory, plan, tolerance)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/bold red]  {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    console.print(render(replayed))
    raise typer.Exit(0 if replayed.agrees else 1)


@application.command()
def lineage(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(help="an optimizer step")] = None,
    group: Annotated[str | None, typer.Option(help="a group id, or the number of its draw")] = None,
    prompt: Annotated[str | None, typer.Option(help="a prompt id")] = None,
    version: Annotated[int | None, typer.Option(help="a policy version")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Tell where a step, a group, a prompt or a policy version came from, and what became of it."""
    import msgspec

    from rl.lineage import Genealogist
    from rl.lineage_view import render

    console = Console(highlight=False)
    asked = {"step": step, "group": group, "prompt": prompt, "version": version}
    chosen = [(kind, what) for kind, what in asked.items() if what is not None]
    try:
        if len(chosen) != 1:
            raise ValueError("ask for exactly one of --step, --group, --prompt and --version")
        ((kind, what),) = chosen
        answer = getattr(Genealogist(_recorded(run)), kind)(what)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/bold red]  {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(answer)).decode())
    else:
        console.print(render(answer))


@application.command()
def screen(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Score the training prompts of files and hub datasets under a config's model, and write their difficulty down.

    A source's `difficulty` then leaves out what is too hard or too easy. Exit status 0: all answered, 1: some are left.
    """
    import os

    from rl.screen import screen as screen_sources

    with os.fdopen(os.dup(1), "w") as screen:  # the engine's own output goes to a file
        console = Console(highlight=False, file=screen)
        try:
            complete = asyncio.run(screen_sources(load_config(config, overrides or []), console))
        except (ValueError, OSError) as error:
            console.print(f"[bold red]refused[/bold red]  {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None
    raise typer.Exit(0 if complete else 1)


@application.command()
def check(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Say what a run would do, and what is wrong with its config, in under two seconds."""
    from rewards.loading import resolve
    from rl.check import arithmetic, available_cores, problems, render

    console = Console(highlight=False)
    try:
        settings = load_config(config, overrides or [])
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/bold red]  {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    console.print(PASSWORD.sub(r"\1***@", dump_config(settings)), markup=False)
    console.print(render(arithmetic(settings, available_cores()), "arithmetic"))
    found = problems(settings, resolve)
    for problem in found:
        console.print(f"[bold red]problem[/bold red]  {escape(problem)}", soft_wrap=True)
    raise typer.Exit(EXIT_BAD_INPUT if found else 0)


@application.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    from_run: Annotated[str | None, typer.Option("--from", help="a run to fit costs to: its id or directory")] = None,
    costs: Annotated[str | None, typer.Option(help="a JSON or YAML file of costs, as --write makes it")] = None,
    devices: Annotated[int | None, typer.Option(min=2, help="GPUs, or CPU cores, to share out")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100 or h200: what a guess goes by")] = "h100",
    write: Annotated[str | None, typer.Option(help="a file to write the costs to")] = None,
) -> None:
    """Predict a run's pace, who waits for whom, and the best split of devices, by simulation. Starts nothing."""
    from rl.plan_command import Asked
    from rl.plan_command import plan as predict

    console = Console(highlight=False)
    try:
        asked = Asked(from_run=from_run, costs=costs, devices=devices, gpu=gpu, write=write)
        predict(load_config(config, overrides or []), asked, console)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/bold red]  {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None


@application.command()
def doctor(config: ConfigArgument = "arithmetic", overrides: Overrides = None) -> None:
    """Look at this machine with a config's needs: what would stop the run, and how to mend it."""
    from rl.doctor import examine, render

    console = Console(highlight=False)
    findings = examine(load_config(config, overrides or []))
    console.print(render(findings))
    raise typer.Exit(1 if any(finding.severity == "error" for finding in findings) else 0)


def main() -> None:
    """The entry point that pyproject.toml names."""
    application()


if __name__ == "__main__":
    main()
