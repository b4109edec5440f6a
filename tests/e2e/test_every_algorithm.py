"""Every published objective by its name, and every part that no name uses, through the smoke config on real parts."""

from __future__ import annotations

import pytest

from rl.algorithm_config import PRESETS

PARTS = (
    "algorithm.name=decoupled algorithm.loss.anchor=log_linear algorithm.advantage=reinforce_pp_baseline",
    "algorithm.name=tis algorithm.loss.level=sequence",
    "algorithm.name=grpo algorithm.loss.dual_clip=3 algorithm.mask.level=geometric",
    "algorithm.mask_truncated=true rollout.max_tokens=32",  # of 16 tokens, all answers of a step may be cut
    "algorithm.kl.coefficient=0.01 algorithm.kl.estimator=k1 algorithm.kl.reference=ema",
    "algorithm.kl.coefficient=0.01 algorithm.kl.estimator=k2 algorithm.entropy_coefficient=0.01",
    "algorithm.kl.coefficient=0.01 algorithm.kl.estimator=k3 model.head_dtype=float32",
    "rollout.first_answers=2 rewards.overlong.soft_tokens=8 rollout.long_tail=drop",
)
QUICK = (  # ranks and checkpoints are other tests' business
    "learner.ranks=1",
    "evaluation.every_steps=99",
    "evaluation.prompts_per_level=1",
    "checkpoint.every_steps=3",
)


@pytest.mark.algorithms
@pytest.mark.parametrize("settings", [*(f"algorithm.name={name}" for name in PRESETS), *PARTS])
def test_it_trains_the_smoke_config(rl, settings):
    run = rl("run", "smoke", *QUICK, *settings.split())
    assert run.finish() == 0, run.output.read_text()
    metrics = run.metrics
    assert list(metrics["step"]) == [1, 2, 3]
    assert (metrics["learner/grad_norm"] > 0).all() and metrics["learner/loss"].notna().all()
    assert len({event["digest"] for event in run.events("weights_verified")}) > 1, "the weights moved"
