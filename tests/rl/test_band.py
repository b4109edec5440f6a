"""This file tests choice by difficulty on policies that learn: the default ladders against uniform draws, and jumps."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter

import pytest

from rl.band import BandChooser, UniformChooser
from rl.curriculum import BUILT_IN, Curriculum
from rl.curriculum_config import CurriculumSection

GROUP_SIZE, GROUPS_PER_STEP, MAX_LAG, STEPS = 8, 8, 2, 40
BAND, UNIFORM = CurriculumSection(), CurriculumSection(name="uniform")
Rates = dict[str, tuple[float, float]]
# configs/arithmetic.yaml: weight, and the pass rates of SmolLM2-135M-Instruct before and after a run
ARITHMETIC: dict[str, tuple[float, Rates]] = {
    "sums": (
        3.0,
        {
            "one_digit": (0.37, 0.85),
            "three_terms": (0.04, 0.17),
            "two_digits": (0.001, 0.2),
            "three_digits": (1e-4, 1e-3),
            "four_digits": (1e-6, 1e-6),
        },
    ),
    "products": (1.0, {"one_digit": (0.5, 0.9), "two_digits": (0.001, 0.01), "three_digits": (1e-6, 1e-6)}),
    "operations": (1.0, {"one_digit": (0.37, 0.8), "four_terms": (0.05, 0.12), "two_digits": (1e-4, 1e-3)}),
    "divisors": (0.5, {"up_to_20": (0.2, 0.6), "up_to_1000": (0.02, 0.06)}),
}


def logit(pass_rate: float) -> float:
    return math.log(pass_rate / (1 - pass_rate))


class SimulatedRun:
    """A run with a gate: groups in flight up to the lag bound, in disorder; those without signal are drawn anew."""

    def __init__(self, section: CurriculumSection, seed: int, sources=None, steps: int = STEPS) -> None:
        self.sources = sources or ARITHMETIC
        levels = {source: tuple(rates) for source, (_, rates) in self.sources.items()}
        weights = {source: weight for source, (weight, _) in self.sources.items()}
        self.curriculum = Curriculum(levels, weights, section, GROUP_SIZE, seed)
        self.rng = random.Random(f"run {seed}")
        self.steps = steps
        self.version = self.sampled = self.ready = 0
        self.trained: Counter[str] = Counter()
        self.drawn: list[tuple[str, str]] = []
        self.in_flight: list[tuple[str, str, int, int]] = []

    def pass_rate(self, source: str, level: str) -> float:
        before, after = map(logit, self.sources[source][1][level])
        return 1 / (1 + math.exp(-(before + (after - before) * self.version / self.steps)))

    def go(self, steps: int | None = None) -> SimulatedRun:
        until = self.version + (steps or self.steps)
        while self.version < until:
            while len(self.in_flight) + self.ready < (MAX_LAG + 1) * GROUPS_PER_STEP:
                self._draw()
            self._finish(*self.in_flight.pop(self.rng.randrange(GROUPS_PER_STEP)))
        return self

    def _draw(self) -> None:
        choice = self.curriculum.draw(self.version)
        self.drawn.append((choice.source, choice.level))
        rate = self.pass_rate(choice.source, choice.level)
        passed = sum(self.rng.random() < rate for _ in range(GROUP_SIZE))
        self.in_flight.append((choice.source, choice.level, passed, self.version))

    def _finish(self, source: str, level: str, passed: int, version: int) -> None:
        informative = 0 < passed < GROUP_SIZE
        self.curriculum.observe(source, level, passed / GROUP_SIZE, informative, version)
        self.curriculum.check_signal(GROUPS_PER_STEP)
        self.sampled += 1
        self.trained[source] += informative
        self.ready += informative
        if self.ready == GROUPS_PER_STEP:
            self.ready, self.version = 0, self.version + 1
            self.curriculum.step_made()

    @property
    def useful(self) -> float:
        return self.trained.total() / self.sampled


def test_at_least_twice_as_many_groups_as_with_uniform_draws_teach_on_the_default_mixture() -> None:
    band, uniform = ([SimulatedRun(section, seed).go().useful for seed in range(4)] for section in (BAND, UNIFORM))
    assert statistics.mean(band) > 0.78 and min(band) > 0.74
    assert statistics.mean(band) > 2.0 * statistics.mean(uniform)


def test_what_is_trained_follows_the_weights_and_every_source_and_level_is_looked_at() -> None:
    run = SimulatedRun(BAND, 1).go()
    total = run.trained.total()
    for source, (weight, rates) in ARITHMETIC.items():
        assert run.trained[source] / total == pytest.approx(weight / 5.5, abs=0.05)
        assert {level for name, level in run.drawn if name == source} == set(rates)


def test_a_source_that_has_nothing_left_to_teach_lends_and_what_it_lends_is_not_wasted() -> None:
    mastered = ARITHMETIC | {"products": (1.0, {"one_digit": (0.999, 0.999), "two_digits": (1e-6, 1e-6)})}
    useful = {}
    for flexibility in (0.0, 0.75):
        run = SimulatedRun(CurriculumSection(mixture_flexibility=flexibility), 0, mastered).go()
        useful[flexibility] = run.useful
        share = sum(source == "products" for source, _ in run.drawn) / len(run.drawn)
    assert useful[0.75] > useful[0.0] + 0.05
    assert 0.25 * 1 / 5.5 - 0.01 < share < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_levels_enter_and_leave_in_order_as_the_policy_climbs(seed: int) -> None:
    names = [f"rung{index}" for index in range(5)]

    class Climbing(SimulatedRun):
        """Practice on a rung moves it, and half as much the next one."""

        def __init__(self) -> None:
            super().__init__(BAND, seed, {"ladder": (1.0, dict.fromkeys(names, (0.5, 0.5)))}, 100)
            self.logits = {name: -0.5 - 1.5 * index for index, name in enumerate(names)}

        def pass_rate(self, source: str, level: str) -> float:
            return 1 / (1 + math.exp(-self.logits[level]))

        def _finish(self, source: str, level: str, passed: int, version: int) -> None:
            super()._finish(source, level, passed, version)
            gain = 0.03 * passed / GROUP_SIZE * (1 - passed / GROUP_SIZE)
            for name, share in zip(names[names.index(level) :], (1.0, 0.5), strict=False):
                self.logits[name] += share * 4 * gain

    run, busiest = Climbing(), []
    for _ in range(28):
        start = len(run.drawn)
        run.go(4)
        ((_, level), _), *_ = Counter(run.drawn[start:]).most_common()
        busiest.append(names.index(level))
    assert busiest[0] == 0 and busiest[-1] >= 3 and set(busiest) >= {0, 1, 2, 3}
    first = [busiest.index(rung) for rung in sorted(set(busiest))]
    assert first == sorted(first), "each rung has its turn after the one below"


@pytest.mark.parametrize("seed", range(3))
def test_no_level_starves_its_bound_is_levels_by_exploration_by_what_the_source_keeps(seed: int) -> None:
    section = CurriculumSection(exploration_fraction=0.2, mixture_flexibility=0.5)
    run = SimulatedRun(section, seed)
    drawn = [run.curriculum.draw(0) for _ in range(2000) if not _tell(run, seed)]
    for source, (weight, rates) in ARITHMETIC.items():
        own = [choice.level for choice in drawn if choice.source == source]
        assert len(own) >= 2000 * weight / 5.5 * 0.5 - 4
        for level in rates:
            places = [-1, *(place for place, name in enumerate(own) if name == level), len(own)]
            assert max(b - a for a, b in zip(places, places[1:], strict=False)) <= len(rates) / 0.2 + 1


def _tell(run: SimulatedRun, seed: int) -> None:
    """Feedback that changes its mind about everything."""
    source = run.rng.choice(list(ARITHMETIC))
    rate = run.rng.choice([0.0, 0.0, 0.5, 1.0])
    run.curriculum.observe(source, run.rng.choice(list(ARITHMETIC[source][1])), rate, rate == 0.5, seed)


@pytest.mark.parametrize("seed", range(5))
def test_a_level_that_jumps_from_hopeless_to_learnable_is_drawn_in_earnest_within_250_draws_of_its_source(seed) -> None:
    run = SimulatedRun(BAND, seed, steps=200)
    run.go(30)
    run.sources = ARITHMETIC | {"sums": (3.0, ARITHMETIC["sums"][1] | {"four_digits": (0.4, 0.4)})}
    start = len(run.drawn)
    while Counter(run.drawn[start:])["sums", "four_digits"] < 20:
        run.go(1)
    assert sum(source == "sums" for source, _ in run.drawn[start:]) <= 250


def test_the_built_in_choosers_are_known_by_name() -> None:
    assert {"band": BandChooser, "uniform": UniformChooser} == BUILT_IN
