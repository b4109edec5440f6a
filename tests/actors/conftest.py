"""This file gives the tests of actors/ a real engine on the real model, started once a session."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def engine_settings(model_dir):
    from actors.engine import EngineSettings

    return EngineSettings(
        name="test",
        model_dir=model_dir,
        device="cpu",
        weight_backend="shared_memory",
        max_context_tokens=256,
        max_sequences=16,
        kv_cache_gib=0.5,
        threads=1,
    )


@pytest.fixture(scope="session")
async def engine(engine_settings):
    from actors.vllm_engine import VllmEngine

    engine = await VllmEngine.start(engine_settings)
    yield engine
    await engine.stop()
