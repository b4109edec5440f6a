"""This file decides which source and level the next prompt comes from: the one whose groups are worth paying for."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from rl.config import CurriculumSection
from rl.metrics import Metrics, last

Why = Literal["uniform", "explore", "band", "nearest"]


class Choice(msgspec.Struct, frozen=True):
    """A draw: where from, and why (explore: its turn; band: believed learnable; nearest: the best outside the band)."""

    source: str
    level: str
    why: Why


class Evidence(msgspec.Struct):
    """What groups of one level showed, as seen at policy `version`: a group counts discount ** (its age in versions).

    passed and failed count answers, informative and groups count groups; draws and last_draw are not discounted.
    """

    passed: float = 0.0
    failed: float = 0.0
    informative: float = 0.0
    groups: float = 0.0
    version: int = 0
    draws: int = 0
    last_draw: int = -1

    def add(self, passed: float, failed: float, informative: bool, version: int, discount: float) -> None:
        """Count one group sampled at `version`; the order in which groups arrive changes nothing."""
        newest = max(self.version, version)
        fade, weight = discount ** (newest - self.version), discount ** (newest - version)
        self.passed = self.passed * fade + passed * weight
        self.failed = self.failed * fade + failed * weight
        self.informative = self.informative * fade + informative * weight
        self.groups = self.groups * fade + weight
        self.version = newest


def informative_probability(pass_rate: float, group_size: int) -> float:
    """P = 1 - p^G - (1-p)^G: the chance that a group's rewards differ, so that its advantages are not all zero."""
    return 1.0 - pass_rate**group_size - (1.0 - pass_rate) ** group_size


class Curriculum:
    """Thompson sampling over Beta beliefs per (source, level), with shares and floors that beliefs cannot override.

    The source of a draw is decided by weights alone: each draw credits every source with its share and takes one from
    the most credited, so over any window the draws follow the weights and no source starves.

    Within the source, every 1/exploration_fraction-th draw takes the level drawn longest ago: a level waits at most
    (number of levels) / exploration_fraction draws of its source. Any other draw samples a pass rate p from each
    level's Beta(1 + passed, 1 + failed), evidence discounted by the policy versions since it was *sampled*. Levels
    with p inside the target band are equal, and chance picks: inside it the information P is nearly flat (0.83 to 0.99
    for 8 answers), and a mix of levels guards against forgetting what the best one does not exercise. Where no p is
    inside, the largest P wins. The spread of a fading belief re-probes hopeless and mastered levels by itself.

    Deterministic: draw n uses its own random stream of (seed, n), so counters and evidence are the whole state.
    """

    def __init__(
        self,
        levels: Mapping[str, tuple[str, ...]],
        source_weights: Mapping[str, float],
        settings: CurriculumSection,
        group_size: int,
        seed: int,
    ) -> None:
        assert levels and all(levels.values()) and set(levels) == set(source_weights)
        weight_sum = sum(source_weights.values())
        self._shares = {source: source_weights[source] / weight_sum for source in levels}
        self._settings = settings
        self._group_size = group_size
        self._seed = seed
        self._credits = dict.fromkeys(levels, 0.0)
        self._evidence = {source: {level: Evidence() for level in levels[source]} for source in levels}
        self._uninformative_in_a_row = 0

    def draw(self, version: int) -> Choice:
        """Choose where the next prompt comes from, at policy `version`."""
        source = self._next_source()
        levels = self._evidence[source]
        number = sum(evidence.draws for evidence in levels.values())
        rng = random.Random(f"{self._seed}/{source}/{number}")
        fraction = self._settings.exploration_fraction
        if self._settings.name == "uniform":
            level, why = rng.choice(list(levels)), "uniform"
        elif int((number + 1) * fraction) > int(number * fraction):
            level, why = min(levels, key=lambda name: levels[name].last_draw), "explore"
        else:
            level, why = self._most_promising(levels, version, rng)
        levels[level].draws += 1
        levels[level].last_draw = number
        return Choice(source, level, why)

    def _next_source(self) -> str:
        for source, share in self._shares.items():
            self._credits[source] += share
        source = max(self._credits, key=lambda name: self._credits[name])
        self._credits[source] -= 1.0
        return source

    def _most_promising(self, levels: dict[str, Evidence], version: int, rng: random.Random) -> tuple[str, Why]:
        scores: dict[str, tuple[float, float]] = {}
        for level, seen in levels.items():
            fade = self._settings.discount_per_version ** max(0, version - seen.version)
            pass_rate = rng.betavariate(1.0 + seen.passed * fade, 1.0 + seen.failed * fade)
            in_band = self._settings.band_low <= pass_rate <= self._settings.band_high
            score = 1.0 if in_band else informative_probability(pass_rate, self._group_size)
            scores[level] = (score, rng.random())
        best = max(scores, key=lambda level: scores[level])
        return best, "band" if scores[best][0] == 1.0 else "nearest"

    def observe(self, source: str, level: str, pass_rate: float | None, informative: bool, version: int) -> None:
        """Learn from a finished group: the share of its answers that passed, and whether its rewards differ.

        version is the policy that sampled it. pass_rate None (judging failed) is no evidence about the level; a mean
        reward outside 0..1, as weighted sums may give, counts as the nearer end.
        """
        if pass_rate is None:
            return
        passed = min(max(pass_rate, 0.0), 1.0) * self._group_size
        discount = self._settings.discount_per_version
        self._evidence[source][level].add(passed, self._group_size - passed, informative, version, discount)
        self._uninformative_in_a_row = 0 if informative else self._uninformative_in_a_row + 1

    def pass_rates(self) -> dict[str, dict[str, float]]:
        """Discounted mean pass rate per source and level; a level without evidence is left out."""
        return {
            source: {
                level: seen.passed / (seen.passed + seen.failed) for level, seen in levels.items() if seen.groups > 0
            }
            for source, levels in self._evidence.items()
        }

    def check_signal(self, groups_per_step: int) -> None:
        """Raise ValueError, with the pass rates, after too many groups in a row without one whose rewards differ."""
        limit = self._settings.max_uninformative_steps * groups_per_step
        if self._uninformative_in_a_row < limit:
            return
        rates = self.pass_rates()
        buckets = ", ".join(
            f"{source}/{level} {rates[source][level]:.2f}" if level in rates[source] else f"{source}/{level} unseen"
            for source, levels in self._evidence.items()
            for level in levels
        )
        raise ValueError(
            f"{self._uninformative_in_a_row} groups in a row taught nothing, because all answers of a group got the "
            f"same reward (limit: curriculum.max_uninformative_steps {self._settings.max_uninformative_steps} x "
            f"learner.groups_per_step {groups_per_step} = {limit}). Pass rates: {buckets}. Where all are 0, add easier "
            "levels or check the reward with `rl score`; where all are 1, add harder levels"
        )

    def metrics(self) -> Metrics:
        """The beliefs as numbers: what people look at to see the curriculum move."""
        metrics: Metrics = {"curriculum/uninformative_in_a_row/groups": last(self._uninformative_in_a_row)}
        for source, levels in self._evidence.items():
            for level, seen in levels.items():
                metrics[f"curriculum/draws/{source}/{level}"] = last(seen.draws)
                if seen.groups > 0:
                    pass_rate = seen.passed / (seen.passed + seen.failed)
                    metrics[f"curriculum/pass_rate/{source}/{level}"] = last(pass_rate)
                    informative_fraction = seen.informative / seen.groups
                    metrics[f"curriculum/informative_fraction/{source}/{level}"] = last(informative_fraction)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the following draws, JSON-able."""
        return {
            "credits": dict(self._credits),
            "evidence": msgspec.to_builtins(self._evidence),
            "uninformative_in_a_row": self._uninformative_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; ValueError where it is of other sources or levels."""
        evidence = msgspec.convert(state["evidence"], dict[str, dict[str, Evidence]])
        saved = {source: set(levels) for source, levels in evidence.items()}
        current = {source: set(levels) for source, levels in self._evidence.items()}
        if saved != current:
            raise ValueError(
                f"the saved curriculum knows the levels {saved}, the config has {current}; resume with the sources of "
                "the saved run, or start a new run from its exported model"
            )
        self._credits = {source: float(state["credits"][source]) for source in self._credits}
        self._evidence = {
            source: {level: evidence[source][level] for level in self._evidence[source]} for source in self._evidence
        }
        self._uninformative_in_a_row = int(state["uninformative_in_a_row"])
