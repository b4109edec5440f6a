"""This file tests what guardrails do to a learner's step, and that an entropy bonus does what it says.

That ranks decide alike is tested in tests/learners/test_invariances.py.
"""

from __future__ import annotations

import math

import msgspec
import pytest
import torch

from learners import layouts
from learners.optimizer import NonFiniteGradient
from rl.algorithm_config import AlgorithmSection
from rl.config import Guardrail
from tests.learners.tiny import (
    order_of,
    random_group,
    save_tiny_llama,
    settings_for,
    weights_of,
    whole,
)

GROUPS = [random_group(index) for index in range(4)]
ALWAYS = {"metric": "policy/lag_max/versions", "above": -1.0}


def broken(group):
    """The group with a log-probability that is not a number."""
    first = group.trajectories[0]
    completion = msgspec.structs.replace(first.completion, logprobs=(math.nan, *first.completion.logprobs[1:]))
    first = msgspec.structs.replace(first, completion=completion)
    return msgspec.structs.replace(group, trajectories=(first, *group.trajectories[1:]))


BROKEN = [broken(GROUPS[0]), *GROUPS[1:]]


def guarded(model_dir, folder, rules, **options):
    rules = {name: Guardrail.model_validate(rule) for name, rule in rules.items()}
    return msgspec.structs.replace(settings_for(model_dir, folder, **options), guardrails=rules)


@pytest.fixture(scope="module")
def model_of_two_layers(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def learner_with(model_of_two_layers, tmp_path, only_learner):
    """Makes learners with such guardrails, one after another."""

    def make(rules, groups=GROUPS, algorithm=None, **options):
        settings = guarded(model_of_two_layers, tmp_path / "ranks", rules, **options)
        if algorithm is not None:
            settings = msgspec.structs.replace(settings, algorithm=AlgorithmSection.model_validate(algorithm))

        return only_learner(settings, groups)

    return make


def moments_of(learner):
    state = learner._optimizer.state
    named = learner.policy.model.named_parameters()
    return whole({f"{name}/{key}": value for name, each in named for key, value in state[each].items()})


def test_a_skipped_step_leaves_weights_moments_and_counter_where_they_were_but_makes_a_version(learner_with):
    learner = learner_with({"calm": ALWAYS | {"action": "skip_step", "steps": 2}}, warmup_steps=4)
    first = learner.step(order_of(GROUPS))
    assert first.trips == () and first.metrics["learner/skipped_step"].value == 0
    moved = learner.publish(2)
    weights, moments = weights_of(learner), moments_of(learner)
    report = learner.step(order_of(GROUPS, step=2))
    torch.testing.assert_close(weights_of(learner), weights, rtol=0, atol=0)
    torch.testing.assert_close(moments_of(learner), moments, rtol=0, atol=0)
    assert learner._steps_done == 1 and all(each.grad is None for each in learner.policy.parameters())
    (trip,) = report.trips
    assert (trip.name, trip.action, trip.metric, trip.value) == ("calm", "skip_step", ALWAYS["metric"], 1.0)
    assert report.version == 2 and report.metrics["learner/skipped_step"].value == 1
    assert report.metrics["learner/lr"].value == 0 and report.metrics["learner/grad_norm"].value > 0
    after = learner.publish(3)
    assert moved.moved and not after.moved and after.digest == moved.digest


def test_a_step_after_a_skipped_one_is_the_step_that_it_would_have_been(learner_with):
    learner = learner_with({}, groups=GROUPS, warmup_steps=4)
    learner.step(order_of(GROUPS))
    expected = weights_of(learner)
    learner = learner_with(
        {"nan": {"metric": "learner/grad_norm", "above": 1e9, "action": "skip_step"}}, warmup_steps=4
    )
    learner._fetch = lambda ids: BROKEN
    learner.step(order_of(BROKEN))
    learner._fetch = lambda ids: GROUPS
    assert learner.step(order_of(GROUPS)).metrics["learner/lr"].value == pytest.approx(1e-2 / 4)
    torch.testing.assert_close(weights_of(learner), expected, rtol=0, atol=0)


def test_a_lowered_step_has_the_product_of_the_factors_of_its_rules(learner_with):
    half, tenth = (ALWAYS | {"action": "lower_step", "factor": factor} for factor in (0.5, 0.1))
    learner = learner_with({"half": half, "tenth": tenth, "stop": ALWAYS | {"action": "stop"}})
    before = weights_of(learner)
    report = learner.step(order_of(GROUPS))
    assert [trip.name for trip in report.trips] == ["half", "tenth"]  # what concerns the run is the driver's
    assert report.metrics["learner/lr"].value == pytest.approx(1e-2 * 0.05)
    lowered = weights_of(learner)
    small = learner_with({}, lr=1e-2 * 0.05)
    small.step(order_of(GROUPS))
    torch.testing.assert_close(weights_of(small), lowered, rtol=1e-12, atol=1e-15)
    assert learner.publish(2).moved and not torch.equal(before["model.norm.weight"], lowered["model.norm.weight"])


def test_a_gradient_that_is_not_finite_is_skipped_by_a_rule_on_its_norm_and_raises_without_one(learner_with):
    rule = {"metric": "learner/grad_norm", "above": 1e9}
    learner = learner_with({"nan": rule | {"action": "skip_step"}}, BROKEN)
    before = weights_of(learner)
    report = learner.step(order_of(BROKEN))
    assert [trip.name for trip in report.trips] == ["nan"] and math.isnan(report.trips[0].value)
    assert not learner.publish(2).moved
    torch.testing.assert_close(weights_of(learner), before, rtol=0, atol=0)
    for rules in ({}, {"low": rule | {"action": "lower_step"}}, {"late": rule | {"action": "skip_step", "steps": 2}}):
        learner = learner_with(rules, BROKEN)
        with pytest.raises(NonFiniteGradient):
            learner.step(order_of(BROKEN))
        torch.testing.assert_close(weights_of(learner), before, rtol=0, atol=0)


def test_a_step_that_raised_leaves_no_gradient_to_the_next(learner_with):
    learner = learner_with({})
    learner.step(order_of(GROUPS))
    expected = weights_of(learner)
    learner = learner_with({}, max_logprob_gap=0.01)
    with pytest.raises(ValueError, match="max_logprob_gap"):
        learner.step(order_of(GROUPS, first=True))
    learner.step(order_of(GROUPS))
    torch.testing.assert_close(weights_of(learner), expected, rtol=0, atol=0)


def entropy_after(learner, steps=3):
    quiet = [
        msgspec.structs.replace(
            group, trajectories=tuple(msgspec.structs.replace(t, reward=1.0) for t in group.trajectories)
        )
        for group in GROUPS
    ]
    learner._fetch = lambda ids: quiet
    for step in range(1, steps + 1):
        report = learner.step(order_of(quiet, step=step))
    weights = (0.0,) * 4
    packed = layouts.pack([layouts.Share(group, weights, weights) for group in quiet], 1)
    with torch.no_grad():
        entropy = learner.policy(*packed.inputs, 0.8)[1].mean().item()
        learner.policy.reshard()
    return entropy, report


def test_an_entropy_bonus_raises_the_entropy_where_nothing_else_pulls(learner_with):
    without, report = entropy_after(learner_with({}))
    assert "policy/entropy/nats" not in report.metrics  # nothing has a gradient, so that nothing was computed
    raised, report = entropy_after(learner_with({}, algorithm={"name": "grpo", "entropy_coefficient": 0.1}))
    assert raised > without + 0.01
    assert without < report.metrics["policy/entropy/nats"].value < raised
