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
from rl.run_outcome import Outcome, write_outcome

application = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
ConfigArgument = Annotated[str, typer.Argument(help="a YAML file, or the bare name of one in configs/")]
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
    """A run's id: its name, the moment, and four random digits against two runs of one second."""
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{name}-{moment}-{secrets.token_hex(2)}"


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
def resume(run: Annotated[str, typer.Argument(help="a run id under runs/, or a run directory")]) -> None:
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
    raise typer.Exit(_launch(settings, directory, console, resume=True))


def _launch(settings: RunConfig, directory: RunDirectory, console: Console, resume: bool) -> int:
    from rl.launch import launch

    outcome = asyncio.run(launch(settings, directory, console, resume))
    write_outcome(directory, outcome)
    colour = {"finished": "green", "stopped": "yellow"}.get(outcome.status, "red")
    console.print(f"[bold {colour}]{outcome.status}[/bold {colour}]  {escape(outcome.summary)}", soft_wrap=True)
    console.print(f"[dim]{directory.path}[/dim]", soft_wrap=True)
    return outcome.exit_status


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
