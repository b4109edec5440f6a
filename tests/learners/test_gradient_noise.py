"""This file tests learners/gradient_noise.py on gradients whose mean and covariance are known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from learners.gradient_noise import GradientNoise
from learners.layouts import Share
from learners.model import join_ranks
from tests.learners.tiny import random_group

SIGNAL = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
DEVIATION = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
GROUP = random_group(0, rewards=(1.0,))
TOKENS = len(GROUP.trajectories[0].completion.token_ids)


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    join_ranks(f"file://{tmp_path_factory.mktemp('ranks')}/rendezvous", 0, 1, "cpu", 60.0)
    yield
    dist.destroy_process_group()


def noise_of(sizes, generator, weight=0.25):
    """One batch of micro-batches with that many groups, each group's gradient drawn around SIGNAL."""
    parameters = [nn.Parameter(torch.zeros(3, dtype=torch.float64)), nn.Parameter(torch.zeros(1, dtype=torch.float64))]
    noise, total = GradientNoise(parameters, len(sizes)), torch.zeros(4, dtype=torch.float64)
    for index, size in enumerate(sizes):
        draws = SIGNAL + DEVIATION * torch.randn(size, 4, generator=generator, dtype=torch.float64)
        total = total + weight * draws.sum(0)
        parameters[0].grad, parameters[1].grad = total[:3].clone(), total[3:].clone()
        noise.after(index, [Share(GROUP, (1.0,), (weight / TOKENS,))] * size)
    return {name.removeprefix("learner/gradient_noise/"): metric.value for name, metric in noise.metrics().items()}


@pytest.mark.parametrize("sizes", [(4, 4), (1, 5), (2, 3, 1, 2), (3, 2, 4)])
def test_signal_and_trace_are_unbiased_whatever_the_sizes_of_the_halves(sizes):
    generator = torch.Generator().manual_seed(sum(sizes))
    draws = [noise_of(sizes, generator) for _ in range(600)]
    for name, expected in {"squared_signal": SIGNAL.square().sum(), "trace": DEVIATION.square().sum()}.items():
        values = torch.tensor([draw[name] for draw in draws], dtype=torch.float64)
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values)), name


def test_the_scale_is_their_ratio_and_absent_where_an_estimate_is_not_positive():
    generator = torch.Generator().manual_seed(0)
    draws = [noise_of((2, 2), generator) for _ in range(50)]
    with_scale = [draw for draw in draws if "scale/groups" in draw]
    assert 0 < len(with_scale) < len(draws)
    for draw in draws:
        assert ("scale/groups" in draw) == (draw["squared_signal"] > 0 and draw["trace"] > 0)
    for draw in with_scale:
        assert draw["scale/groups"] == pytest.approx(draw["trace"] / draw["squared_signal"])


def test_gradients_without_noise_have_no_trace():
    parameters = [nn.Parameter(torch.zeros(4, dtype=torch.float64))]
    noise = GradientNoise(parameters, 2)
    for index in range(2):
        parameters[0].grad = SIGNAL * (index + 1)
        noise.after(index, [Share(GROUP, (1.0,), (1 / TOKENS,))])
    found = noise.metrics()
    assert found["learner/gradient_noise/trace"].value == pytest.approx(0, abs=1e-12)
    assert found["learner/gradient_noise/squared_signal"].value == pytest.approx(SIGNAL.square().sum().item())


@pytest.mark.parametrize("sizes", [(4,), (3, 0), (0, 3)])
def test_halves_that_cannot_be_compared_give_no_estimate(sizes):
    assert noise_of(sizes, torch.Generator().manual_seed(0)) == {}
