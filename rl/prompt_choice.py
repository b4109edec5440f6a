"""This file chooses among the prompts of one finite level: the next ones of the epoch, or again those that teach.

A draw has few candidates, whatever the size of the level. Either they are the window, the WINDOW next prompts of the
epoch's order; or AGAIN chosen at random among those drawn before, less those that cool down or are retired. Which of
the two is a coin: prompts come again only as far as groups of the window teach less than groups of those that come
again do. Of each candidate a pass rate is sampled from its belief; of those inside the band the one whose belief
promises most signal is taken, the first of equals; if none is, the one whose sampled pass rate promises most. One that
leaves the window lets the next of the order in, and one that was passed over PATIENCE times leaves it untaken. An
exploring draw takes the next of all prompts in turn, whatever is believed of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec

from rl.beliefs import Belief, Evidence, Feedback, informative_probability
from rl.chooser import Numbers
from rl.curriculum_config import CurriculumSection
from rl.metrics import Metrics, last
from rl.questions import KnownPrompt

WINDOW = 8
AGAIN = 16
PATIENCE = 2 * WINDOW
MAX_RESTING = 64  # prompts of the order that a draw looks at in vain
MAX_REMEMBERED = 8192  # prompts whose evidence is kept; beyond it the least recently drawn is forgotten
RETIRE_AFTER_GROUPS = 2


class PromptEvidence(msgspec.Struct, array_like=True):
    """What groups of one prompt showed, as seen at `version`; seen counts answers undiscounted.

    drawn is the level's draw that it was last drawn in, and came how: new, from the window; again; or explore.
    """

    passed: float = 0.0
    answers: float = 0.0
    seen: int = 0
    version: int = 0
    drawn: int = -1
    came: str = ""


class Pick(msgspec.Struct, frozen=True):
    """The prompt that was chosen, and why."""

    key: str
    why: str
    numbers: Numbers


class PromptChoice:
    """Beliefs of a level's prompts, and the order in which they come.

    A prompt's belief starts at its level's, worth prompt_prior_answers, and at what `rl screen` found; its own answers
    come on top, discounted by the versions since they were sampled. Every prompt of a level of N is drawn at the latest
    when the level has explored N + WINDOW more times.
    """

    def __init__(
        self, where: str, prompts: Sequence[KnownPrompt], section: CurriculumSection, group_size: int, seed: int
    ) -> None:
        assert prompts
        self._where = f"{where}/{seed}"
        self._keys = [prompt.key for prompt in prompts]
        self._screened = {prompt.key: (prompt.passed, prompt.answers) for prompt in prompts if prompt.answers}
        self._section = section
        self._group_size = group_size
        few = min(2, len(prompts) - 1)  # a tiny level goes round
        self._cooldown = min(section.cooldown_draws, max(few, len(prompts) // 4))
        self._evidence: dict[str, PromptEvidence] = {}  # least recently drawn first
        self._encoded: dict[str, str] = {}  # the same, ready to be saved
        self._window: dict[str, int] = {}  # and when it came in, in draws from the window; oldest first
        self._came = {"new": Evidence(), "again": Evidence()}
        self._position = 0  # in the order of all epochs
        self._explored = 0
        self._windows = 0  # draws from the window
        self._draws = 0
        self._orders: dict[int | str, list[int]] = {}  # made anew where they are missing

    def draw(self, level: Belief, version: int, explore: bool, rng: random.Random) -> Pick:
        """Choose a prompt. level is the belief about the level as a whole."""
        if explore:
            came, key, why = "explore", self._next_in_turn(), "explore"
            numbers = self._numbers(key, level, version)
        else:
            came, candidates = self._candidates(version, rng)
            key, why, numbers = self._most_promising(candidates, level, version, rng)
        known = self._evidence.get(key)
        if known is not None and self._mastered(known):
            why = "reprobe"
        self._take(key, came)
        return Pick(key, why, numbers)

    def _take(self, key: str, came: str) -> None:
        self._window.pop(key, None)
        evidence = self._evidence.pop(key, None) or PromptEvidence()
        self._encoded.pop(key, None)
        evidence.drawn, evidence.came = self._draws, came
        self._draws += 1
        self._windows += came == "new"
        self._keep(key, evidence)
        if len(self._evidence) > MAX_REMEMBERED:
            forgotten = next(iter(self._evidence))
            del self._evidence[forgotten], self._encoded[forgotten]

    def _keep(self, key: str, evidence: PromptEvidence) -> None:
        self._evidence[key] = evidence
        self._encoded[key] = msgspec.json.encode(evidence).decode()

    def _candidates(self, version: int, rng: random.Random) -> tuple[str, list[str]]:
        self._fill_window(version)
        new, drawn = list(self._window), list(self._evidence)
        sampled = rng.sample(drawn, min(AGAIN, len(drawn)))
        again = [key for key in sampled if key not in self._window and not self._rests(key, version)]
        wants_new = rng.random() * self._teaches("again") < self._teaches("new")
        return ("new", new) if new and (wants_new or not again) else ("again", again)

    def _teaches(self, came: str) -> float:
        seen = self._came[came]
        return (seen.informative + 1.0) / (seen.groups + 2.0)

    def _next_in_turn(self) -> str:
        """The next of all prompts that does not cool down."""
        order, key = self._shuffled("explored"), ""
        for _ in range(min(MAX_RESTING, len(order))):
            key = self._keys[order[self._explored % len(order)]]
            self._explored += 1
            if not self._cools(key):
                break
        return key

    def _most_promising(
        self, candidates: Sequence[str], level: Belief, version: int, rng: random.Random
    ) -> tuple[str, str, Numbers]:
        if not candidates:  # everything cools down or is retired
            key = next(iter(self._evidence), self._keys[0])
            return key, "nearest", self._numbers(key, level, version)
        best, chosen, taken = (False, -1.0), "", 0.0
        for key in candidates:
            belief = self.belief(key, level, version)
            sampled = belief.sample(rng)
            in_band = self._section.band_low <= sampled <= self._section.band_high
            signal = belief.signal(self._group_size) if in_band else self._informs(sampled)
            if (in_band, signal) > best:
                best, chosen, taken = (in_band, signal), key, sampled
        return chosen, "band" if best[0] else "nearest", self._numbers(chosen, level, version, taken)

    def _informs(self, pass_rate: float) -> float:
        return informative_probability(pass_rate, self._group_size)

    def belief(self, key: str, level: Belief, version: int) -> Belief:
        """What is believed of a prompt at a policy version."""
        prior, discount = self._section.prompt_prior_answers, self._section.prompt_discount_per_version
        passed, answers = prior * level.mean, prior
        if key in self._screened:
            fade = discount**version
            passed, answers = passed + self._screened[key][0] * fade, answers + self._screened[key][1] * fade
        seen = self._evidence.get(key)
        if seen is not None:
            fade = discount ** max(0, version - seen.version)
            passed, answers = passed + seen.passed * fade, answers + seen.answers * fade
        return Belief(passed, answers - passed)

    def _numbers(self, key: str, level: Belief, version: int, sampled: float | None = None) -> Numbers:
        belief = self.belief(key, level, version)
        return Numbers(belief.mean, belief.passed + belief.failed - self._section.prompt_prior_answers, sampled)

    def _mastered(self, evidence: PromptEvidence) -> bool:
        """Of at least two groups' answers, by the discounted ones, more than retire_above passed."""
        enough = evidence.seen >= RETIRE_AFTER_GROUPS * self._group_size
        return enough and evidence.passed > self._section.retire_above * evidence.answers

    def _cools(self, key: str) -> bool:
        evidence = self._evidence.get(key)
        return evidence is not None and evidence.drawn >= 0 and self._draws - evidence.drawn <= self._cooldown

    def _rests(self, key: str, version: int) -> bool:
        evidence = self._evidence.get(key)
        if evidence is None:
            return False
        retired = self._mastered(evidence) and version - evidence.version < self._section.reprobe_versions
        return retired or self._cools(key)

    def _fill_window(self, version: int) -> None:
        for key, since in list(self._window.items()):
            if self._windows - since >= PATIENCE or self._rests(key, version):
                del self._window[key]
        for _ in range(MAX_RESTING):
            if len(self._window) >= min(WINDOW, len(self._keys)):
                return
            epoch, place = divmod(self._position, len(self._keys))
            key = self._keys[self._shuffled(epoch)[place]]
            self._position += 1
            if key not in self._window and not self._rests(key, version):
                self._window[key] = self._windows

    def _shuffled(self, epoch: int | str) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self._keys)))
            random.Random(f"{self._where}/{epoch}").shuffle(order)
            kept = {name: each for name, each in self._orders.items() if name == "explored"}
            self._orders = {**kept, epoch: order}
        return self._orders[epoch]

    def observe(self, feedback: Feedback) -> None:
        """Learn from a group of one of the prompts; the order in which groups arrive changes nothing."""
        if feedback.key is None or feedback.pass_rate is None or not feedback.answers:
            return
        evidence = self._evidence.get(feedback.key) or PromptEvidence()
        discount = self._section.prompt_discount_per_version
        newest = max(evidence.version, feedback.version)
        fade, weight = discount ** (newest - evidence.version), discount ** (newest - feedback.version)
        evidence.passed = evidence.passed * fade + feedback.passed * weight
        evidence.answers = evidence.answers * fade + feedback.answers * weight
        evidence.seen += feedback.answers
        evidence.version = newest
        self._keep(feedback.key, evidence)
        if evidence.came in self._came:
            self._came[evidence.came].add(feedback, False, discount)

    def metrics(self, place: str) -> Metrics:
        """How many prompts were drawn, and how many of those are left in peace as mastered."""
        retired = sum(self._mastered(evidence) for evidence in self._evidence.values())
        return {
            f"curriculum/prompts_drawn/{place}": last(len(self._evidence)),
            f"curriculum/retired/{place}": last(retired),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the following draws, JSON-able; evidence as text, being written so often."""
        return {
            "prompts": len(self._keys),
            "position": self._position,
            "explored": self._explored,
            "windows": self._windows,
            "draws": self._draws,
            "window": dict(self._window),
            "came": msgspec.to_builtins(self._came),
            "evidence": dict(self._encoded),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; ValueError where it is of other prompts."""
        unknown = {*state["window"], *state["evidence"]} - set(self._keys)
        if unknown or state["prompts"] != len(self._keys):
            raise ValueError(
                f"the saved curriculum chose among {state['prompts']} prompts of {self._where.rpartition('/')[0]}, now "
                f"there are {len(self._keys)}, without {sorted(unknown)[:3]}; resume with the data of the saved run"
            )
        self._position, self._explored = int(state["position"]), int(state["explored"])
        self._windows, self._draws = int(state["windows"]), int(state["draws"])
        self._window = {key: int(since) for key, since in state["window"].items()}
        self._came = msgspec.convert(state["came"], dict[str, Evidence])
        self._encoded = dict(state["evidence"])
        self._evidence = {
            key: msgspec.json.decode(text, type=PromptEvidence) for key, text in state["evidence"].items()
        }
