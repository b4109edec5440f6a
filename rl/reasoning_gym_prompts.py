"""This file turns reasoning_gym datasets into endless questions, and checks their names without importing them.

Importing reasoning_gym takes more than a second (it pulls in sympy and matplotlib), too long for `rl check`: names and
parameters are read from its source text instead, and the package is imported when a source is opened.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rl.questions import Question, nearest, plain, stable_number, user_message
from rl.source_config import ReasoningGymSource

ITEMS_PER_SEED = 500  # reasoning_gym's own default size: every dataset can make so many from one seed
HELD_OUT_PART = 3  # one question text in so many is held out
MAX_MISSES = 500  # items in a row on the wrong side, or already seen, after which a level counts as exhausted
OURS = ("seed", "size")

_REGISTERED = re.compile(r"register_dataset\(\s*(DATASET_NAME|\"[^\"]+\"),\s*\w+,\s*(\w+)")
_NAME = re.compile(r"^DATASET_NAME\s*=\s*\"([^\"]+)\"", re.MULTILINE)


def catalogue() -> dict[str, tuple[pathlib.Path, str]]:
    """Dataset name -> the file that registers it and the name of its configuration class; nothing is imported."""
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "a source is of kind reasoning_gym, but the package reasoning-gym is not installed; install it"
        )
    found: dict[str, tuple[pathlib.Path, str]] = {}
    for path in sorted(pathlib.Path(spec.submodule_search_locations[0]).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for name, config_class in _REGISTERED.findall(text):
            constant = _NAME.search(text)
            found[constant[1] if name == "DATASET_NAME" and constant else name.strip('"')] = (path, config_class)
    return found


def parameters(path: pathlib.Path, config_class: str) -> tuple[str, ...]:
    """The parameters of a dataset: the annotated fields of its configuration dataclass, read from its source."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fields = [
        statement.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == config_class
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    ]
    return tuple(fields)


def name_problems(name: str, source: ReasoningGymSource) -> list[str]:
    """Unknown dataset or level parameters of a source, each with the nearest names."""
    known = catalogue()
    if source.dataset not in known:
        return [
            f"sources.{name}.dataset {source.dataset!r} is no reasoning_gym dataset; {nearest(source.dataset, known)}"
        ]
    allowed = set(parameters(*known[source.dataset])) - set(OURS)
    problems = []
    for level, given in source.levels.items():
        for parameter in given:
            if parameter in OURS:
                problems.append(f"sources.{name}.levels.{level} sets {parameter!r}, which the run decides; remove it")
            elif parameter not in allowed:
                problems.append(
                    f"sources.{name}.levels.{level} sets {parameter!r}, which {source.dataset} does not have; "
                    f"{nearest(parameter, allowed)}"
                )
    return problems


class ReasoningGymLevel:
    """One level of a reasoning_gym dataset: questions without end for training, and a fixed series held out.

    A hash of the question's text decides its side, for all sources and seeds alike: nothing has to be remembered for
    training and evaluation never to share a question, also where a level has few of them.
    """

    def __init__(self, where: str, source: ReasoningGymSource, level: str, seed: int) -> None:
        self._where = where
        self._source = source
        self._level = level
        self._seed = seed
        self._datasets: dict[str, tuple[int, Any]] = {}

    def training(self, cursor: int) -> tuple[Question, int]:
        """The next training question. ValueError where the level seems to have none."""
        for index in range(cursor, cursor + MAX_MISSES):
            question = self._question("training", self._seed, index, f"{self._seed}-{index}")
            if not _is_held_out(question.text):
                return question, index + 1
        raise ValueError(
            f"{self._where}: {MAX_MISSES} questions in a row were held-out ones, so the level has hardly any others; "
            "widen its parameters"
        )

    def held_out(self) -> Iterator[Question]:
        """Distinct held-out questions until MAX_MISSES in a row bring no new one."""
        seen: set[str] = set()
        index = misses = 0
        while misses < MAX_MISSES:
            question = self._question("held_out", 0, index, str(index))
            index, misses = index + 1, misses + 1
            if _is_held_out(question.text) and question.text not in seen:
                seen.add(question.text)
                misses = 0
                yield question

    def _question(self, side: str, seed: int, index: int, key: str) -> Question:
        entry = self._dataset(side, seed, index // ITEMS_PER_SEED)[index % ITEMS_PER_SEED]
        text, answer = str(entry["question"]), entry["answer"]
        return Question(
            key=key,
            text=text,
            messages=(user_message(text, self._source.instruction),),
            reference=None if answer is None else str(answer),
            columns={"dataset": self._source.dataset, "entry": plain(entry)},
        )

    def _dataset(self, side: str, seed: int, part: int) -> Any:
        held_part, dataset = self._datasets.get(side, (-1, None))
        if held_part != part:
            dataset = self._create(stable_number(self._where, side, seed, part))
            self._datasets[side] = (part, dataset)
        return dataset

    def _create(self, seed: int) -> Any:
        import reasoning_gym

        given = self._source.levels[self._level]
        try:
            return reasoning_gym.create_dataset(self._source.dataset, seed=seed, size=ITEMS_PER_SEED, **given)
        except (AssertionError, TypeError, ValueError) as error:  # how its configurations say no
            raise ValueError(
                f"{self._where}: reasoning_gym refuses {self._source.dataset} with {given}: {error}; correct the level"
            ) from error


def _is_held_out(text: str) -> bool:
    return stable_number("held out", text.strip()) % HELD_OUT_PART == 0


def open_levels(name: str, source: ReasoningGymSource, seed: int) -> Mapping[str, ReasoningGymLevel]:
    """A source's levels, each tried once. ValueError names what reasoning_gym does not know or refuses."""
    problems = name_problems(name, source)
    if problems:
        raise ValueError("\n".join(problems))
    levels = {}
    for level in source.levels:
        levels[level] = ReasoningGymLevel(f"sources.{name}.levels.{level}", source, level, seed)
        levels[level].training(0)
    return levels
