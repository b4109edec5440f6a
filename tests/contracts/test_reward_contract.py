"""This file is the contract every reward keeps, built-in or plugin, whatever a model writes (rewards/base.py).

It judges in a child process, as a run does. A reward needs no special treatment to pass: a Failure is allowed wherever
it has nothing to judge by; a hang, a crash, a judgement that changes or a child that grows heavy is not.
"""

from __future__ import annotations

import math

import pytest

from rewards.base import Score
from rewards.loading import load, resolve
from rewards.scorer import JudgeRequest, PartResult, RewardSpec, Scorer

PARAMS = {"format": {"tags": ["answer"]}}
ENTRY = {"question": "What is 2 + 2?", "answer": "4", "metadata": {"difficulty": {}}}
COLUMNS = {"dataset": "chain_sum", "entry": ENTRY, "answer": "4", "solution": "4", "level": "easy"}
COMPLETIONS = {
    "right": "<answer>4</answer>",
    "wrong": "<answer>5</answer>",
    "empty": "",
    "truncated": "<answer>\\boxed{\\frac{1}{",
    "not ASCII": "答えは４です 😀 \u0000 \u202e",
    "long": "4 " * 20_000,
    "braces and percent signs": "%s {0} {} \\ $ <answer> </answer><answer>",
}


async def judge_all(use: str, reference: str | None) -> dict[str, PartResult]:
    scorer = Scorer({"reward": RewardSpec(use, timeout_s=20.0, params=PARAMS.get(use, {}))}, workers=1)
    await scorer.start()
    try:
        requests = [
            JudgeRequest("What is 2 + 2?", text, reference, COLUMNS, ("reward",)) for text in COMPLETIONS.values()
        ]
        return dict(zip(COMPLETIONS, [parts[0] for parts in await scorer.judge_group(requests)], strict=True))
    finally:
        await scorer.close()


async def test_a_reward_judges_anything_a_model_may_write(use):
    for what, part in (await judge_all(use, "4")).items():
        assert part.failure not in {"timeout", "memory", "crash", "import"}, f"{what}: {part.message}"
        assert (part.value is None) == (part.failure is not None), what
        assert part.value is None or math.isfinite(part.value), what
        assert part.version, "a judgement names the content it came from"


async def test_a_reward_survives_a_prompt_without_a_reference(use):
    for what, part in (await judge_all(use, None)).items():
        assert part.failure in {None, "none", "exception"}, f"{what}: {part.failure} {part.message}"


async def test_a_reward_judges_the_same_completion_alike_twice(use):
    first, second = await judge_all(use, "4"), await judge_all(use, "4")
    assert [(part.value, part.failure, part.parts) for part in first.values()] == [
        (part.value, part.failure, part.parts) for part in second.values()
    ]


async def test_a_reward_tells_the_right_answer_from_an_empty_one(use):
    parts = await judge_all(use, "4")
    right, empty = parts["right"].value, parts["empty"].value
    assert right is not None and (empty is None or right > empty), f"right {right}, empty {empty}"


def test_a_reward_says_in_its_docstring_what_it_judges(use):
    loaded = load(use, PARAMS.get(use, {}))
    assert loaded.function.__doc__, f"{resolve(use)} has no docstring"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_score_without_parts_shares_none_with_another(value):
    assert Score(value).parts is not Score(value).parts
