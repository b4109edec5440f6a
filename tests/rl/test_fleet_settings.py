"""What engines and learner ranks are built from, derived from a config."""

from __future__ import annotations

import pathlib

import pytest

from rl.check import share_threads
from rl.config_loading import load_config
from rl.fleet_settings import _anywhere, _transport, generator_settings, limits_of
from rl.recorder import RunDirectory


def settings_of(tmp_path, *overrides):
    config = load_config("arithmetic", overrides)
    return config, generator_settings(config, RunDirectory(tmp_path), share_threads(config, cores=2), "model", "redis:")


def test_a_file_reward_means_the_same_in_another_working_directory():
    assert _anywhere("rewards_of_mine.py:even") == f"{pathlib.Path('rewards_of_mine.py').absolute()}:even"
    assert _anywhere("math") == "math"
    assert _anywhere("package.module:function") == "package.module:function"


def test_every_source_is_judged_by_the_rewards_that_name_it_or_name_none(tmp_path):
    override = "rewards.functions.correct.sources=[sums, products, operations, divisors]"
    config, settings = settings_of(tmp_path, override)
    assert set(settings.generator.reward_names) == set(config.sources)
    assert set(settings.generator.reward_names.values()) == {("correct",)}
    assert settings.num_gpus == 0 and settings.engine.threads == 1


@pytest.mark.parametrize(("address", "reserved"), [("", 0), ("127.0.0.1:6379", 1)])
def test_cores_are_reserved_on_a_shared_cluster_only(tmp_path, monkeypatch, address, reserved):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert settings_of(tmp_path)[1].num_cpus == reserved


@pytest.mark.parametrize(
    ("address", "asked", "transport"),
    [
        ("", "auto", "dense"),
        ("ray:1", "auto", "auto"),
        ("", "delta", "delta"),
        ("ray:1", "dense", "dense"),
    ],
)
def test_deltas_are_made_where_generators_may_be_on_other_nodes_or_when_asked_for(
    monkeypatch, address, asked, transport
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert _transport(load_config("smoke", [f"weights.transport={asked}"])) == transport


def test_every_process_has_the_same_limits_of_the_buffer():
    config = load_config("smoke", ["buffer.max_groups=7", "buffer.reconnect_deadline_s=9"])
    limits = limits_of(config)
    assert (limits.max_groups, limits.reconnect_deadline_s) == (7, 9.0)
