"""This file acts where a metric leaves its bounds: it tightens the gate, lowers or skips a step, or stops the run.

The learner judges what concerns the step in hand (`skip_step`, `lower_step`), between gradient and optimizer step; the
driver judges the rest after the step. Every action is an event with the value that caused it.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping

import msgspec

from rl.config import Guardrail
from rl.metrics import Metrics
from rl.staleness import Gate

STEP_ACTIONS = frozenset({"skip_step", "lower_step"})  # the learner's
RUN_ACTIONS = frozenset({"tighten_gate", "stop"})  # the driver's
OF_THE_MOVE = frozenset({"learner/lr", "learner/ranks", "learner/skipped_step"})  # known only once the step is made
SPORADIC = ("/by_lag/", "/gradient_noise/")  # what a step does not report where it has nothing to tell


class Trip(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that acts now: which, how, and on what value of what metric. factor is what lower_step leaves of lr."""

    name: str
    action: str
    metric: str
    value: float
    bound: str
    factor: float

    def __str__(self) -> str:
        return f"guardrail {self.name}: {self.metric} is {self.value:.4g}, {self.bound}"


class GuardrailStop(RuntimeError):
    """A rule whose action is stop acted: the run ends, resumable from its newest checkpoint."""


class Guardrails:
    """The rules with one of `actions`, and for how many steps in a row each metric has been out of its bounds."""

    def __init__(self, rules: Mapping[str, Guardrail], actions: Container[str]) -> None:
        self._rules = {name: rule for name, rule in rules.items() if rule.action in actions}
        self._out_of_bounds = dict.fromkeys(self._rules, 0)

    def judge(self, metrics: Metrics) -> tuple[Trip, ...]:
        """Once per step: the rules that act. NaN is out of every bound; a metric that is absent changes nothing."""
        trips = []
        for name, rule in self._rules.items():
            if rule.metric not in metrics:
                continue
            value = metrics[rule.metric].value
            self._out_of_bounds[name] = 0 if within_bounds(rule, value) else self._out_of_bounds[name] + 1
            if self._out_of_bounds[name] >= rule.steps:
                trips.append(
                    Trip(
                        name=name,
                        action=rule.action,
                        metric=rule.metric,
                        value=value,
                        bound=_bound(rule),
                        factor=rule.factor,
                    )
                )
        return tuple(trips)

    def state_dict(self) -> dict[str, int]:
        """Steps out of bounds, by rule."""
        return dict(self._out_of_bounds)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting; a rule that the state does not know begins at 0."""
        self._out_of_bounds = {name: state.get(name, 0) for name in self._rules}


class GateGuard:
    """Takes a version off the gate's lag while a rule of action tighten_gate trips, and gives it back when all is calm.

    One version per step is taken, and one returns after the longest hold_steps of the rules without a trip. It is not
    saved: a resumed run starts at the configured lag, and the rules tighten it again within their steps.
    """

    def __init__(self, rules: Mapping[str, Guardrail], gate: Gate) -> None:
        self._guardrails = Guardrails(rules, RUN_ACTIONS)
        self._hold_steps = max((rule.hold_steps for rule in rules.values() if rule.action == "tighten_gate"), default=1)
        self._gate = gate
        self._calm_steps = 0

    def judge(self, metrics: Metrics) -> tuple[Trip, ...]:
        """After a step: act, and say which rules did. Raises GuardrailStop."""
        trips = self._guardrails.judge(metrics)
        for trip in trips:
            if trip.action == "stop":
                raise GuardrailStop(
                    f"{trip}, so the run stops (staleness.guardrails.{trip.name}.action); `rl resume` goes on from the "
                    "newest checkpoint, with whatever you change first in the run's config.yaml"
                )
        if trips:
            self._gate.tighten()
            self._calm_steps = 0
        elif self._gate.allowed_lag < self._gate.max_lag:
            self._calm_steps += 1
            if self._calm_steps >= self._hold_steps:
                self._gate.relax()
                self._calm_steps = 0
        return trips


def within_bounds(rule: Guardrail, value: float) -> bool:
    """Whether a value is where the rule wants it; NaN never is."""
    return value >= rule.below if rule.below is not None else rule.above is not None and value <= rule.above


def check_names(rules: Mapping[str, Guardrail], metrics: Metrics, of_learner: Metrics) -> None:
    """Raise ValueError where a rule watches what no step reports: it would never act, and nobody would notice.

    A rule about the step in hand must watch a metric of the learner, which knows no other.
    """
    for name, rule in rules.items():
        known = of_learner.keys() - OF_THE_MOVE if rule.action in STEP_ACTIONS else metrics.keys()
        if rule.metric in known or any(part in rule.metric for part in SPORADIC):
            continue
        near = difflib.get_close_matches(rule.metric, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "metrics.jsonl has the names"
        of = "what the learner knows before its step" if rule.action in STEP_ACTIONS else "the step's metrics"
        raise ValueError(f"staleness.guardrails.{name}.metric {rule.metric!r} is not among {of}; {hint}")


def _bound(rule: Guardrail) -> str:
    bound = f"below {rule.below:g}" if rule.below is not None else f"above {rule.above:g}"
    return bound if rule.steps == 1 else f"{bound} for {rule.steps} steps or more"
