"""This file tests which prompt of a finite level is drawn: learnable ones, not too soon again, and none never."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from rl import prompt_choice
from rl.beliefs import Belief, Feedback
from rl.curriculum_config import CurriculumSection
from rl.prompt_choice import PromptChoice
from rl.questions import KnownPrompt

G = 8
LEVEL = Belief(4.0, 6.0)
SECTION = CurriculumSection(cooldown_draws=10)


def choice_of(count: int, section: CurriculumSection = SECTION, seed: int = 0, **screened) -> PromptChoice:
    prompts = [KnownPrompt(str(index), *screened.get(f"p{index}", ())) for index in range(count)]
    return PromptChoice("file/all", prompts, section, G, seed)


class Reader:
    """Draws from a level whose prompts have these pass rates, and tells what came of it at once."""

    def __init__(self, choice: PromptChoice, pass_rates: dict[str, float], seed: int = 0) -> None:
        self.choice = choice
        self.pass_rates = pass_rates
        self.rng = random.Random(seed)
        self.number = self.informative = 0

    def draw(self, version: int = 0, explore: bool = False) -> prompt_choice.Pick:
        pick = self.choice.draw(LEVEL, version, explore, random.Random(f"draw {self.number}"))
        self.number += 1
        passed = sum(self.rng.random() < self.pass_rates[pick.key] for _ in range(G))
        self.informative += 0 < passed < G
        self.choice.observe(told(pick.key, passed / G, version))
        return pick


def told(key: str, pass_rate: float, version: int = 0) -> Feedback:
    return Feedback(
        source="file",
        level="all",
        key=key,
        pass_rate=pass_rate,
        answers=G,
        informative=0 < pass_rate < 1,
        version=version,
    )


def test_exploring_draws_alone_go_through_an_epoch_without_a_repetition() -> None:
    choice = choice_of(30)
    keys = [choice.draw(LEVEL, 0, True, random.Random(index)).key for index in range(60)]
    assert len(set(keys[:30])) == 30 and keys[30:] == keys[:30]
    other = choice_of(30, seed=1)
    assert keys[:30] != [other.draw(LEVEL, 0, True, random.Random(index)).key for index in range(30)]


def test_no_prompt_returns_before_its_cooldown() -> None:
    reader = Reader(choice_of(40), {str(index): 0.5 for index in range(40)})
    keys = [reader.draw().key for _ in range(300)]
    last: dict[str, int] = {}
    for number, key in enumerate(keys):
        assert number - last.get(key, -99) > 10
        last[key] = number


def test_the_cooldown_is_at_most_a_quarter_of_the_level() -> None:
    reader = Reader(choice_of(3, CurriculumSection()), dict.fromkeys("012", 0.5))
    assert {reader.draw().key for _ in range(12)} == set("012")
    alone = Reader(choice_of(1, CurriculumSection()), {"0": 0.5})
    assert [alone.draw().key for _ in range(4)] == ["0"] * 4


def test_where_all_prompts_teach_alike_the_epoch_comes_first() -> None:
    reader = Reader(choice_of(60), {str(index): 0.5 for index in range(60)})
    assert len({reader.draw().key for _ in range(60)}) > 45


@pytest.mark.parametrize("seed", range(3))
def test_learnable_prompts_among_trivial_and_hopeless_ones_are_found_and_drawn_again(seed: int) -> None:
    pass_rates = {str(index): 0.5 if index % 4 == 0 else float(index % 2) for index in range(200)}
    reader = Reader(choice_of(200, SECTION, seed), pass_rates, seed)
    for _ in range(300):
        reader.draw(explore=reader.number % 20 == 19)
    before = reader.informative
    for _ in range(200):
        reader.draw(explore=reader.number % 20 == 19)
    assert reader.informative - before > 0.7 * 200, "a quarter of the prompts is learnable"


def test_every_prompt_is_drawn_when_the_level_has_explored_as_often_as_it_has_prompts() -> None:
    pass_rates = {str(index): 0.5 if index < 5 else 0.0 for index in range(50)}
    reader = Reader(choice_of(50), pass_rates)
    drawn = Counter(reader.draw(explore=number % 4 == 3).key for number in range(4 * 50))
    assert set(drawn) == set(pass_rates)


def test_a_mastered_prompt_rests_until_it_is_looked_at_again() -> None:
    choice = choice_of(24)
    for _ in range(2):
        choice.observe(told("7", 1.0))
    assert all(choice.draw(LEVEL, 3, False, random.Random(index)).key != "7" for index in range(200))
    assert choice.metrics("file/all")["curriculum/retired/file/all"].value == 1
    for key in set(map(str, range(24))) - {"7"}:
        choice.observe(told(key, 0.0, 50))
    later = [choice.draw(LEVEL, 50, False, random.Random(index)) for index in range(200)]
    assert {pick.why for pick in later if pick.key == "7"} == {"reprobe"}


def test_an_exploring_draw_looks_at_mastered_prompts_too() -> None:
    choice = choice_of(24)
    for _ in range(2):
        choice.observe(told("7", 1.0))
    drawn = [choice.draw(LEVEL, 3, True, random.Random(index)) for index in range(24)]
    assert [pick.why for pick in drawn if pick.key == "7"] == ["reprobe"]


def test_one_perfect_group_is_not_mastery() -> None:
    choice = choice_of(4)
    choice.observe(told("2", 1.0))
    assert choice.metrics("file/all")["curriculum/retired/file/all"].value == 0


def test_a_level_that_is_mastered_altogether_still_gives_prompts() -> None:
    reader = Reader(choice_of(6), {str(index): 1.0 for index in range(6)})
    picks = [reader.draw() for _ in range(60)]
    assert {pick.key for pick in picks[30:]} == {str(index) for index in range(6)} and picks[-1].why == "reprobe"


def test_a_belief_starts_at_its_level_and_at_what_screening_found_and_fades_slowly() -> None:
    choice = choice_of(3, SECTION, p1=(6.0, 8.0))
    assert choice.belief("0", LEVEL, 0).mean == pytest.approx(0.4)
    assert choice.belief("1", LEVEL, 0).mean == pytest.approx((6 + 1.6) / 12)
    choice.observe(told("0", 1.0))
    assert choice.belief("0", LEVEL, 0).mean == pytest.approx((8 + 1.6) / 12)
    far = choice.belief("0", LEVEL, 100)
    assert far.mean == pytest.approx((8 * 0.99**100 + 1.6) / (8 * 0.99**100 + 4))


def test_the_order_of_late_feedback_changes_nothing() -> None:
    feedback = [told(str(index % 12), (index % 5) / 4, index // 3) for index in range(60)]
    picks = []
    for shuffled in (False, True):
        choice = choice_of(12)
        drawn = [choice.draw(LEVEL, 0, False, random.Random(index)).key for index in range(12)]
        assert len(drawn) == 12
        order = list(feedback)
        if shuffled:
            random.Random(1).shuffle(order)
        for each in order:
            choice.observe(each)
        picks.append([choice.draw(LEVEL, 25, False, random.Random(index)).key for index in range(40)])
    assert picks[0] == picks[1]


@pytest.mark.parametrize("stop", [0, 1, 9, 70])
def test_a_state_saved_midway_continues_with_the_same_prompts(stop: int) -> None:
    reader = Reader(choice_of(20), {str(index): index / 20 for index in range(20)})
    for _ in range(stop):
        reader.draw(version=reader.number // 8, explore=reader.number % 10 == 9)
    restored = choice_of(20)
    restored.load_state_dict(json.loads(json.dumps(reader.choice.state_dict())))
    for index in range(60):
        picks = [each.draw(LEVEL, 9, index % 9 == 0, random.Random(index)) for each in (reader.choice, restored)]
        assert picks[0] == picks[1]
        for each in (reader.choice, restored):
            each.observe(told(picks[0].key, 0.25 * (index % 5), 9))
    assert reader.choice.state_dict() == restored.state_dict()


def test_a_state_of_other_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="chose among 6 prompts of file/all, now there are 5"):
        choice_of(5).load_state_dict(choice_of(6).state_dict())


def test_what_is_remembered_is_bounded_and_the_least_recently_drawn_is_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(prompt_choice, "MAX_REMEMBERED", 15)
    reader = Reader(choice_of(60), {str(index): 0.5 for index in range(60)})
    keys = [reader.draw(explore=True).key for _ in range(40)]
    assert list(reader.choice.state_dict()["evidence"]) == keys[-15:]
