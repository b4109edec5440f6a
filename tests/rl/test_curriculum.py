"""This file tests that the curriculum follows what is learnable, keeps its shares and floors, and repeats itself."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.chooser import Choice
from rl.curriculum import Curriculum
from rl.curriculum_config import CurriculumSection
from rl.questions import KnownPrompt

GROUP_SIZE = 8
LADDER = {"trivial": 0.99, "easy": 0.4, "hard": 0.01, "hopeless": 1e-6}
BAND = CurriculumSection()
UNIFORM = CurriculumSection(name="uniform")


def curriculum_over(levels: dict[str, tuple[str, ...]], section: CurriculumSection = BAND, seed: int = 0, **weights):
    return Curriculum(levels, {source: weights.get(source, 1.0) for source in levels}, section, GROUP_SIZE, seed)


class Policy:
    """A simulated policy on one source: a pass rate per level, group reports that arrive LATE groups after the draw."""

    LATE = 16

    def __init__(self, curriculum: Curriculum, seed: int = 0) -> None:
        self.curriculum = curriculum
        self.rng = random.Random(seed)
        self.logits = {level: math.log(p / (1 - p)) for level, p in LADDER.items()}
        self.in_flight: deque[tuple[str, int, int]] = deque()
        self.version = self.drawn = self.informative = 0

    def pass_rate(self, level: str) -> float:
        return 1 / (1 + math.exp(-self.logits[level]))

    def one_group(self) -> Choice:
        choice = self.curriculum.draw(self.version)
        passed = sum(self.rng.random() < self.pass_rate(choice.level) for _ in range(GROUP_SIZE))
        self.in_flight.append((choice.level, passed, self.version))
        self.drawn += 1
        if len(self.in_flight) > self.LATE:
            level, passed, version = self.in_flight.popleft()
            informative = 0 < passed < GROUP_SIZE
            self.curriculum.observe("sums", level, passed / GROUP_SIZE, informative, version)
            self.informative += informative
            if self.informative and informative and self.informative % 8 == 0:
                self.version += 1
        return choice

    def draws(self, count: int) -> Counter[str]:
        return Counter(self.one_group().level for _ in range(count))

    def learn(self, level: str, pass_rate: float) -> None:
        self.logits[level] = math.log(pass_rate / (1 - pass_rate))


def policy(section: CurriculumSection = BAND, seed: int = 0) -> Policy:
    return Policy(curriculum_over({"sums": tuple(LADDER)}, section, seed), seed)


@pytest.mark.parametrize("seed", range(5))
def test_draws_concentrate_on_the_level_in_the_band(seed: int) -> None:
    simulated = policy(seed=seed)
    simulated.draws(100)
    late = simulated.draws(400)
    assert late["easy"] > 0.7 * 400
    assert min(late[level] for level in LADDER) >= 5, "the floor still probes every level"


@pytest.mark.parametrize("seed", range(5))
def test_draws_move_on_as_the_policy_improves(seed: int) -> None:
    simulated = policy(seed=seed)
    simulated.draws(300)
    simulated.learn("easy", 0.995)
    simulated.learn("hard", 0.4)
    simulated.draws(250)
    later = simulated.draws(300)
    assert later["hard"] > 0.6 * 300 > later["easy"] * 3


@pytest.mark.parametrize("seed", range(5))
def test_a_level_that_jumps_from_hopeless_to_learnable_is_noticed_within_160_groups(seed: int) -> None:
    simulated = policy(seed=seed)
    while simulated.version < 30:
        simulated.one_group()
    simulated.learn("hopeless", 0.4)
    start = simulated.drawn
    while simulated.curriculum.pass_rates()["sums"]["hopeless"] < BAND.band_low:
        simulated.one_group()
        assert simulated.drawn - start <= 160


def test_more_groups_are_informative_than_with_uniform_draws() -> None:
    informative = {}
    for section in (BAND, UNIFORM):
        simulated = policy(section)
        simulated.draws(600)
        informative[section.name] = simulated.informative
    assert informative["band"] > 1.5 * informative["uniform"]


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=5), start=st.integers(0, 50), length=st.integers(1, 200)
)
@settings(max_examples=60, deadline=None)
def test_source_weights_hold_over_any_window(weights: list[float], start: int, length: int) -> None:
    names = [f"source{index}" for index in range(len(weights))]
    curriculum = curriculum_over(dict.fromkeys(names, ("all",)), **dict(zip(names, weights, strict=True)))
    drawn = [curriculum.draw(0).source for _ in range(start + length)][start:]
    for name, weight in zip(names, weights, strict=True):
        assert abs(drawn.count(name) - length * weight / sum(weights)) <= len(weights)


@given(
    beliefs=st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from([0.0, 0.5, 1.0])), max_size=60),
    fraction=st.sampled_from([0.05, 0.1, 0.3, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_no_level_waits_longer_than_the_exploration_floor_allows(beliefs: list[tuple[str, float]], fraction) -> None:
    curriculum = curriculum_over({"only": tuple("abcde")}, CurriculumSection(exploration_fraction=fraction))
    for level, pass_rate in beliefs:
        curriculum.observe("only", level, pass_rate, pass_rate == 0.5, version=0)
    drawn = [curriculum.draw(0).level for _ in range(500)]
    for level in "abcde":
        positions = [-1, *(index for index, name in enumerate(drawn) if name == level), len(drawn)]
        longest_gap = max(after - before for before, after in zip(positions, positions[1:], strict=False))
        assert longest_gap <= 5 / fraction + 1


def test_uniform_draws_ignore_the_beliefs() -> None:
    drawn = policy(UNIFORM).draws(800)
    assert all(150 < drawn[level] < 250 for level in LADDER)


evidence = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 12)), min_size=1, max_size=12)


@given(evidence=evidence, shuffle=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_evidence_is_discounted_by_the_version_it_was_sampled_at_and_not_by_its_arrival(evidence, shuffle) -> None:
    late = list(evidence)
    shuffle.shuffle(late)
    rates = []
    for order in (evidence, late):
        curriculum = curriculum_over({"only": ("all",)})
        for pass_rate, version in order:
            curriculum.observe("only", "all", pass_rate, True, version)
        rates.append(curriculum.pass_rates()["only"]["all"])
    weights = [BAND.discount_per_version**-version for _, version in evidence]
    expected = sum(w * p for w, (p, _) in zip(weights, evidence, strict=True)) / sum(weights)
    assert rates == [pytest.approx(expected), pytest.approx(expected)]


def test_the_same_seed_and_history_give_the_same_draws_and_another_seed_gives_others() -> None:
    runs = [[(c.source, c.level, c.why) for c in (simulated.one_group() for _ in range(200))] for simulated in
            (policy(seed=3), policy(seed=3), policy(seed=4))]  # fmt: skip
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("stop", [0, 1, 37, 150])
def test_a_state_saved_midway_continues_with_the_same_draws(stop: int) -> None:
    simulated = policy()
    simulated.draws(stop)
    restored = curriculum_over({"sums": tuple(LADDER)})
    restored.load_state_dict(json.loads(json.dumps(simulated.curriculum.state_dict())))
    for index in range(100):
        assert simulated.curriculum.draw(9) == restored.draw(9)
        for curriculum in (simulated.curriculum, restored):
            curriculum.observe("sums", "hard", 0.25 * (index % 3), index % 3 > 0, index // 8)
    assert simulated.curriculum.state_dict() == restored.state_dict()


def test_a_state_of_other_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="knows the levels .*easy.* the config has .*harder"):
        curriculum_over({"sums": ("harder",)}).load_state_dict(policy().curriculum.state_dict())


def test_groups_without_signal_stop_the_run_with_the_pass_rates() -> None:
    curriculum = curriculum_over({"sums": ("a", "b")}, CurriculumSection(max_uninformative_steps=2))
    for _ in range(7):
        curriculum.observe("sums", "a", 0.0, False, 0)
    curriculum.observe("sums", "a", None, False, 0)
    curriculum.check_signal(groups_per_step=4)
    curriculum.observe("sums", "a", 0.0, False, 0)
    with pytest.raises(ValueError, match=r"8 groups in a row .*2 x .*4 = 8.*sums/a 0\.00, sums/b unseen"):
        curriculum.check_signal(groups_per_step=4)
    curriculum.observe("sums", "b", 0.5, True, 0)
    curriculum.check_signal(groups_per_step=4)


def test_a_hopeless_level_does_not_look_learnable_again_for_no_other_reason_than_time() -> None:
    curriculum = curriculum_over({"sums": ("easy", "hopeless")}, CurriculumSection(exploration_fraction=0))
    for _ in range(10):
        curriculum.observe("sums", "easy", 0.5, True, 0)
        curriculum.observe("sums", "hopeless", 0.0, False, 0)
    assert sum(curriculum.draw(60).level == "hopeless" for _ in range(200)) <= 4


@given(informs=st.lists(st.booleans(), min_size=1, max_size=400), factor=st.integers(1, 4), groups=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_step_never_costs_more_refills_than_its_bound(informs: list[bool], factor: int, groups: int) -> None:
    section = CurriculumSection(max_refill_factor=factor, max_uninformative_steps=1000)
    curriculum = curriculum_over({"sums": ("a", "b")}, section)
    drawn = trained = 0
    since_step: list[bool] = []
    for informative in informs:
        drawn += 1
        curriculum.observe("sums", curriculum.draw(trained).level, 0.5 if informative else 0.0, informative, trained)
        since_step.append(informative)
        if since_step.count(False) > factor * groups:
            with pytest.raises(ValueError, match=rf"drawn anew.* {factor} x .*{groups} = {factor * groups}\).*sums/a"):
                curriculum.check_signal(groups)
            return
        curriculum.check_signal(groups)
        if since_step.count(True) == groups:
            assert len(since_step) <= groups + factor * groups
            trained, since_step = trained + 1, []
            curriculum.step_made()
    assert drawn <= (trained + 1) * groups * (1 + factor)


def test_a_failed_judgement_is_no_evidence() -> None:
    curriculum = curriculum_over({"sums": ("a",)})
    curriculum.observe("sums", "a", None, False, 0)
    assert curriculum.pass_rates() == {"sums": {}}


def test_metrics_show_beliefs_and_draws_of_every_level() -> None:
    curriculum = curriculum_over({"sums": ("a", "b")})
    level = curriculum.draw(0).level
    curriculum.observe("sums", "a", 0.25, True, 0)
    metrics = {name: metric.value for name, metric in curriculum.metrics().items()}
    assert metrics[f"curriculum/draws/sums/{level}"] == 1
    assert metrics["curriculum/pass_rate/sums/a"] == 0.25
    assert metrics["curriculum/informative_fraction/sums/a"] == 1
    assert "curriculum/pass_rate/sums/b" not in metrics
    assert metrics[f"curriculum/draws_since_last/sums/{level}"] == 0 and metrics["curriculum/lent/sums"] == 0
    other = {"a": "b", "b": "a"}[level]
    assert metrics[f"curriculum/draws_since_last/sums/{other}"] == 1
    assert metrics["curriculum/refills_since_step/groups"] == 0


def test_every_draw_says_why_with_its_numbers() -> None:
    curriculum = curriculum_over({"sums": ("a", "b")})
    for _ in range(4):
        curriculum.observe("sums", "a", 0.5, True, 0)
        curriculum.observe("sums", "b", 0.0, False, 0)
    choices = [curriculum.draw(1) for _ in range(40)]
    assert {choice.why for choice in choices} == {"band", "explore"}
    reason = next(choice.reason for choice in choices if choice.why == "band")
    assert reason.version == 1 and reason.credit == 1.0 and reason.lender is None
    assert reason.level is not None and reason.level.pass_rate == 0.5 and reason.level.sampled is not None
    assert reason.level.answers == 32 and BAND.band_low <= reason.level.sampled <= BAND.band_high
    assert reason.signal is not None and reason.signal > 0.9


def test_prompts_that_repeat_are_drawn_by_key_and_learnt_from(prompts=30) -> None:
    known = {"file": {"all": [KnownPrompt(str(index)) for index in range(prompts)]}}
    curriculum, restored = (Curriculum({"file": ("all",)}, {"file": 1.0}, BAND, GROUP_SIZE, 0, known) for _ in range(2))
    for number in range(120):
        choice = curriculum.draw(number // 8)
        assert choice.key is not None and choice.reason.prompt is not None and choice.reason.prompt_why
        pass_rate = 0.5 if int(choice.key) % 3 == 0 else 0.0
        curriculum.observe("file", "all", pass_rate, pass_rate > 0, number // 8, 4, choice.key)
    restored.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    drawn = [curriculum.draw(15) for _ in range(60)]
    assert drawn == [restored.draw(15) for _ in range(60)]
    assert sum(int(str(choice.key)) % 3 == 0 for choice in drawn) > 0.6 * 60
    assert curriculum.metrics()["curriculum/prompts_drawn/file/all"].value == prompts


def test_a_state_of_an_earlier_version_or_of_another_chooser_is_refused() -> None:
    curriculum = curriculum_over({"sums": ("a",)})
    with pytest.raises(ValueError, match="of an earlier version of Slipstream.*exported model"):
        curriculum.load_state_dict({"credits": {}, "evidence": {}, "uninformative_in_a_row": 0})
    with pytest.raises(ValueError, match="is 'uniform', curriculum.name is 'band'; resume with"):
        curriculum.load_state_dict(curriculum_over({"sums": ("a",)}, UNIFORM).state_dict())


def test_groups_that_count_in_their_batch_although_they_teach_nothing_are_no_refills():
    section = CurriculumSection(max_refill_factor=1, max_uninformative_steps=1000)
    curriculum = Curriculum({"sums": ("easy",)}, {"sums": 1.0}, section, GROUP_SIZE, 0, refills=False)
    for _ in range(99):
        curriculum.observe("sums", "easy", 0.0, False, 0)
    curriculum.check_signal(groups_per_step=8)
    assert curriculum.metrics()["curriculum/refills_since_step/groups"].value == 0
