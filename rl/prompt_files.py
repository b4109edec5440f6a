"""This file reads finite sources, a JSONL file or a Hugging Face dataset, into questions by level."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from rl.questions import Question, nearest, plain, user_message
from rl.source_config import HubSource, JsonlSource
from rl.trajectory import Message, TextPart

SINGLE_LEVEL = "all"
RESERVED = frozenset({"prompt", "prompts", "completion", "completions", "reference"})  # what rewards are called with

Row = tuple[str, str, dict[str, Any]]  # key, place for error messages, content
Levels = dict[str, list[Question]]


class FileLevel:
    """One level of a finite source: every epoch a new order, decided by seed and epoch alone."""

    def __init__(self, where: str, training: Sequence[Question], held_out: Sequence[Question], seed: int) -> None:
        assert training
        self._where = where
        self._training = training
        self._held_out = held_out
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])
        self._by_key = {question.key: question for question in training}

    @property
    def questions(self) -> Sequence[Question]:
        """All training questions, in the order of the file."""
        return self._training

    def question(self, key: str) -> Question:
        """The training question of this key."""
        return self._by_key[key]

    def training(self, cursor: int) -> tuple[Question, int]:
        """The question at `cursor`, counted over all epochs."""
        epoch, position = divmod(cursor, len(self._training))
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(len(self._training), self._seed, epoch))
        return self._training[self._order[1][position]], cursor + 1

    def held_out(self) -> Iterator[Question]:
        """All held-out questions, in one order for every seed."""
        for index in self._shuffled(len(self._held_out), "held out", 0):
            yield self._held_out[index]

    def _shuffled(self, count: int, seed: object, epoch: int) -> list[int]:
        order = list(range(count))
        random.Random(f"{self._where}/{seed}/{epoch}").shuffle(order)
        return order


def read_jsonl(name: str, source: JsonlSource) -> tuple[Levels, Levels]:
    """Training and held-out questions by level. ValueError names file, line and column."""
    training = _by_level(name, source, _jsonl_rows(name, source.path))
    held_out = _by_level(name, source, _jsonl_rows(name, source.held_out_path)) if source.held_out_path else {}
    return training, held_out


def read_hub(name: str, source: HubSource) -> tuple[Levels, Levels]:
    """Training and held-out questions by level, downloaded or from the datasets cache or a local folder."""
    training = _by_level(name, source, _hub_rows(name, source, source.split))
    held_out = _by_level(name, source, _hub_rows(name, source, source.held_out_split)) if source.held_out_split else {}
    return training, held_out


def _jsonl_rows(name: str, path: str) -> Iterator[Row]:
    try:
        lines = pathlib.Path(path).expanduser().read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"sources.{name}: cannot read {path}: {error.strerror}; correct the path") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"sources.{name}: {path} line {number} is no JSON: {error}; correct the line") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"sources.{name}: {path} line {number} is a {type(content).__name__}, not an object; "
                'write one {"column": value, ...} per line'
            )
        yield str(number), f"{path} line {number}", content


def _hub_rows(name: str, source: HubSource, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.subset, split=split)
    except (OSError, ValueError) as error:  # unreachable, not there, or no such subset or split: it says which
        raise ValueError(
            f"sources.{name}: cannot load split {split!r} of dataset {source.dataset!r} (subset {source.subset}): "
            f"{error}; correct dataset, subset and split, or fetch it where there is a network"
        ) from error
    for index, content in enumerate(rows):
        yield str(index), f"{source.dataset} {split} row {index}", dict(content)


def _by_level(name: str, source: JsonlSource | HubSource, rows: Iterable[Row]) -> Levels:
    levels: Levels = {}
    for key, place, content in rows:
        where = f"sources.{name}: {place}"
        level = SINGLE_LEVEL if source.level_column is None else str(_column(where, content, source, "level_column"))
        levels.setdefault(level, []).append(_question(where, key, content, source))
    return levels


def _question(where: str, key: str, content: dict[str, Any], source: JsonlSource | HubSource) -> Question:
    prompt = _column(where, content, source, "prompt_column")
    reference = _column(where, content, source, "reference_column") if source.reference_column is not None else None
    if isinstance(prompt, str) and prompt.strip():
        text, messages = prompt, (user_message(prompt, source.instruction),)
    else:
        turns = _conversation(where, prompt, source.prompt_column)
        text = "\n".join(turn.text for turn in turns)
        last = turns[-1]
        if source.instruction:
            last = Message(last.role, (*last.parts, TextPart(f"\n{source.instruction}")))
        messages = (*turns[:-1], last)
    columns = {str(column): plain(value) for column, value in content.items() if column != source.prompt_column}
    return Question(
        key=key,
        text=text,
        messages=messages,
        reference=None if reference is None else str(reference),
        columns={column: value for column, value in columns.items() if column not in RESERVED},
    )


def _conversation(where: str, prompt: Any, column: str) -> tuple[Message, ...]:
    def is_turn(turn: Any) -> bool:
        return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)

    if not (isinstance(prompt, list) and prompt and all(map(is_turn, prompt))):
        shown = repr(prompt)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(
            f"{where}: column {column!r} holds {shown}; it must be a text that is not empty, or a list of "
            '{"role": ..., "content": text}'
        )
    return tuple(Message(turn["role"], (TextPart(turn["content"]),)) for turn in prompt)


def _column(where: str, content: dict[str, Any], source: JsonlSource | HubSource, setting: str) -> Any:
    column = getattr(source, setting)
    if column not in content:
        optional = "" if setting == "prompt_column" else " (null where there is none)"
        raise ValueError(f"{where} has no column {column!r}; {nearest(column, content)}; set {setting}{optional}")
    return content[column]
