"""This file is `rl screen`: a config's own engine answers every training prompt of its finite sources.

No learner, no Redis, no Ray: one engine in this process, k = rollout.group_size answers each, as the run would sample
them. Each prompt's line is on disk once it is judged, so that Ctrl-C keeps what was done and a second call goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import pathlib
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rewards.loading import resolve
from rl.check import available_cores, problems, share_threads
from rl.config import RunConfig
from rl.fleet_settings import generator_settings
from rl.launch import resolve_model
from rl.orders import Draw
from rl.prompt_files import Levels
from rl.prompts import PromptSources
from rl.questions import Question, stable_number
from rl.recorder import RunDirectory
from rl.screening import Screened, default_path, missing, read_screened, render, screened_of
from rl.source_config import HubSource, JsonlSource
from rl.trajectory import Group, GroupReport
from rl.waits import within

TOLD_EVERY_S = 5.0
Rollout = Callable[[Draw], Awaitable[GroupReport]]


@dataclass(frozen=True)
class Work:
    """What is to be screened of one source, and where it is written down."""

    source: str
    path: pathlib.Path
    levels: Levels
    todo: Sequence[tuple[str, Question]]


class Nowhere:
    """The buffer of a generator whose groups nobody trains on."""

    async def put(self, group: Group) -> bool:
        """Forget the group."""
        return True

    async def close(self) -> None:
        """Nothing is open."""


def plan(config: RunConfig, prompts: PromptSources) -> list[Work]:
    """What the files lack, of what the config trains on if nothing is left out."""
    cache = pathlib.Path(config.run.dir) / "cache"
    works = []
    for name, levels in prompts.levels.items():
        source = config.sources[name]
        assert isinstance(source, JsonlSource | HubSource)
        path = default_path(source, cache)
        questions = {level: list(prompts.questions(name, level)) for level in levels}
        works.append(Work(name, path, questions, missing(questions, read_screened(path), config.model.path)))
    return works


async def answer(
    work: Work, prompts: PromptSources, rollout: Rollout, model: str, at_once: int, seed: int
) -> AsyncGenerator[Screened | None, None]:
    """Have each prompt of `todo` answered, `at_once` at a time; yields each result as it is known, in any order."""
    turns = asyncio.Semaphore(at_once)

    async def one(level: str, question: Question) -> Screened | None:
        async with turns:
            prompt = prompts.next(work.source, level, question.key)
            number = stable_number("screen", seed, prompt.prompt_id, bits=31)
            draw = Draw(group_id=f"screen/{prompt.prompt_id}", draw=0, prompt=prompt, seed=number)
            return screened_of(question, await rollout(draw), model, datetime.datetime.now())

    tasks = [asyncio.create_task(one(*each)) for each in work.todo]
    try:
        for done in asyncio.as_completed(tasks):
            yield await done
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def write(work: Work, results: AsyncIterator[Screened | None], tell: Callable[[str], None]) -> int:
    """Write a line per result; returns how many could not be judged."""
    loop = asyncio.get_running_loop()
    work.path.parent.mkdir(parents=True, exist_ok=True)
    unjudged, done, told = 0, 0, loop.time()
    with work.path.open("a+b") as file:  # a short line at a time, and the loop has nothing more urgent
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")  # a crash cut the last line
        async for screened in results:
            done += 1
            if screened is None:
                unjudged += 1
            else:
                file.write(json.dumps(msgspec.to_builtins(screened)).encode() + b"\n")
                file.flush()
            if loop.time() - told > TOLD_EVERY_S or done == len(work.todo):
                told = loop.time()
                tell(f"{work.source}: {done} of {len(work.todo)} prompts answered")
    return unjudged


async def screen(config: RunConfig, console: Console) -> bool:
    """Screen all finite sources; returns whether every prompt was answered and judged.

    ValueError where the config cannot run. What was done before a Ctrl-C is on disk.
    """
    whole = _whole(config)
    found = problems(whole, resolve)
    if found:
        raise ValueError("\n".join(found))
    model_dir = await asyncio.to_thread(resolve_model, config.model.path)
    prompts = await asyncio.to_thread(_open, whole, model_dir)
    works = plan(config, prompts)
    for work in works:
        total = sum(map(len, work.levels.values()))
        console.print(f"{work.source}: {len(work.todo)} of {total} prompts to answer, into {work.path}", soft_wrap=True)
    complete = True
    if any(work.todo for work in works):
        complete = await _stoppable(_answer_all(whole, model_dir, prompts, works, console), console)
    for work in works:
        console.print(_table(work))
    return complete


def _whole(config: RunConfig) -> RunConfig:
    """The config with all answers of a group sampled, and its finite sources alone, without what they leave out."""
    finite = {
        name: source.model_copy(update={"difficulty": None})
        for name, source in config.sources.items()
        if isinstance(source, JsonlSource | HubSource)
    }
    if not finite:
        raise ValueError(
            f"the sources {', '.join(config.sources)} make endless prompts, of which none comes twice; `rl screen` is "
            "for sources of kind jsonl and hub"
        )
    rollout = config.rollout.model_copy(update={"first_answers": None})
    return config.model_copy(update={"sources": finite, "rollout": rollout})


def _table(work: Work) -> Table:
    found = read_screened(work.path)
    levels = {
        level: [found[question.key] for question in questions if question.key in found]
        for level, questions in work.levels.items()
    }
    return render(work.source, levels)


async def _stoppable(work: Awaitable[int], console: Console) -> bool:
    """Await `work`, or until Ctrl-C; whether it came to its end with every answer judged."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def stop() -> None:
        stopped.set()
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        unjudged = await task
    except BaseException:  # an engine that got the same Ctrl-C dies of it, and says so in its own way
        if not stopped.is_set():
            raise
        console.print("[yellow]stopped[/yellow]  what was answered is kept; the same command goes on from there")
        return False
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if unjudged:
        console.print(f"[yellow]{unjudged} prompts could not be judged[/yellow]; the same command tries them again")
    return not unjudged


async def _answer_all(
    config: RunConfig, model_dir: str, prompts: PromptSources, works: Sequence[Work], console: Console
) -> int:
    folder = pathlib.Path(config.run.dir) / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"[dim]starting the engine; its output goes to {escape(str(folder / 'screen.log'))}[/dim]")
    unjudged = 0
    async with _rollouts(config, model_dir, folder / "screen.log") as rollout:
        at_once = config.generators.max_sequences // config.rollout.group_size + 1  # one waits at the engine
        for work in works:
            results = answer(work, prompts, rollout, config.model.path, at_once, config.run.seed)
            async with contextlib.aclosing(results):
                unjudged += await write(work, results, console.print)
    return unjudged


def _open(config: RunConfig, model_dir: str) -> PromptSources:
    from actors.chat import ChatTokenizer

    tokenizer = ChatTokenizer(model_dir)
    limit, seed = config.max_prompt_tokens, config.run.seed
    return PromptSources.open(config.sources, tokenizer.render, limit, seed, config.model.system_prompt)


@contextlib.asynccontextmanager
async def _rollouts(config: RunConfig, model_dir: str, log: pathlib.Path) -> AsyncIterator[Rollout]:
    """A generator of this process, built as those of a run are."""
    from actors.generator import Generator
    from actors.vllm_engine import VllmEngine
    from rewards.scorer import Scorer

    directory = RunDirectory(pathlib.Path(config.run.dir) / "screen")  # only its name is used
    settings = generator_settings(config, directory, share_threads(config, available_cores()), model_dir, "")
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_output_to(log))
        scorer = Scorer(settings.rewards, settings.reward_workers)
        stack.push_async_callback(scorer.close)
        await scorer.start()
        starting = VllmEngine.start(msgspec.structs.replace(settings.engine, name="the screening engine"))
        engine = await within(starting, config.monitoring.start_deadline_s, "the engine to start", "vLLM")
        stack.push_async_callback(engine.stop)
        generator = Generator(engine, scorer, Nowhere(), settings.generator, 0)

        async def rollout(draw: Draw) -> GroupReport:
            what = f"the answers to {draw.prompt.prompt_id}"
            return await within(generator.rollout(draw), config.monitoring.group_deadline_s, what, "the engine")

        yield rollout


@contextlib.contextmanager
def _output_to(log: pathlib.Path) -> Iterator[None]:
    """Send what engine and rewards print into a file; consoles made on a copy of the screen go on showing there."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        yield
    finally:
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(file)
