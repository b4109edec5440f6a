"""This file is the curriculum of a run: what chooses the next prompt, what that goes by, and bounds for any choice.

 draw -> rl/band.py, or a class of one's own (rl/chooser.py) -> Choice, with its reason
observe -> rl/beliefs.py, for levels; rl/prompt_choice.py, for prompts that repeat
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rl.band import BandChooser, UniformChooser
from rl.beliefs import BucketBeliefs, Feedback
from rl.chooser import Choice, Chooser, Setup, load_chooser
from rl.curriculum_config import CurriculumSection
from rl.metrics import Metrics, last
from rl.questions import KnownPrompt

BUILT_IN: dict[str, Callable[[Setup], Chooser]] = {"band": BandChooser, "uniform": UniformChooser}


class Curriculum:
    """Draws prompts and learns from their groups; stops a run that samples in vain. Its state is saved and restored."""

    def __init__(
        self,
        levels: Mapping[str, tuple[str, ...]],
        source_weights: Mapping[str, float],
        settings: CurriculumSection,
        group_size: int,
        seed: int,
        prompts: Mapping[str, Mapping[str, Sequence[KnownPrompt]]] | None = None,
        refills: bool = True,
    ) -> None:
        """prompts names those of finite levels (PromptSources.known). ValueError where a class of one's own fails.

        refills is False where a group that teaches nothing counts in its batch, and no other is drawn for it.
        """
        assert levels and all(levels.values()) and set(levels) == set(source_weights)
        self._settings = settings
        self._refills = refills
        self.group_size = group_size
        self._beliefs = BucketBeliefs(levels, settings, group_size)
        setup = Setup(levels, source_weights, settings, group_size, seed, self._beliefs, prompts or {})
        built_in = BUILT_IN.get(settings.name)
        self._chooser = built_in(setup) if built_in else load_chooser(settings.name, setup, settings.params)
        self._draws = 0
        self._drawn = {source: dict.fromkeys(names, 0) for source, names in levels.items()}
        self._last_drawn = {source: dict.fromkeys(names, -1) for source, names in levels.items()}
        self._uninformative_in_a_row = 0
        self._uninformative_since_step = 0

    def draw(self, version: int) -> Choice:
        """Choose where the next prompt comes from, at policy `version`."""
        choice = self._chooser.draw(version)
        self._drawn[choice.source][choice.level] += 1
        self._last_drawn[choice.source][choice.level] = self._draws
        self._draws += 1
        return choice

    def observe(
        self,
        source: str,
        level: str,
        pass_rate: float | None,
        informative: bool,
        version: int,
        answers: int | None = None,
        key: str | None = None,
    ) -> None:
        """Learn from a finished group: the mean score of its judged answers, and whether its rewards differ.

        version is the policy that sampled it; answers how many were judged, by default the whole group; key names its
        prompt within the level. pass_rate None (judging failed) is no evidence.
        """
        if pass_rate is None:
            return
        feedback = Feedback(
            source=source,
            level=level,
            key=key,
            pass_rate=pass_rate,
            answers=self.group_size if answers is None else answers,
            informative=informative,
            version=version,
        )
        self._beliefs.add(feedback)
        self._chooser.observe(feedback)
        self._uninformative_in_a_row = 0 if informative else self._uninformative_in_a_row + 1
        self._uninformative_since_step += self._refills and not informative

    def step_made(self) -> None:
        """An optimizer step was made: what it may spend on groups without signal is counted anew."""
        self._uninformative_since_step = 0

    def pass_rates(self) -> dict[str, dict[str, float]]:
        """Discounted mean pass rate per source and level; a level without evidence is left out."""
        return self._beliefs.pass_rates()

    def check_signal(self, groups_per_step: int) -> None:
        """Raise ValueError, with the pass rates, where too many groups taught nothing: in a row, or for one step.

        A group that is dropped for want of signal gives its capacity back, and another is drawn: the second bound is
        that on refills. A step costs at most max_refill_factor x groups_per_step draws more than the groups it trains.
        """
        section = self._settings
        in_a_row, limit = self._uninformative_in_a_row, section.max_uninformative_steps * groups_per_step
        if in_a_row >= limit:
            self._refuse(
                f"{in_a_row} groups in a row taught nothing",
                f"curriculum.max_uninformative_steps {section.max_uninformative_steps} x learner.groups_per_step "
                f"{groups_per_step} = {limit}",
            )
        since_step, limit = self._uninformative_since_step, section.max_refill_factor * groups_per_step
        if since_step > limit:
            self._refuse(
                f"{since_step} groups since the last step taught nothing and were drawn anew",
                f"curriculum.max_refill_factor {section.max_refill_factor} x learner.groups_per_step "
                f"{groups_per_step} = {limit}",
            )

    def _refuse(self, what: str, limit: str) -> None:
        raise ValueError(
            f"{what}, because all answers of a group got the same reward (limit: {limit}). Pass rates: "
            f"{self._beliefs.describe()}. Where all are 0, add easier levels or check the reward with `rl score`; "
            "where all are 1, add harder levels"
        )

    def metrics(self) -> Metrics:
        """The beliefs as numbers: what people look at to see the curriculum move."""
        metrics: Metrics = {
            "curriculum/uninformative_in_a_row/groups": last(self._uninformative_in_a_row),
            "curriculum/refills_since_step/groups": last(self._uninformative_since_step),
        }
        for source, levels in self._drawn.items():
            for level, draws in levels.items():
                metrics[f"curriculum/draws/{source}/{level}"] = last(draws)
                waiting = self._draws - 1 - self._last_drawn[source][level]
                metrics[f"curriculum/draws_since_last/{source}/{level}"] = last(waiting)
        return metrics | self._beliefs.metrics() | self._chooser.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the following draws, JSON-able."""
        return {
            "name": self._settings.name,
            "draws": self._draws,
            "drawn": {source: dict(levels) for source, levels in self._drawn.items()},
            "last_drawn": {source: dict(levels) for source, levels in self._last_drawn.items()},
            "uninformative_in_a_row": self._uninformative_in_a_row,
            "uninformative_since_step": self._uninformative_since_step,
            "evidence": self._beliefs.state_dict(),
            "chooser": self._chooser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; ValueError where it is of other sources or levels, of another chooser, or too old."""
        if "chooser" not in state:
            raise ValueError(
                "the saved curriculum is of an earlier version of Slipstream, which kept no beliefs of prompts; start "
                "a new run from the saved run's exported model"
            )
        if state["name"] != self._settings.name:
            raise ValueError(
                f"the saved curriculum is {state['name']!r}, curriculum.name is {self._settings.name!r}; resume with "
                "the former, or start a new run from the saved run's exported model"
            )
        self._beliefs.load_state_dict(state["evidence"])
        self._chooser.load_state_dict(state["chooser"])
        self._draws = int(state["draws"])
        self._drawn = {source: dict(levels) for source, levels in state["drawn"].items()}
        self._last_drawn = {source: dict(levels) for source, levels in state["last_drawn"].items()}
        self._uninformative_in_a_row = int(state["uninformative_in_a_row"])
        self._uninformative_since_step = int(state["uninformative_since_step"])
