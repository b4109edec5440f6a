"""This file chooses by difficulty: Thompson sampling toward the band of pass rates that teach; or blindly."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import msgspec

from rl.beliefs import Belief, Feedback, informative_probability
from rl.chooser import Choice, Numbers, Reason, Setup
from rl.metrics import Metrics, last
from rl.mixture import Mixture, Turn
from rl.prompt_choice import PromptChoice


class Score(msgspec.Struct, frozen=True):
    """How a level fared in a draw: 1 inside the band, else its signal; order breaks ties by chance."""

    value: float
    order: float
    sampled: float


class BandChooser:
    """Thompson sampling over Beta beliefs per (source, level), with shares and floors that beliefs cannot override.

    Which source is drawn from is decided by weights and loans (rl/mixture.py). Within the source, every
    1/exploration_fraction-th draw takes the level drawn longest ago: a level waits at most
    (number of levels) / exploration_fraction draws of its source. Any other draw samples a pass rate p from each
    level's belief. Levels with p inside the target band are equal, and chance picks: inside it the information P is
    nearly flat (0.83 to 0.99 for 8 answers), and a mix of levels guards against forgetting what the best one does not
    exercise. Where no p is inside, the largest P wins. As a level's p leaves the band upward the next one enters, since
    exploration looks at it and Thompson sampling follows up what looks promising.

    Deterministic: draw n of a source uses its own random stream of (seed, source, n), so that counters and evidence are
    the whole state.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._mixture = Mixture(setup.weights, setup.section.mixture_flexibility)
        self._drawn = dict.fromkeys(setup.levels, 0)
        self._last_drawn = {source: dict.fromkeys(levels, -1) for source, levels in setup.levels.items()}
        self._lent = dict.fromkeys(setup.levels, 0)
        self._prompts = {
            source: {
                level: PromptChoice(f"{source}/{level}", prompts, setup.section, setup.group_size, setup.seed)
                for level, prompts in setup.prompts.get(source, {}).items()
            }
            for source in setup.levels
        }

    def draw(self, version: int) -> Choice:
        """Choose where the next prompt comes from, at policy `version`."""
        signals = {
            source: {level: self._setup.beliefs.signal(source, level, version) for level in levels}
            for source, levels in self._setup.levels.items()
        }
        turn = self._mixture.next({source: max(levels.values()) for source, levels in signals.items()})
        source, number = turn.source, self._drawn[turn.source]
        rng = random.Random(f"{self._setup.seed}/{source}/{number}")
        explore = self._explores(number)
        if explore:
            level, sampled, why = self._longest_ago(source), None, "explore"
        else:
            level, sampled, why = self._most_promising(source, version, rng)
        self._drawn[source] += 1
        self._last_drawn[source][level] = number
        if turn.lender:
            self._lent[turn.lender] += 1
        return self._explained(
            turn, level, Reason(why=why, version=version, signal=signals[source][level]), sampled, rng
        )

    def _explores(self, number: int) -> bool:
        fraction = self._setup.section.exploration_fraction
        return int((number + 1) * fraction) > int(number * fraction)

    def _longest_ago(self, source: str) -> str:
        return min(self._last_drawn[source], key=lambda level: self._last_drawn[source][level])

    def _most_promising(self, source: str, version: int, rng: random.Random) -> tuple[str, float, str]:
        section, scores = self._setup.section, dict[str, Score]()
        for level in self._setup.levels[source]:
            pass_rate = self._setup.beliefs.belief(source, level, version).sample(rng)
            in_band = section.band_low <= pass_rate <= section.band_high
            value = 1.0 if in_band else informative_probability(pass_rate, self._setup.group_size)
            scores[level] = Score(value, rng.random(), pass_rate)
        best = max(scores, key=lambda level: (scores[level].value, scores[level].order))
        return best, scores[best].sampled, "band" if scores[best].value == 1.0 else "nearest"

    def _explained(self, turn: Turn, level: str, reason: Reason, sampled: float | None, rng: random.Random) -> Choice:
        source, beliefs = turn.source, self._setup.beliefs
        belief: Belief = beliefs.belief(source, level, reason.version)
        numbers = Numbers(belief.mean, beliefs.answers(source, level, reason.version), sampled)
        reason = msgspec.structs.replace(reason, level=numbers, credit=turn.credit, lender=turn.lender)
        prompts = self._prompts[source].get(level)
        if prompts is None:
            return Choice(source, level, reason)
        pick = prompts.draw(belief, reason.version, reason.why == "explore", rng)
        reason = msgspec.structs.replace(reason, prompt_why=pick.why, prompt=pick.numbers)
        return Choice(source, level, reason, pick.key)

    def observe(self, feedback: Feedback) -> None:
        """Learn about the prompt; the run keeps the beliefs about its level."""
        prompts = self._prompts[feedback.source].get(feedback.level)
        if prompts is not None:
            prompts.observe(feedback)

    def metrics(self) -> Metrics:
        """What was lent, and how the prompts of finite levels stand."""
        metrics: Metrics = {f"curriculum/lent/{source}": last(count) for source, count in self._lent.items()}
        for source, levels in self._prompts.items():
            for level, prompts in levels.items():
                metrics |= prompts.metrics(f"{source}/{level}")
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the following draws, but for the beliefs about levels; JSON-able."""
        return {
            "mixture": self._mixture.state_dict(),
            "drawn": dict(self._drawn),
            "last_drawn": {source: dict(levels) for source, levels in self._last_drawn.items()},
            "lent": dict(self._lent),
            "prompts": {
                source: {level: prompts.state_dict() for level, prompts in levels.items()}
                for source, levels in self._prompts.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same sources; ValueError where a finite level has other prompts now."""
        self._mixture.load_state_dict(state["mixture"])
        self._drawn = {source: int(state["drawn"][source]) for source in self._drawn}
        self._lent = {source: int(state["lent"][source]) for source in self._lent}
        self._last_drawn = {
            source: {level: int(state["last_drawn"][source][level]) for level in levels}
            for source, levels in self._last_drawn.items()
        }
        for source, levels in self._prompts.items():
            _refuse_other_levels(source, levels, state["prompts"][source])
            for level, prompts in levels.items():
                prompts.load_state_dict(state["prompts"][source][level])


def _refuse_other_levels(source: str, levels: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if set(levels) != set(saved):
        raise ValueError(
            f"the saved curriculum chose prompts of {source} in {sorted(saved)}, now they repeat in {sorted(levels)}; "
            "resume with the sources of the saved run"
        )


class UniformChooser:
    """Sources by weight, levels by chance, prompts in their own order: what a curriculum has to beat."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._mixture = Mixture(setup.weights, 0.0)
        self._drawn = dict.fromkeys(setup.levels, 0)

    def draw(self, version: int) -> Choice:
        """Choose where the next prompt comes from; what groups have shown plays no part."""
        turn = self._mixture.next(dict.fromkeys(self._setup.levels, 1.0))
        rng = random.Random(f"{self._setup.seed}/{turn.source}/{self._drawn[turn.source]}")
        self._drawn[turn.source] += 1
        level = rng.choice(self._setup.levels[turn.source])
        return Choice(turn.source, level, Reason(why="uniform", version=version, credit=turn.credit))

    def observe(self, feedback: Feedback) -> None:
        """Nothing is learnt."""

    def metrics(self) -> Metrics:
        """Nothing of its own."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the following draws, JSON-able."""
        return {"mixture": self._mixture.state_dict(), "drawn": dict(self._drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same sources."""
        self._mixture.load_state_dict(state["mixture"])
        self._drawn = {source: int(state["drawn"][source]) for source in self._drawn}
