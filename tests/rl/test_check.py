"""This file checks the arithmetic that `rl check` shows, and the problems it finds before anything starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from rich.console import Console

from rl.check import (
    arithmetic,
    checkpoint_bytes,
    checkpoints_at_once,
    devices_needed,
    disk_shortfall,
    longest_group_tokens,
    memory_bytes,
    problems,
    render,
    share_threads,
)
from rl.config import RunConfig
from rl.config_loading import parse_config

BASE = """
run: {steps: 40}
model: {path: someone/small-135M, device: cpu, max_context_tokens: 192}
sources:
  sums: {kind: reasoning_gym, dataset: chain_sum, levels: {easy: {max_terms: 2}, hard: {max_terms: 3}}}
rewards: {functions: {correct: {use: reasoning_gym}}}
"""


def config_with(*overrides: str) -> RunConfig:
    return parse_config(BASE, "base.yaml", overrides)


def values(config: RunConfig, cores: int = 2) -> dict[str, str]:
    return {row.what: row.value for row in arithmetic(config, cores)}


def accept(use: str) -> object:
    return use


def test_the_arithmetic_of_a_batch_is_as_on_paper():
    shown = values(config_with("learner.ranks=2", "learner.micro_batch_tokens=1100"))
    assert shown["trajectories per step"] == "64"
    assert shown["sampled tokens per step, at most"] == "3,072"
    assert shown["packed tokens per step, at most"] == "4,224"  # 8 * (144 + 8 * 48)
    assert shown["micro-batches per rank, at full length"] == "2"  # 4 groups, 2 fit
    assert shown["trajectories in the run"] == "2,560"


def test_the_lag_bound_says_how_much_may_be_ahead():
    assert values(config_with())["groups in flight and buffered, at most"] == "24"
    assert values(config_with("staleness.max_lag=0"))["groups in flight and buffered, at most"] == "8"
    assert values(config_with("generators.count=5"))["sequences decoded together, at most"] == "192"


def test_evaluations_are_counted_before_during_and_after():
    assert values(config_with())["times"] == "5"  # 0, 10, 20, 30, 40
    assert values(config_with("run.steps=41"))["times"] == "6"
    assert values(config_with("evaluation.every_steps=100"))["times"] == "2"
    assert values(config_with())["held-out prompts, each time"] == "64"


def test_a_source_without_held_out_part_is_not_evaluated():
    shown = values(config_with("sources.file={kind: jsonl, path: x.jsonl}", "sources.hub={kind: hub, dataset: a/b}"))
    assert shown["held-out prompts, each time"] == "64"


def test_cores_are_shared_out_evenly_unless_the_config_says():
    assert share_threads(config_with(), cores=8).engine == 4
    assert share_threads(config_with("generators.count=3"), cores=2).rank == 1
    named = share_threads(config_with("generators.threads=3", "learner.threads_per_rank=5"), cores=2)
    assert (named.engine, named.rank) == (3, 5)


def test_gpus_are_counted_for_engines_and_ranks():
    assert devices_needed(config_with()) == 0
    assert devices_needed(config_with("model.device=cuda", "generators.tensor_parallel=2", "learner.ranks=4")) == 6
    assert values(config_with("model.device=cuda"))["GPUs"] == "2"


def test_sizes_follow_from_the_number_of_parameters():
    shown = values(config_with())
    assert checkpoint_bytes(10, config_with()) == 140
    moving = config_with("algorithm.kl.coefficient=0.1", "algorithm.kl.reference=ema")
    assert checkpoint_bytes(10, moving) == 180, "the reference's masters are saved too"
    assert shown["parameters"] == "135.0 million"
    assert shown["one weight update"] == "257 MiB"
    assert shown["checkpoints on disk, at most"] == "5.3 GiB"


def test_a_model_of_unknown_size_is_said_to_be_unknown():
    assert values(config_with("model.path=someone/unknown"))["parameters"] == "unknown"


def test_memory_grows_with_engines_and_parameters():
    small, two = config_with(), config_with("generators.count=2")
    assert memory_bytes(small, 10**8) < memory_bytes(two, 10**8) < memory_bytes(two, 10**9)


def test_the_longest_group_is_what_the_config_demands_of_a_micro_batch():
    config = config_with()
    assert config_with(f"learner.micro_batch_tokens={longest_group_tokens(config)}")
    with pytest.raises(ValueError, match=f"raise it to {longest_group_tokens(config)}"):
        config_with(f"learner.micro_batch_tokens={longest_group_tokens(config) - 1}")


def test_a_sound_config_has_no_problems():
    assert problems(config_with(), accept) == []


def test_problems_of_model_sources_rewards_and_buffer_are_found_together():
    def refuse(use: str) -> object:
        raise ValueError(f"no reward {use!r}; take another")

    broken = config_with(
        "model.path=/nowhere/model", "sources.sums.dataset=chain_sums", "rewards.functions.correct.use=wrong",
        "buffer.max_bytes=65536", "rollout.max_tokens=100", "model.max_context_tokens=200",
    )  # fmt: skip
    model, source, reward, buffer = problems(broken, refuse)
    assert "model.path '/nowhere/model' is no directory" in model
    assert "chain_sum" in source
    assert reward == "rewards.functions.correct: no reward 'wrong'; take another"
    assert "buffer.max_bytes 65536 cannot hold one batch" in buffer and "raise it to 307200" in buffer


def test_the_table_shows_every_row_once():
    console = Console(width=200, record=True)
    rows = arithmetic(config_with(), 2)
    with console.capture() as capture:
        console.print(render(rows, "arithmetic"))
    assert all(capture.get().count(row.what) == 1 for row in rows)


def test_a_run_whose_checkpoints_do_not_fit_on_the_disk_is_refused_with_bytes_and_a_fix(tmp_path, monkeypatch):
    config = config_with("checkpoint.every_steps=10", "checkpoint.keep=2")
    needed = 3 * checkpoint_bytes(135_000_000, config)
    free = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr("rl.check.shutil.disk_usage", lambda folder: free)
    told = disk_shortfall(config, tmp_path)
    assert f"{needed - 1:,} bytes free" in told and "3 checkpoints" in told and "checkpoint.keep (now 2)" in told
    (tmp_path / "checkpoints" / "step_000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000010" / "state").write_bytes(b"x")
    assert disk_shortfall(config, tmp_path) is None, "what lies there already will be replaced"


def test_a_run_with_fewer_saves_than_it_may_keep_needs_the_disk_of_those_only():
    assert checkpoints_at_once(config_with("run.steps=5", "checkpoint.every_steps=10", "checkpoint.keep=2")) == 1
    assert checkpoints_at_once(config_with("run.steps=40", "checkpoint.every_steps=10", "checkpoint.keep=2")) == 3


def test_with_a_row_for_each_answer_a_micro_batch_must_hold_the_longest_context_only():
    longest = config_with().model.max_context_tokens
    config = config_with("learner.packing=per_answer", f"learner.micro_batch_tokens={longest}")
    assert longest_group_tokens(config) == longest
    with pytest.raises(ValueError, match=f"packing per_answer.*raise it to {longest}"):
        config_with("learner.packing=per_answer", f"learner.micro_batch_tokens={longest - 1}")
    assert "before each answer" in str(arithmetic(config, cores=2))
