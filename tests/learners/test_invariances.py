"""This file tests that an objective's gradient depends on its batch alone: no split, order, rank or padding shows.

Also that every name trains. The tiny model's norms compute in fp64 here, and not in fp32 as Llama's do: what differs
between two layouts is then the order of sums in fp64.
"""

from __future__ import annotations

import pathlib
import random

import msgspec
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from learners import layouts
from learners.algorithms import find_algorithm
from learners.gradient import BatchGradient
from rl.algorithm_config import PRESETS, AlgorithmSection
from rl.config import Guardrail
from rl.trajectory import VersionSpan
from tests.learners.tiny import (
    gradients_of,
    make_learner,
    order_of,
    plan_within,
    random_group,
    run_ranks,
    save_tiny_llama,
    settings_for,
    weights_of,
)

VERSION = 5
KL = {"coefficient": 0.3}
GIVEN = {name: {"name": name} for name in PRESETS} | {
    "ppo_clip, dual clip": {"name": "grpo", "loss": {"dual_clip": 1.1}},
    "log_linear": {"name": "decoupled", "loss": {"anchor": "log_linear", "weight_high": 1.2}},
    "tis of sequences": {"name": "tis", "loss": {"level": "sequence", "weight_high": 1.2}},
    "dppo_tv, tight": {"name": "dppo_tv", "loss": {"delta": 1e-3, "kappa": 0.3}},
    "m2po, tight": {"name": "m2po", "loss": {"tau": 0.02}},
    "mask of tokens": {"name": "dppo_tv", "mask": {"level": "token", "low": 0.8, "high": 1.3}},
    "mask of sequences": {"name": "cispo", "mask": {"level": "sequence", "low": 0.5, "high": 1.6}},
    "mask by the geometric mean": {"name": "gspo", "mask": {"level": "geometric", "low": 0.9, "high": 1.15}},
    "truncated answers masked": {"name": "grpo", "mask_truncated": True},
    "k1": {"name": "grpo", "kl": KL | {"estimator": "k1"}},
    "k2": {"name": "scalerl", "kl": KL | {"estimator": "k2"}},
    "k3": {"name": "dr_grpo", "kl": KL, "mask_truncated": True},
    "k1, ema": {"name": "grpo", "kl": KL | {"estimator": "k1", "reference": "ema"}},
    "k2, ema": {"name": "tis", "kl": KL | {"estimator": "k2", "reference": "ema"}},
    "k3, ema": {"name": "m2po", "kl": KL | {"reference": "ema"}},
    "entropy bonus": {"name": "dapo", "entropy_coefficient": 0.3},
}
SECTIONS = {name: AlgorithmSection.model_validate(given) for name, given in GIVEN.items()}
REFERENCES = {kind: AlgorithmSection.model_validate({"kl": KL | {"reference": kind}}) for kind in ("frozen", "ema")}
each_objective = pytest.mark.parametrize("name", SECTIONS)


def precise_norms(patch: pytest.MonkeyPatch) -> None:
    """The norm of the tiny model, without its excursion to fp32."""

    def forward(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    patch.setattr(LlamaRMSNorm, "forward", forward)


def moved_from_start(settings, groups, rank=0, world_size=1):
    """A learner whose policy is no longer the reference."""
    learner = make_learner(settings, groups, rank, world_size)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.mul_(1.05)  # by element, so that shards do not matter
    return learner


def with_objective(learner, section):
    """The learner with another objective around the same policy and reference."""
    learner._algorithm = find_algorithm(section)
    reference = learner._reference if section.kl else None
    learner._gradient = BatchGradient(learner.policy, reference, learner._algorithm, 0.8, learner._stopwatch)
    return learner


def completed(trajectory, **changes):
    return msgspec.structs.replace(trajectory, completion=msgspec.structs.replace(trajectory.completion, **changes))


def sampled_near(learner, groups):
    """The groups as if sampled by policies near the learner's, 0 to 5 versions old; every fourth answer was cut."""
    rng = random.Random(0)
    found = []
    for index, group in enumerate(groups):
        count = len(group.trajectories)
        everything = [msgspec.structs.replace(t, reward=0.0) for t in group.trajectories]
        whole = msgspec.structs.replace(group, trajectories=tuple(everything))
        with torch.no_grad():
            packed = layouts.pack([layouts.Share(whole, (0.0,) * count, (0.0,) * count)], VERSION)
            logprobs = iter(learner.policy(*packed.inputs, 0.8)[0].tolist())
        trajectories = []
        for number, trajectory in enumerate(group.trajectories):
            length, shift = len(trajectory.completion.token_ids), rng.gauss(0, 0.1)
            values = tuple(min(-1e-3, next(logprobs) + shift + rng.gauss(0, 0.2)) for _ in range(length))
            old = (index + number) % 6
            middle = length // 2
            spans = (VersionSpan(max(0, old - 1), 0, middle), VersionSpan(old, middle, length))
            reason = "length" if rng.random() < 0.25 else "stop"
            trajectories.append(completed(trajectory, logprobs=values, spans=spans, finish_reason=reason))
        found.append(msgspec.structs.replace(group, trajectories=tuple(trajectories)))
    return found


def order_at_version(groups):
    return msgspec.structs.replace(order_of(groups), version=VERSION)


def gradient_of(learner, groups, rank=0, world_size=1, budget=1000):
    order = order_at_version(groups)
    plan = plan_within(learner, order.entries, world_size, budget)
    mine = {index: groups[index] for index in plan.groups_of(rank)}
    metrics = learner.accumulate_gradient(order, plan, mine)
    return gradients_of(learner), metrics


def assert_same(found, expected, relative=1e-9):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= relative * gradient.norm(), name


def reference_of(section):
    return section.kl.reference if section.kl else "frozen"


class Laid:
    """The groups, a learner per kind of reference, and each objective's gradient in one micro-batch."""

    def __init__(self, model_dir: str, folder: pathlib.Path) -> None:
        self.model_dir, self.folder = model_dir, folder
        raw = [random_group(index, rewards=(0.0, 1.0, None, 0.25)) for index in range(3)]
        raw += [random_group(3, rewards=(0.0, 1.0)), random_group(4), random_group(5, rewards=(1.0, 1.0, 0.0))]
        raw += [random_group(6, rewards=(1.0, 1.0, 1.0))]  # says nothing
        settings = settings_for(model_dir, folder / "one")
        self._learners = {
            kind: moved_from_start(msgspec.structs.replace(settings, algorithm=section), raw)
            for kind, section in REFERENCES.items()
        }
        self.groups = sampled_near(self._learners["frozen"], raw)
        self._expected: dict[str, dict] = {}

    def learner(self, name: str):
        section = SECTIONS[name]
        return with_objective(self._learners[reference_of(section)], section)

    def expected(self, name: str):
        if name not in self._expected:
            self._expected[name], _ = gradient_of(self.learner(name), self.groups)
        return self._expected[name]

    def close(self) -> None:
        for learner in reversed(self._learners.values()):  # the first is in the process group for all
            learner.close()


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariances")
    with pytest.MonkeyPatch.context() as patch:
        precise_norms(patch)
        made = Laid(save_tiny_llama(folder / "model"), folder)
        yield made
        made.close()


@each_objective
@pytest.mark.parametrize("budget", [44, 90])
def test_micro_batches_do_not_matter(laid, name, budget):
    found, metrics = gradient_of(laid.learner(name), laid.groups, budget=budget)
    assert_same(found, laid.expected(name))
    assert "learner/gradient_noise/trace" in metrics


@each_objective
def test_the_order_of_groups_and_of_a_groups_answers_does_not_matter(laid, name):
    rng = random.Random(1)
    shuffled = [
        msgspec.structs.replace(group, trajectories=tuple(rng.sample(group.trajectories, len(group.trajectories))))
        for group in rng.sample(laid.groups, len(laid.groups))
    ]
    assert shuffled != laid.groups
    assert_same(gradient_of(laid.learner(name), shuffled, budget=90)[0], laid.expected(name))


@each_objective
def test_neither_padding_nor_a_shared_prompt_matters(laid, name):
    """One row per answer, all in one padded micro-batch and each in its own, against rows of several answers."""
    learner = laid.learner(name)
    order = order_at_version(laid.groups)
    plan = learner.plan(order.entries)
    advantages = learner._algorithm.advantage([group.rewards for group in laid.groups])
    rows = []
    for group, values, weights in zip(laid.groups, advantages, plan.weights, strict=True):
        for trajectory, value, weight in zip(group.trajectories, values, weights, strict=True):
            if value is None:
                continue
            alone = msgspec.structs.replace(group, trajectories=(trajectory,))
            rows.append(layouts.Share(alone, (value,), (weight,)))
    for shares in ([rows], [[row] for row in rows]):
        learner.policy.zero_grad()
        learner._gradient.accumulate(shares, (plan.num_tokens,), VERSION)
        assert_same(gradients_of(learner), laid.expected(name))


def save_rank_gradients(rank, world_size, model_dir, folder, groups):
    """Every objective's gradient on this many ranks, and what each rank's metrics say. Runs in a process of its own."""
    settings = settings_for(model_dir, pathlib.Path(folder))
    with pytest.MonkeyPatch.context() as patch:
        precise_norms(patch)
        learners = {
            kind: moved_from_start(msgspec.structs.replace(settings, algorithm=section), groups, rank, world_size)
            for kind, section in REFERENCES.items()
        }
        found, told = {}, {}
        for name, section in SECTIONS.items():
            learner = with_objective(learners[reference_of(section)], section)
            found[name], told[name] = gradient_of(learner, groups, rank, world_size, budget=90)
        for learner in reversed(learners.values()):
            learner.close()
        decided = decide(settings_for(model_dir, pathlib.Path(folder) / "guarded"), groups[:3], rank, world_size)
        told = {name: msgspec.to_builtins(metrics) for name, metrics in told.items()}
        torch.save((found, told, decided), f"{folder}/{rank}")


def decide(settings, groups, rank, world_size):
    """What guardrails make of two steps, by rules on what ranks have in common and on what they have not."""
    padding = Guardrail(metric="learner/padding_fraction", above=0.0, action="lower_step")
    norm = Guardrail(metric="learner/grad_norm", above=0.0, action="skip_step", steps=2)
    settings = msgspec.structs.replace(settings, guardrails={"padding": padding, "norm": norm})
    learner = make_learner(settings, groups, rank, world_size)
    reports = [learner.step(order_of(groups, step=step)) for step in (1, 2)]
    trips = [msgspec.to_builtins(report.trips) for report in reports]
    done, moved = learner._steps_done, learner._moved
    learner.close()
    return trips, done, moved


@pytest.fixture(scope="module")
def of_two_ranks(laid):
    folder = laid.folder / "two"
    run_ranks(save_rank_gradients, 2, laid.model_dir, str(folder), laid.groups)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@each_objective
def test_the_number_of_ranks_does_not_matter(laid, of_two_ranks, name):
    assert_same(of_two_ranks[0][0][name], laid.expected(name))


@each_objective
def test_every_rank_reads_the_same_metrics_to_the_last_bit_so_that_guardrails_decide_alike(of_two_ranks, name):
    first, second = (metrics[name] for _, metrics, _ in of_two_ranks)
    assert first == second and 0 < first["learner/padding_fraction"]["value"] < 1


def test_all_ranks_lower_and_skip_the_same_steps(of_two_ranks):
    (*_, first), (*_, second) = of_two_ranks
    assert first == second
    trips, steps_done, moved = first
    assert [[trip["name"] for trip in step] for step in trips] == [["padding"], ["padding", "norm"]]
    assert steps_done == 1 and not moved


@each_objective
def test_the_batch_gives_what_an_objective_does_something_to_do(laid, name):
    """Without this the tests above could hold for want of a masked or clipped token."""
    value = {key: metric.value for key, metric in gradient_of(laid.learner(name), laid.groups)[1].items()}
    loss, mask = SECTIONS[name].loss, SECTIONS[name].mask
    if loss.name in ("ppo_clip", "gspo") or "log_linear" in name or "of sequences" in name and mask is None:
        assert value["policy/clip_fraction"] > 0
    if mask is not None or "tight" in name or SECTIONS[name].mask_truncated or loss.name == "icepop" and name == "mis":
        assert 0 < value["policy/mask_fraction"] < 1


@each_objective
def test_every_objective_trains(laid, name):
    """From a configured name to moved weights, in the dtypes of a run."""
    settings = settings_for(laid.model_dir, laid.folder / "one", micro_batch_tokens=90)
    learner = make_learner(msgspec.structs.replace(settings, algorithm=SECTIONS[name]), laid.groups, dtype=None)
    before = weights_of(learner)
    report = learner.step(order_at_version(laid.groups))
    after = weights_of(learner)
    assert torch.tensor([report.metrics[f"learner/{what}"].value for what in ("loss", "grad_norm")]).isfinite().all()
    assert all(weight.isfinite().all() and not torch.equal(weight, before[key]) for key, weight in after.items())
    learner.close()


class CountingPolicy:
    """Counts forward passes."""

    def __init__(self, policy):
        self.calls, self._handle = 0, policy.register_forward_pre_hook(self._count)

    def _count(self, module, arguments):
        self.calls += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


@each_objective
def test_only_a_loss_that_must_see_the_whole_batch_first_makes_a_forward_pass_ahead(laid, name):
    learner = laid.learner(name)
    budget = 90
    order = order_at_version(laid.groups)
    plan = plan_within(learner, order.entries, 1, budget)
    with CountingPolicy(learner.policy) as counted:
        gradient_of(learner, laid.groups, budget=budget)
    assert counted.calls == len(plan.micro_batches[0]) * (2 if SECTIONS[name].loss.name == "m2po" else 1)


def test_an_aggregation_weight_is_what_a_loss_is_multiplied_by(laid):
    """With every answer's weight doubled, so is the gradient, by linearity: the weights enter nowhere else."""
    learner = laid.learner("scalerl")
    order = order_at_version(laid.groups)
    plan = learner.plan(order.entries)
    advantages = learner._algorithm.advantage([group.rewards for group in laid.groups])
    shares = [
        layouts.Share(group, values, tuple(weight and 2 * weight for weight in weights))
        for group, values, weights in zip(laid.groups, advantages, plan.weights, strict=True)
    ]
    learner.policy.zero_grad()
    learner._gradient.accumulate([shares], (plan.num_tokens,), VERSION)
    doubled = {name: 2 * gradient for name, gradient in laid.expected("scalerl").items()}
    assert_same(gradients_of(learner), doubled)
