"""This file writes the prompts of the comparison with TRL: a file that both systems train on, one that judges both."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rl.prompts import PromptSources
from rl.source_config import ReasoningGymSource
from rl.trajectory import Prompt

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SOURCES = {
    "sums": ReasoningGymSource(
        kind="reasoning_gym",
        dataset="chain_sum",
        levels={
            "one_digit": ONE_DIGIT,
            "three_terms": {**ONE_DIGIT, "min_terms": 3, "max_terms": 3},
            "two_digits": {**ONE_DIGIT, "min_digits": 2, "max_digits": 2},
        },
    ),
    "products": ReasoningGymSource(kind="reasoning_gym", dataset="products", levels={"one_digit": ONE_DIGIT}),
}


def write_prompts(training: Path, held_out: Path, counts: tuple[int, int], seed: int) -> None:
    """Write so many rows to train on, of all levels in turn, and at most so many per level to judge by.

    A row is {"prompt": chat turns, "answer": text, "level": text}; no held-out question is ever trained on.
    """
    # Whether a prompt fits is the model's business: both systems refuse or cut what is longer than their context.
    opened = PromptSources.open(SOURCES, lambda messages: (), 1, seed)
    places = [(source, level) for source, levels in opened.levels.items() for level in levels]
    trained, judged = counts
    _write(training, (opened.next(*places[index % len(places)]) for index in range(trained)))
    _write(held_out, (prompt for place in places for prompt in opened.held_out(*place, judged)))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that write_prompts wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, prompts: Iterable[Prompt]) -> None:
    path.write_text("".join(json.dumps(_row(prompt)) + "\n" for prompt in prompts), encoding="utf-8")


def _row(prompt: Prompt) -> dict[str, Any]:
    turns = [{"role": message.role, "content": message.text} for message in prompt.messages]
    return {"prompt": turns, "answer": prompt.reference, "level": f"{prompt.source}/{prompt.level}"}
