"""This file hands out prompts: the next one of a source and level, rendered for the model, and the held-out ones."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rl.metrics import Metrics, last
from rl.prompt_files import FileLevel, Levels, read_hub, read_jsonl
from rl.questions import KnownPrompt, Question, QuestionStream
from rl.reasoning_gym_prompts import name_problems, open_levels
from rl.screening import sift
from rl.source_config import HubSource, JsonlSource, ReasoningGymSource, Source
from rl.trajectory import Message, Prompt, TextPart

Render = Callable[[tuple[Message, ...]], tuple[int, ...]]
Streams = Mapping[str, Mapping[str, QuestionStream]]

MAX_REFUSED_IN_A_ROW = 100
SHOWN = 5  # over-long prompts that an error names
REMEDY = "raise model.max_context_tokens, lower rollout.max_tokens, or take the long ones out"


class PromptSources:
    """Every source with its levels, and a cursor into each: reproducible, and resumable from the cursors alone.

    levels: source -> its level names. refused: over-long questions that an endless source made and that were passed
    over. in_held_out: rows of a file that are not trained on because a held-out row asks the same. known: the prompts
    of finite levels, by source and level. by_difficulty counts those that a source's `difficulty` left out, unscreened
    those that it knows nothing of.
    """

    def __init__(self, render: Render, max_prompt_tokens: int, system_prompt: str | None) -> None:
        self.levels: dict[str, tuple[str, ...]] = {}
        self.refused: Counter[str] = Counter()
        self.in_held_out: Counter[str] = Counter()
        self.by_difficulty: Counter[str] = Counter()
        self.unscreened: Counter[str] = Counter()
        self.known: dict[str, dict[str, tuple[KnownPrompt, ...]]] = {}
        self._render = render
        self._max_prompt_tokens = max_prompt_tokens
        self._system = (Message("system", (TextPart(system_prompt),)),) if system_prompt else ()
        self._streams: Streams = {}
        self._cursors: dict[str, dict[str, int]] = {}

    @classmethod
    def open(
        cls,
        sources: Mapping[str, Source],
        render: Render,
        max_prompt_tokens: int,
        seed: int,
        system_prompt: str | None = None,
    ) -> PromptSources:
        """Open all sources; `render` turns messages into token ids [P] with the generation prompt.

        ValueError where a source cannot be read, names what does not exist, or holds a prompt above max_prompt_tokens.
        """
        opened = cls(render, max_prompt_tokens, system_prompt)
        files: dict[str, tuple[Levels, Levels]] = {}
        screened: dict[str, Mapping[str, KnownPrompt]] = {}
        streams: dict[str, Mapping[str, QuestionStream]] = {}
        for name, source in sources.items():
            if isinstance(source, ReasoningGymSource):
                streams[name] = open_levels(name, source, seed)
            else:
                training, held_out = _read(name, source)
                sifted = sift(name, source, training)
                opened.by_difficulty[name], opened.unscreened[name] = sifted.left_out, sifted.unscreened
                files[name], screened[name] = (sifted.levels, held_out), sifted.screened
        held_out = (question for _, levels in files.values() for level in levels.values() for question in level)
        asked = {question.text.strip() for question in held_out}
        for name, (training, held_out) in files.items():
            levels = opened._file_levels(name, training, held_out, asked, seed)
            opened.known[name] = {
                level: tuple(screened[name].get(each.key, KnownPrompt(each.key)) for each in stream.questions)
                for level, stream in levels.items()
            }
            streams[name] = levels
        opened._streams = streams
        opened.levels = {name: tuple(streams[name]) for name in sources}
        opened._rewind()
        for name, levels in opened.levels.items():
            for level in levels:
                opened.next(name, level)  # a level whose prompts never fit is refused now, not in mid-run
        opened._rewind()
        return opened

    def _rewind(self) -> None:
        self._cursors = {name: dict.fromkeys(levels, 0) for name, levels in self._streams.items()}
        self.refused.clear()

    def next(self, source: str, level: str, key: str | None = None) -> Prompt:
        """The next training prompt, or that of `key` where a finite level is asked for one of its `known`.

        ValueError where an endless source makes only over-long ones.
        """
        stream = self._streams[source][level]
        if key is not None:
            assert isinstance(stream, FileLevel), "only finite levels know their prompts by key"
            return self._prompt(source, level, stream.question(key))
        prompt = None
        for _ in range(MAX_REFUSED_IN_A_ROW):
            question, self._cursors[source][level] = stream.training(self._cursors[source][level])
            prompt = self._prompt(source, level, question)
            if len(prompt.token_ids) <= self._max_prompt_tokens:
                return prompt
            self.refused[source] += 1
        assert prompt is not None
        raise ValueError(
            f"{MAX_REFUSED_IN_A_ROW} prompts in a row of {source}/{level} are longer than {self._max_prompt_tokens} "
            f"tokens, the last, {prompt.prompt_id}, has {len(prompt.token_ids)}; {REMEDY}"
        )

    def questions(self, source: str, level: str) -> Sequence[Question]:
        """All training questions of a finite level; none of an endless one."""
        stream = self._streams[source][level]
        return stream.questions if isinstance(stream, FileLevel) else ()

    def held_out(self, source: str, level: str, count: int) -> list[Prompt]:
        """At most `count` held-out prompts, the same for every seed: fewer where the level has no more distinct ones.

        None of them is ever trained on, whatever is drawn. Empty for a file without a held-out file or split.
        """
        prompts: list[Prompt] = []
        for question in self._streams[source][level].held_out():
            if len(prompts) == count:
                break
            prompt = self._prompt(source, level, question, "held_out-")
            if len(prompt.token_ids) <= self._max_prompt_tokens:
                prompts.append(prompt)
        return prompts

    def metrics(self) -> Metrics:
        """How many questions were passed over, by source; nothing is left out silently."""
        metrics: Metrics = {}
        for source in self.levels:
            metrics[f"prompts/refused_too_long/{source}"] = last(self.refused[source])
            metrics[f"prompts/left_out_as_held_out/{source}"] = last(self.in_held_out[source])
            metrics[f"prompts/left_out_by_difficulty/{source}"] = last(self.by_difficulty[source])
            metrics[f"prompts/unscreened/{source}"] = last(self.unscreened[source])
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The cursors, JSON-able."""
        cursors = {source: dict(levels) for source, levels in self._cursors.items()}
        return {"cursors": cursors, "refused": dict(self.refused)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the cursors stood. ValueError where they are of other sources or levels."""
        saved = {source: set(levels) for source, levels in state["cursors"].items()}
        current = {source: set(levels) for source, levels in self.levels.items()}
        if saved != current:
            raise ValueError(
                f"the saved run drew from the levels {saved}, the config has {current}; resume with the sources of the "
                "saved run"
            )
        self._cursors = {source: dict(levels) for source, levels in state["cursors"].items()}
        self.refused = Counter(state["refused"])

    def _prompt(self, source: str, level: str, question: Question, side: str = "") -> Prompt:
        messages = (*self._system, *question.messages)
        return Prompt(
            prompt_id=f"{source}/{level}/{side}{question.key}",
            source=source,
            level=level,
            messages=messages,
            reference=question.reference,
            columns=question.columns,
            token_ids=tuple(self._render(messages)),
        )

    def _file_levels(
        self, name: str, training: Levels, held_out: Levels, asked: set[str], seed: int
    ) -> Mapping[str, FileLevel]:
        unknown = set(held_out) - set(training)
        if unknown:
            raise ValueError(
                f"sources.{name}: the held-out rows have the levels {sorted(unknown)}, the training rows only "
                f"{sorted(training)}; give both the same levels"
            )
        streams: dict[str, FileLevel] = {}
        too_long: list[Prompt] = []
        for level, questions in training.items():
            kept = [question for question in questions if question.text.strip() not in asked]
            self.in_held_out[name] += len(questions) - len(kept)
            if not kept:
                raise ValueError(
                    f"sources.{name}: all {len(questions)} rows of level {level} are held-out ones as well"
                )
            too_long += self._too_long(name, level, kept, "")
            too_long += self._too_long(name, level, held_out.get(level, []), "held_out-")
            streams[level] = FileLevel(f"{name}/{level}", kept, held_out.get(level, []), seed)
        if too_long:
            shown = ", ".join(f"{prompt.prompt_id} ({len(prompt.token_ids)} tokens)" for prompt in too_long[:SHOWN])
            more = f" and {len(too_long) - SHOWN} more" if len(too_long) > SHOWN else ""
            raise ValueError(
                f"sources.{name}: {len(too_long)} prompts are longer than {self._max_prompt_tokens} tokens: "
                f"{shown}{more}; {REMEDY}"
            )
        return streams

    def _too_long(self, name: str, level: str, questions: Iterable[Question], side: str) -> list[Prompt]:
        prompts = (self._prompt(name, level, question, side) for question in questions)
        return [prompt for prompt in prompts if len(prompt.token_ids) > self._max_prompt_tokens]


def _read(name: str, source: JsonlSource | HubSource) -> tuple[Levels, Levels]:
    training, held_out = read_jsonl(name, source) if isinstance(source, JsonlSource) else read_hub(name, source)
    if not training:
        raise ValueError(f"sources.{name} holds no rows to train on; correct its path or split")
    return training, held_out


def validate(sources: Mapping[str, Source]) -> list[str]:
    """What is wrong with the sources as far as can be told in a moment: without tokenizer, network and heavy imports.

    Level values that a reasoning_gym dataset refuses, and splits of hub datasets, show when the sources are opened.
    """
    problems: list[str] = []
    for name, source in sources.items():
        try:
            if isinstance(source, ReasoningGymSource):
                problems += name_problems(name, source)
            elif isinstance(source, JsonlSource):
                training, _ = _read(name, source)
                sift(name, source, training)
            elif source.dataset.startswith(("/", ".", "~")) and not pathlib.Path(source.dataset).expanduser().exists():
                problems.append(f"sources.{name}.dataset {source.dataset} does not exist; correct the path")
        except ValueError as error:
            problems.append(str(error))
    return problems


def left_out_by_difficulty(sources: Mapping[str, Source]) -> dict[str, tuple[int, int]]:
    """Of each file with a `difficulty`: what it leaves out, of how many prompts. ValueError as `validate` tells."""
    counts: dict[str, tuple[int, int]] = {}
    for name, source in sources.items():
        if isinstance(source, JsonlSource) and source.difficulty is not None:
            training, _ = _read(name, source)
            counts[name] = (sift(name, source, training).left_out, sum(map(len, training.values())))
    return counts
