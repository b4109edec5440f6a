"""This file tests learners/reference.py: what a policy is pulled towards, how it moves, and that a checkpoint has it.

That it goes from one rank to two and back is tested in tests/learners/test_checkpoint.py.
"""

from __future__ import annotations

import msgspec
import pytest
import torch

from learners import layouts
from learners.reference import Reference
from rl.algorithm_config import AlgorithmSection, ReferenceKl
from tests.learners.tiny import (
    order_of,
    random_group,
    save_tiny_llama,
    settings_for,
    weights_of,
    whole,
)

GROUPS = [random_group(index) for index in range(4)]
DECAY = 0.9
FROZEN = {"coefficient": 0.1}
EMA = {"coefficient": 0.1, "reference": "ema", "ema_decay": DECAY}


def settings_with(kl, model_dir, folder, **options):
    section = AlgorithmSection.model_validate({"name": "grpo", "kl": kl})
    return msgspec.structs.replace(settings_for(model_dir, folder, **options), algorithm=section)


@pytest.fixture(scope="module")
def model_of_two_layers(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def learner_with(model_of_two_layers, tmp_path, only_learner):
    """Makes learners with such a pull, one after another."""

    def make(kl, groups=GROUPS, **options):
        settings = settings_with(kl, model_of_two_layers, tmp_path / "ranks", **options)
        return only_learner(settings, groups)

    return make


def reference_weights(learner):
    return whole({name: each.detach() for name, each in learner._reference._policy.model.named_parameters()})


def shares_of(groups):
    return [layouts.Share(group, (0.0,) * len(group.rewards), (0.0,) * len(group.rewards)) for group in groups]


def divergence(learner, groups=GROUPS):
    """Mean of half the squared difference of log-probabilities: 0 where policy and reference agree."""
    packed = layouts.pack(shares_of(groups), 1)
    with torch.no_grad():
        logprobs = learner.policy(*packed.inputs, 0.8)[0]
        learner.policy.reshard()
    return (((logprobs - learner._reference.score(packed, 0.8)) ** 2) / 2).mean().item()


def scaled(learner, factor=1.1):
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.mul_(factor)
    return learner


def test_a_frozen_reference_stays_where_the_policy_started(learner_with):
    learner = learner_with(FROZEN)
    start = weights_of(learner)
    for step in (1, 2, 3):
        learner.step(order_of(GROUPS, step=step))
    torch.testing.assert_close(reference_weights(learner), start, rtol=0, atol=0)
    assert not torch.equal(weights_of(learner)["model.norm.weight"], start["model.norm.weight"])
    assert not any(each.requires_grad or each.grad is not None for each in learner._reference._policy.parameters())


def test_a_moving_reference_is_the_exponential_mean_of_the_policies_after_each_step(learner_with):
    learner = learner_with(EMA)
    expected = weights_of(learner)
    for step in (1, 2, 3):
        learner.step(order_of(GROUPS, step=step))
        policy = weights_of(learner)
        expected = {name: DECAY * mean + (1 - DECAY) * policy[name] for name, mean in expected.items()}
    torch.testing.assert_close(reference_weights(learner), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kl", [FROZEN, EMA], ids=["frozen", "ema"])
def test_a_reference_scores_as_the_policy_did_when_it_was_taken(learner_with, kl):
    learner = learner_with(kl)
    assert divergence(learner) == 0
    assert divergence(scaled(learner)) > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_without_advantages_a_step_goes_back_towards_the_reference(learner_with, estimator):
    quiet = [
        msgspec.structs.replace(
            group, trajectories=tuple(msgspec.structs.replace(t, reward=1.0) for t in group.trajectories)
        )
        for group in GROUPS
    ]
    learner = scaled(learner_with(FROZEN | {"estimator": estimator}, quiet, lr=1e-3))
    before = divergence(learner)
    for step in (1, 2):
        learner.step(order_of(quiet, step=step))
    if estimator == "k2":  # k1 and k3 are unbiased on the policy's own samples, which these answers are not
        assert divergence(learner) < before
    assert divergence(learner) != before


@pytest.mark.parametrize(("kl", "dtype"), [(FROZEN, torch.bfloat16), (EMA, torch.float32)], ids=["frozen", "ema"])
def test_a_reference_that_moves_has_masters_and_a_frozen_one_lies_in_the_compute_dtype(learner_with, kl, dtype):
    load = learner_with(None)._load_policy
    reference = Reference(ReferenceKl.model_validate(kl), load, torch.float32, torch.bfloat16)
    assert {each.dtype for each in reference._policy.parameters()} == {dtype}


def test_a_frozen_reference_adds_nothing_to_a_checkpoint(learner_with):
    assert learner_with(FROZEN)._extra_state == {"reference": {}}
    learner = learner_with(EMA)
    assert learner._extra_state["reference"].keys() == weights_of(learner).keys()


def test_loading_a_checkpoint_brings_a_moving_reference_back(learner_with, tmp_path):
    learner = learner_with(EMA)
    learner.step(order_of(GROUPS))
    learner.begin_save(str(tmp_path / "step_1"), export=False)
    learner.finish_save()
    saved = reference_weights(learner)
    learner.step(order_of(GROUPS, step=2))
    expected = reference_weights(learner)
    learner.load(str(tmp_path / "step_1" / "state"))
    torch.testing.assert_close(reference_weights(learner), saved, rtol=0, atol=0)
    learner.step(order_of(GROUPS, step=2))
    torch.testing.assert_close(reference_weights(learner), expected, rtol=0, atol=0)


def test_a_checkpoint_without_the_moving_reference_that_is_now_wanted_is_refused(learner_with, tmp_path):
    learner = learner_with(FROZEN)
    learner.begin_save(str(tmp_path / "step_1"), export=False)
    learner.finish_save()
    with pytest.raises(ValueError, match=r"does not fit this model .*reference.*algorithm\.kl"):
        learner_with(EMA).load(str(tmp_path / "step_1" / "state"))
