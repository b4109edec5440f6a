"""This file hands out prompts: the next one of a source and level, rendered for the model, and the held-out ones."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rl import prompt_files, reasoning_gym_prompts
from rl.config import HubSource, JsonlSource, ReasoningGymSource, Source
from rl.metrics import Metrics, last
from rl.questions import Question, QuestionStream
from rl.trajectory import Message, Prompt, TextPart

Render = Callable[[tuple[Message, ...]], tuple[int, ...]]

MAX_REFUSED_IN_A_ROW = 100
SHOWN = 5  # over-long prompts that an error names


class PromptSources:
    """Every source with its levels, and a cursor into each: reproducible, and resumable from the cursors alone.

    levels: source -> its level names. refused counts over-long questions that an endless source made and that were
    passed over; in_held_out counts rows of a file that are not trained on because the held-out rows ask the same.
    """

    def __init__(self, streams: Mapping[str, Mapping[str, QuestionStream]], render: Callable[..., Prompt], limit: int):
        self.levels: dict[str, tuple[str, ...]] = {source: tuple(levels) for source, levels in streams.items()}
        self.refused: Counter[str] = Counter()
        self.in_held_out: Counter[str] = Counter()
        self._streams = streams
        self._render = render
        self._max_prompt_tokens = limit
        self._cursors = {source: dict.fromkeys(levels, 0) for source, levels in streams.items()}
