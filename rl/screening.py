"""This file reads and writes what `rl screen` found: pass rates per prompt, to filter by and to start beliefs.

One line per prompt: {"prompt": its key, "question": digest of its text, "passes", "answers", "pass_rate", "model",
"date"}. A later line of the same prompt counts; one whose question is no longer the prompt's is passed over.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from rich.table import Table

from rl.prompt_files import Levels
from rl.questions import KnownPrompt, Question, digest_of
from rl.recorder import read_rows
from rl.source_config import HubSource, JsonlSource
from rl.trajectory import GroupReport

SUFFIX = ".difficulty.jsonl"
TENTHS = 10


class Screened(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt under one policy: passes of its answers, partial credit in parts. date is ISO 8601."""

    prompt: str
    question: str
    passes: float
    answers: int
    pass_rate: float
    model: str
    date: str


class Sifted(msgspec.Struct, frozen=True, kw_only=True):
    """A source's training questions after its difficulty filter, and what is known of them by key."""

    levels: Levels
    screened: Mapping[str, KnownPrompt]
    left_out: int
    unscreened: int


def default_path(source: JsonlSource | HubSource, cache: pathlib.Path) -> pathlib.Path:
    """Where `rl screen` writes: the path that the source names, beside a jsonl file, or for the hub below `cache`."""
    if source.difficulty is not None and source.difficulty.path is not None:
        return pathlib.Path(source.difficulty.path).expanduser()
    if isinstance(source, JsonlSource):
        return pathlib.Path(source.path + SUFFIX).expanduser()
    parts = (source.dataset.strip("/.~"), source.subset or "", source.split)
    return cache / ("--".join(part.replace("/", "--") for part in parts if part) + SUFFIX)


def read_screened(path: pathlib.Path) -> dict[str, Screened]:
    """What was found, by the prompt's key. A line that a crash cut is passed over; ValueError for another kind."""
    found: dict[str, Screened] = {}
    for number, (_, row) in enumerate(read_rows(path), start=1):
        if row is None:
            continue
        try:
            screened = msgspec.convert(row, Screened)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"{path} line {number} is not of rl screen: {error}; screen anew into a new file"
            ) from error
        found[screened.prompt] = screened
    return found


def sift(name: str, source: JsonlSource | HubSource, levels: Levels) -> Sifted:
    """Leave out what is too hard or too easy, and keep the rest's pass rates; what was never screened stays.

    ValueError where there is nothing to go by, or where nothing would be left of a level.
    """
    total = sum(map(len, levels.values()))
    if source.difficulty is None:
        return Sifted(levels=levels, screened={}, left_out=0, unscreened=total)
    bounds, found = source.difficulty, _found(name, source)
    kept: Levels = {}
    screened: dict[str, KnownPrompt] = {}
    for level, questions in levels.items():
        kept[level] = []
        for question in questions:
            known = found.get(question.key)
            if known is None or known.question != digest_of(question):
                kept[level].append(question)
            elif bounds.min_pass_rate <= known.pass_rate <= bounds.max_pass_rate:
                kept[level].append(question)
                screened[question.key] = KnownPrompt(question.key, known.passes, known.answers)
        if not kept[level]:
            raise ValueError(
                f"sources.{name}: all {len(questions)} prompts of level {level} have pass rates outside "
                f"{bounds.min_pass_rate}..{bounds.max_pass_rate} (difficulty); widen min_pass_rate or max_pass_rate, "
                "or take the level's rows out"
            )
    remaining = sum(map(len, kept.values()))
    return Sifted(levels=kept, screened=screened, left_out=total - remaining, unscreened=remaining - len(screened))


def _found(name: str, source: JsonlSource | HubSource) -> dict[str, Screened]:
    assert source.difficulty is not None
    if isinstance(source, HubSource) and source.difficulty.path is None:
        raise ValueError(f"sources.{name}.difficulty.path is missing; give the file that `rl screen` named")
    path = default_path(source, pathlib.Path())
    if not path.exists():
        raise ValueError(
            f"sources.{name}: its difficulty {path} does not exist; run `rl screen` on this config without "
            f"sources.{name}.difficulty first, or correct the path"
        )
    return read_screened(path)


def missing(levels: Levels, found: Mapping[str, Screened], model: str) -> list[tuple[str, Question]]:
    """(level, question) of what this model has not answered yet."""

    def done(question: Question) -> bool:
        known = found.get(question.key)
        return known is not None and (known.model, known.question) == (model, digest_of(question))

    return [(level, question) for level, each in levels.items() for question in each if not done(question)]


def screened_of(question: Question, report: GroupReport, model: str, moment: datetime.datetime) -> Screened | None:
    """What a group says of its prompt; None where no answer could be judged. Scores outside 0..1 are cut to it."""
    scores = [min(max(score, 0.0), 1.0) for score in report.scores if score is not None]
    if not scores:
        return None
    return Screened(
        prompt=question.key,
        question=digest_of(question),
        passes=sum(scores),
        answers=len(scores),
        pass_rate=sum(scores) / len(scores),
        model=model,
        date=moment.isoformat(timespec="seconds"),
    )


def render(source: str, levels: Mapping[str, Sequence[Screened]]) -> Table:
    """How the pass rates of a source's levels are distributed: never, in tenths, always."""
    names = ["0", *(f"≤.{tenth}" for tenth in range(1, TENTHS)), "<1", "1"]
    view = Table(title=f"{source}: prompts by pass rate", title_justify="left", box=None, pad_edge=False)
    for column in ("level", "prompts", "mean", *names):
        view.add_column(column, justify="left" if column == "level" else "right", no_wrap=column != "level")
    for level, screened in levels.items():
        counts = distribution(each.pass_rate for each in screened)
        average = sum(each.pass_rate for each in screened) / max(1, len(screened))
        view.add_row(level, str(len(screened)), f"{average:.2f}", *(str(count) if count else "·" for count in counts))
    return view


def distribution(pass_rates: Iterable[float]) -> list[int]:
    """How many are 0, in each tenth between, upper end included, and 1: twelve counts."""
    counts = [0] * (TENTHS + 2)
    for pass_rate in pass_rates:
        if pass_rate <= 0.0:
            counts[0] += 1
        elif pass_rate >= 1.0:
            counts[-1] += 1
        else:
            counts[max(1, -int(-pass_rate * TENTHS // 1))] += 1
    return counts
