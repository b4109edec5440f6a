"""This file is the worker of bench_weights.py: ours, which can also reload the model bare, to compare with."""

from __future__ import annotations

import time

from safetensors.torch import load_file
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.weight_receiver import renew_tied
from actors.worker_extension import WorkerExtension


class BareReload(WorkerExtension):
    """vLLM's own layerwise reload, of tensors that lie in memory already; nothing is verified, nothing paused."""

    def slipstream_bare_reload(self, path: str) -> tuple[float, float]:
        """Seconds that it took, without and with the tied head renewed, which would stay the old one."""
        tensors = list(load_file(path).items())
        for _, tensor in tensors:
            tensor.sum()  # has it in memory
        start = time.perf_counter()
        initialize_layerwise_reload(self.model_runner.model)
        self.model_runner.model.load_weights(tensors)
        finalize_layerwise_reload(self.model_runner.model, self.model_runner.model_config)
        bare = time.perf_counter() - start
        start = time.perf_counter()
        renew_tied(self.model_runner.model)
        return bare, bare + time.perf_counter() - start
