"""What the composition root derives before it starts anything."""

from __future__ import annotations

from rl.config_loading import load_config
from rl.launch import _plan, cache_folder
from rl.recorder import RunDirectory


def test_the_cache_of_converted_models_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_the_loops_get_the_numbers_they_need_and_not_the_config():
    plan = _plan(load_config("smoke", []), "smoke-1", start_step=2)
    assert (plan.run_id, plan.start_step, plan.groups_per_step, plan.max_lag) == ("smoke-1", 2, 2, 2)


def test_a_fresh_directory_gets_a_token_that_stays(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.owner() == directory.owner() and len(directory.owner()) == 32
