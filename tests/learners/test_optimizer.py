"""This file tests learners/optimizer.py."""

from __future__ import annotations

import pytest
import torch

from learners.optimizer import NonFiniteGradient, adamw, apply_step, clip_gradients, warmed_up


def parameter_with(gradient: list[float]) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_the_learning_rate_rises_in_equal_parts_and_then_stays():
    assert [warmed_up(1.0, step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmed_up(1.0, 0, 0) == 1.0


def test_gradients_are_scaled_to_the_global_norm_and_the_norm_before_is_told():
    parameters = [parameter_with([3.0]), parameter_with([0.0, 4.0])]
    assert clip_gradients(parameters, 1.0) == pytest.approx(5.0)
    assert parameters[0].grad.item() == pytest.approx(0.6, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error(value):
    with pytest.raises(NonFiniteGradient, match="norm is"):
        clip_gradients([parameter_with([1.0, value])], 1.0)


def test_the_first_step_equals_the_one_of_an_optimizer_that_made_its_own_state():
    ours, theirs = parameter_with([0.5, -2.0]), parameter_with([0.5, -2.0])
    apply_step(adamw([ours], (0.9, 0.95), 0.1), 1e-2)
    torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True).step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours.grad is None
