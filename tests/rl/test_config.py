"""This file checks what RunConfig refuses, and what it derives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from rl.config import RunConfig

VALID: dict[str, Any] = {
    "run": {"steps": 3},
    "model": {"path": "some/model", "device": "cpu"},
    "sources": {"sums": {"kind": "reasoning_gym", "dataset": "chain_sum", "levels": {"easy": {}, "hard": {}}}},
    "rewards": {"functions": {"correct": {"use": "reasoning_gym"}}},
}


def with_values(**values: Any) -> dict[str, Any]:
    """The valid configuration with section__key=value put in."""
    data = copy.deepcopy(VALID)
    for path, value in values.items():
        section, key = path.split("__")
        data.setdefault(section, {})[key] = value
    return data


def test_a_run_needs_only_steps_model_sources_and_rewards():
    config = RunConfig.model_validate(VALID)
    assert config.trajectories_per_step == 64
    assert config.max_groups_ahead == 24
    assert config.max_prompt_tokens == 512 - 48


def test_lag_zero_permits_exactly_one_batch_ahead():
    config = RunConfig.model_validate(with_values(staleness__max_lag=0))
    assert config.max_groups_ahead == config.learner.groups_per_step


def test_the_backend_follows_the_device():
    assert RunConfig.model_validate(VALID).weight_backend == "shared_memory"
    assert RunConfig.model_validate(with_values(model__device="cuda")).weight_backend == "nccl"


def test_a_frozen_config_cannot_be_changed():
    config = RunConfig.model_validate(VALID)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.steps = 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"staleness__max_lag": -1}, "greater than or equal to 0"),
        ({"rollout__group_size": 1}, "set rollout.group_size to 2 or more"),
        ({"rollout__max_tokens": 512}, "leaves no room for a prompt"),
        ({"rollout__first_answers": 8}, "leaves nothing of rollout.group_size 8 for a second stage"),
        ({"rollout__first_answers": 1}, "greater than or equal to 2"),
        ({"rewards__overlong": {"soft_tokens": 49}}, "above rollout.max_tokens 48"),
        ({"rewards__functions": {"overlong": {"use": "math"}}}, "use rewards.overlong in its place"),
        ({"rollout__temperature": 0}, "greater than 0"),
        ({"learner__micro_batch_tokens": 100}, "raise it to 848"),
        ({"learner__ranks": 9}, "lower ranks"),
        ({"buffer__max_bytes": 1 << 16, "rollout__max_tokens": 1000, "model__max_context_tokens": 2000,
          "learner__micro_batch_tokens": 10000}, "has 80000 bytes or more; raise it"),
        ({"weights__backend": "nccl"}, "needs NVIDIA GPUs"),
        ({"weights__every_steps": 3, "staleness__max_lag": 1}, "lower it to 2, or raise max_lag to 2"),
        ({"weights__every_steps": 2, "staleness__guardrails": {"fresh": {
            "metric": "policy/lag_mean/versions", "above": 1.0, "action": "tighten_gate"}}}, "set every_steps to 1"),
        ({"curriculum__band_low": 0.9}, "swap them"),
        ({"run__name": "a run"}, "match pattern"),
        ({"run__stepz": 3}, "Extra inputs"),
        ({"sources__sums": {"kind": "csv"}}, "csv"),
        ({"rewards__functions": {"r": {"use": "math", "sources": ["sum"]}}}, "no source; sources are sums"),
        ({"sources__words": {"kind": "jsonl", "path": "w.jsonl"},
          "rewards__functions": {"r": {"use": "math", "sources": ["sums"]}}}, "no reward judges source words"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_work_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(with_values(**values))
