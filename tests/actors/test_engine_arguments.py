"""This file holds the tests of actors/engine_arguments.py: what vLLM is asked for, on which kind of machine."""

from __future__ import annotations

import os

import msgspec
import pytest
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from actors.engine import EngineSettings
from actors.engine_arguments import engine_arguments, engine_variables, environment


@pytest.fixture
def settings(model_dir) -> EngineSettings:
    return EngineSettings(
        name="test", model_dir=model_dir, device="cpu", weight_backend="shared_memory", max_context_tokens=256
    )


def test_on_a_cpu_the_worker_lives_in_the_core_unless_there_are_several(settings):
    assert engine_arguments(settings).distributed_executor_backend is UniProcExecutor
    several = msgspec.structs.replace(settings, tensor_parallel=2)
    cuda = msgspec.structs.replace(settings, device="cuda")
    assert [engine_arguments(each).distributed_executor_backend for each in (several, cuda)] == [None, None]


def test_a_priority_counts_only_where_it_is_asked_for(settings):
    by_priority = msgspec.structs.replace(settings, by_priority=True)
    assert [engine_arguments(each).scheduling_policy for each in (settings, by_priority)] == ["fcfs", "priority"]


def test_the_environment_is_put_back(settings, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    before = dict(os.environ)
    with environment(engine_variables(msgspec.structs.replace(settings, threads=2))):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "nobind")
    assert dict(os.environ) == before
