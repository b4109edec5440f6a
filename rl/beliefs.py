"""This file keeps what is believed of pass rates: evidence that fades with the policy's versions, and Beta beliefs."""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec

from rl.curriculum_config import CurriculumSection
from rl.metrics import Metrics, last

REMEMBERED_GROUPS = 4  # evidence never counts for less than this many groups, if there ever were so many
SIGNAL_PRIOR_GROUPS = 2.0


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished group showed. version is the policy that sampled it.

    pass_rate is the mean score of the answers that were judged, None where there is none; key names the prompt within
    its level; informative: their rewards differ.
    """

    source: str
    level: str
    key: str | None
    pass_rate: float | None
    answers: int
    informative: bool
    version: int

    @property
    def passed(self) -> float:
        """Answers that passed, partial credit in parts; a mean outside 0..1, as weighted sums give, is cut to it."""
        return 0.0 if self.pass_rate is None else min(max(self.pass_rate, 0.0), 1.0) * self.answers


class Belief(msgspec.Struct, frozen=True):
    """A pass rate is believed to be Beta(passed, failed)."""

    passed: float
    failed: float

    @property
    def mean(self) -> float:
        """The expected pass rate."""
        return self.passed / (self.passed + self.failed)

    def sample(self, rng: random.Random) -> float:
        """A pass rate that may well be."""
        return rng.betavariate(self.passed, self.failed)

    def signal(self, group_size: int) -> float:
        """E[1 - p^G - (1-p)^G]: the chance that the rewards of the next group differ."""
        all_passed = all_failed = 1.0
        for index in range(group_size):
            total = self.passed + self.failed + index
            all_passed *= (self.passed + index) / total
            all_failed *= (self.failed + index) / total
        return 1.0 - all_passed - all_failed


def informative_probability(pass_rate: float, group_size: int) -> float:
    """P = 1 - p^G - (1-p)^G: the chance that a group's rewards differ, so that its advantages are not all zero."""
    return 1.0 - pass_rate**group_size - (1.0 - pass_rate) ** group_size


class Evidence(msgspec.Struct):
    """What groups of one level showed, as seen at policy `version`: a group counts discount ** (its age in versions).

    passed and answers count answers; informative, in_band and groups count groups; seen counts answers undiscounted.
    """

    passed: float = 0.0
    answers: float = 0.0
    informative: float = 0.0
    in_band: float = 0.0
    groups: float = 0.0
    seen: int = 0
    version: int = 0

    def add(self, feedback: Feedback, in_band: bool, discount: float) -> None:
        """Count one group; the order in which groups arrive changes nothing."""
        newest = max(self.version, feedback.version)
        fade, weight = discount ** (newest - self.version), discount ** (newest - feedback.version)
        self.passed = self.passed * fade + feedback.passed * weight
        self.answers = self.answers * fade + feedback.answers * weight
        self.informative = self.informative * fade + feedback.informative * weight
        self.in_band = self.in_band * fade + in_band * weight
        self.groups = self.groups * fade + weight
        self.seen += feedback.answers
        self.version = newest


class BucketBeliefs:
    """What every (source, level) is believed to be; a prompt of it that nobody has drawn is believed to be the same.

    Evidence fades with the versions of the policy, since the policy moves, but not to nothing: it goes on counting for
    REMEMBERED_GROUPS groups. A level of which nothing is known looks learnable, and one that was hopeless must not look
    so again for no other reason than that time has passed: looking again is what exploration is for.
    """

    def __init__(self, levels: Mapping[str, tuple[str, ...]], settings: CurriculumSection, group_size: int) -> None:
        self.group_size = group_size
        self._settings = settings
        self._evidence = {source: {level: Evidence() for level in levels[source]} for source in levels}

    def add(self, feedback: Feedback) -> None:
        """Learn from a group. None of its answers judged is no evidence."""
        if feedback.pass_rate is not None and feedback.answers:
            self._evidence[feedback.source][feedback.level].add(
                feedback,
                self._settings.band_low <= feedback.pass_rate <= self._settings.band_high,
                self._settings.discount_per_version,
            )

    def belief(self, source: str, level: str, version: int) -> Belief:
        """The belief of a level at a policy version."""
        seen = self._evidence[source][level]
        if not seen.answers:
            return Belief(1.0, 1.0)
        faded = seen.answers * self._fade(seen, version)
        answers = max(faded, min(seen.seen, REMEMBERED_GROUPS * self.group_size))
        passed = answers * seen.passed / seen.answers
        return Belief(1.0 + passed, 1.0 + answers - passed)

    def answers(self, source: str, level: str, version: int) -> float:
        """The answers that a level's belief rests on."""
        belief = self.belief(source, level, version)
        return belief.passed + belief.failed - 2.0

    def signal(self, source: str, level: str, version: int) -> float:
        """The expected chance that the level's next group teaches something.

        From the groups seen, shrunk to what the belief says: where a level mixes trivial and hopeless prompts, its pass
        rate alone promises too much.
        """
        seen = self._evidence[source][level]
        fade = self._fade(seen, version)
        expected = self.belief(source, level, version).signal(self.group_size)
        return (seen.informative * fade + SIGNAL_PRIOR_GROUPS * expected) / (seen.groups * fade + SIGNAL_PRIOR_GROUPS)

    def _fade(self, seen: Evidence, version: int) -> float:
        return self._settings.discount_per_version ** max(0, version - seen.version)

    def pass_rates(self) -> dict[str, dict[str, float]]:
        """Discounted mean pass rate per source and level; a level without evidence is left out."""
        return {
            source: {level: seen.passed / seen.answers for level, seen in levels.items() if seen.answers > 0}
            for source, levels in self._evidence.items()
        }

    def describe(self) -> str:
        """Every level's pass rate, in words."""
        rates = self.pass_rates()
        return ", ".join(
            f"{source}/{level} {rates[source][level]:.2f}" if level in rates[source] else f"{source}/{level} unseen"
            for source, levels in self._evidence.items()
            for level in levels
        )

    def metrics(self) -> Metrics:
        """Per level with evidence, discounted: pass rate, share of informative groups, share of groups in the band."""
        metrics: Metrics = {}
        for source, levels in self._evidence.items():
            for level, seen in levels.items():
                if seen.groups > 0:
                    place = f"{source}/{level}"
                    metrics[f"curriculum/pass_rate/{place}"] = last(seen.passed / seen.answers)
                    metrics[f"curriculum/informative_fraction/{place}"] = last(seen.informative / seen.groups)
                    metrics[f"curriculum/in_band_fraction/{place}"] = last(seen.in_band / seen.groups)
        return metrics

    def state_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """All evidence, JSON-able."""
        return msgspec.to_builtins(self._evidence)

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        """Continue from a state; ValueError where it is of other sources or levels."""
        evidence = msgspec.convert(state, dict[str, dict[str, Evidence]])
        saved = {source: sorted(levels) for source, levels in evidence.items()}
        current = {source: sorted(levels) for source, levels in self._evidence.items()}
        if saved != current:
            raise ValueError(
                f"the saved curriculum knows the levels {saved}, the config has {current}; resume with the sources of "
                "the saved run, or start a new run from its exported model"
            )
        self._evidence = {
            source: {level: evidence[source][level] for level in self._evidence[source]} for source in self._evidence
        }
