"""What the composition root derives before it starts anything."""

from __future__ import annotations

import pathlib

from rl.check import share_threads
from rl.config_loading import load_config
from rl.launch import _anywhere, _generator_settings, _plan, cache_folder
from rl.recorder import RunDirectory


def test_a_file_reward_means_the_same_in_another_working_directory():
    assert _anywhere("rewards_of_mine.py:even") == f"{pathlib.Path('rewards_of_mine.py').absolute()}:even"
    assert _anywhere("math") == "math"
    assert _anywhere("package.module:function") == "package.module:function"


def test_the_cache_of_converted_models_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_every_source_is_judged_by_the_rewards_that_name_it_or_name_none(tmp_path):
    config = load_config("arithmetic", ["rewards.functions.correct.sources=[sums, products, operations, divisors]"])
    threads = share_threads(config, cores=2)
    settings = _generator_settings(config, RunDirectory(tmp_path), threads, "model", "redis://")
    assert set(settings.generator.reward_names) == set(config.sources)
    assert set(settings.generator.reward_names.values()) == {("correct",)}
    assert settings.num_gpus == 0 and settings.engine.threads == 1


def test_the_loops_get_the_numbers_they_need_and_not_the_config():
    plan = _plan(load_config("smoke", []), "smoke-1", start_step=2)
    assert (plan.run_id, plan.start_step, plan.groups_per_step, plan.max_lag) == ("smoke-1", 2, 2, 2)
