"""This file tests the built-ins: rewards/reasoning_gym_scorer.py, rewards/math_answer.py and rewards/format_tags.py."""

from __future__ import annotations

import pytest
import reasoning_gym

from rewards import format_tags, math_answer, reasoning_gym_scorer
from rewards.base import NAME_ATTRIBUTE
from rewards.loading import BUILT_INS, load
from rewards.reasoning_gym_scorer import last_number, reasoning_gym_score


@pytest.mark.parametrize("name", BUILT_INS)
def test_a_built_in_bears_the_name_it_is_registered_under(name):
    assert getattr(load(name, {}).function, NAME_ATTRIBUTE) == name


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4 - 1 - 7 = -4", "-4"),
        ("it is 10-3", "3"),
        ("so 1,234,567.50.", "1234567.50"),
        ("1,2 and 3.", "3"),
        ("+5", "5"),
        ("=.5", ".5"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_is_read_with_its_sign_and_without_separators(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize("dataset", ["chain_sum", "basic_arithmetic", "gcd", "letter_counting"])
def test_reasoning_gym_gives_its_own_answer_full_score_and_another_number_less(dataset):
    for entry in reasoning_gym.create_dataset(dataset, size=5, seed=3):
        right = reasoning_gym_score(f"I think it is {entry['answer']}.", dataset, entry)
        assert right.value == right.parts["correct"] == 1.0
        wrong = reasoning_gym_score("It is 987654321.", dataset, entry)
        assert wrong.value < 1.0 and wrong.parts["correct"] == 0.0
        assert reasoning_gym_score("It is 987654321.", dataset, entry, exact=True).value == 0.0


def test_reasoning_gym_reads_the_answer_from_tags_or_takes_the_whole():
    entry = {"question": "", "answer": "cat", "metadata": {}}
    assert reasoning_gym_score("a dog? <answer> cat </answer>", "chain_sum", entry, "answer_tag").value == 1.0
    assert reasoning_gym_score(" cat\n", "chain_sum", entry, "whole").value == 1.0
    assert reasoning_gym_score("no tags", "chain_sum", entry, "answer_tag").value == 0.0


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        ("so it is \\boxed{0.5}", "1/2", 1.0),
        ("$x+1$", "1+x", 1.0),
        ("the answer is 18", "she sells 9 * 2 = 18 eggs #### 18", 1.0),
        ("the answer is 9", "she sells 9 * 2 = 18 eggs #### 18", 0.0),
        ("\\boxed{3}", "We add $1+2$ and get \\boxed{3}.", 1.0),
        ("about 7", "42", 0.0),
        ("<answer>42</answer>", "42", 1.0),
        ("7 " * 30_000 + "so it is $42$", "42", 1.0),
        ("", "42", 0.0),
    ],
)
def test_math_compares_by_value_not_by_spelling(completion, reference, value):
    assert math_answer.math_answer(completion, reference) == value


def test_math_without_a_reference_has_no_judgement():
    assert math_answer.math_answer("42", None) is None
    with pytest.raises(ValueError, match="no mathematics"):
        math_answer.math_answer("42", "")


def test_math_lets_a_timeout_be_a_timeout(monkeypatch):
    def endless(*_, **__):
        raise math_answer.TimeoutException("Timeout during comparison")

    monkeypatch.setattr(math_answer, "verify", endless)
    with pytest.raises(TimeoutError, match="comparison"):
        math_answer.math_answer("42", "42")


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>a\nb</think> <answer>4</answer>", 1.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a</think><think>a</think><answer>4</answer>", 0.0),
        ("<think></think><answer>4</answer>", 0.0),
        ("4", 0.0),
    ],
)
def test_format_wants_each_tag_once_and_in_order(completion, value):
    assert format_tags.format_tags(completion, tags=("think", "answer")).value == value


def test_format_matches_a_pattern_against_the_whole_answer():
    assert format_tags.format_tags(" 42\n", pattern=r"\d+").value == 1.0
    assert format_tags.format_tags("it is 42", pattern=r"\d+").value == 0.0
    with pytest.raises(ValueError, match="neither tags nor a pattern"):
        format_tags.format_tags("42")


def test_reasoning_gym_scorers_are_built_once():
    assert reasoning_gym_scorer.scorer_of("arc_agi") == reasoning_gym_scorer.scorer_of("arc_agi")
