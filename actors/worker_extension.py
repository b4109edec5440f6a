"""This file is what Slipstream adds to vLLM's worker: an end with its owner, weights made ready ahead, less to count.

The worker is a process of its own, or lives in vLLM's engine core: on a CPU, without tensor parallelism, the two are
one. `weight_receiver.py`, which vLLM's worker learns of by this module's import, holds the weight-transfer engines.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import select
import signal
import threading
from typing import Any

import msgspec
import torch
import vllm
import vllm.v1.sample.sampler

import actors.weight_receiver  # noqa: F401  registers our backends before vLLM looks for them

RANKS_LEFT_OUT_IN = "0.32.0"
PREPARE_WAIT_S = 0.005  # of an engine that has nothing to sample; one that has comes back with its next step


class WorkerExtension:
    """Mixed into vLLM's worker (worker_extension_cls); its methods answer collective_rpc."""

    def slipstream_processes(self) -> tuple[int, int]:
        """Process ids of this worker and of its parent: vLLM's engine core, or its owner where the two are one."""
        return os.getpid(), os.getppid()

    def slipstream_follow(self, owner: int) -> None:
        """End this worker and the engine core when process `owner` is gone: vLLM's core would run on for nobody."""
        core = [] if os.getppid() == owner else [os.pidfd_open(os.getppid())]
        arguments = (os.pidfd_open(owner), core)
        threading.Thread(target=_end_with, args=arguments, daemon=True, name="follows its owner").start()

    def slipstream_leave_out_ranks(self) -> bool:
        """Sample without counting how many tokens were likelier than each that was sampled: nobody reads it here."""
        return leave_out_ranks(vllm.__version__)

    def slipstream_prepare(self, update_info: dict[str, Any]) -> None:
        """Begin to read and verify an update, beside the sampling; `slipstream_prepared` says when that is done."""
        preparing: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.slipstream_preparing = preparing
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]  the worker's

        def prepare() -> None:
            try:
                preparing.set_result(engine.prepare(update_info))
            except Exception as error:
                preparing.set_exception(error)

        threading.Thread(target=prepare, daemon=True, name="prepares an update").start()

    def slipstream_prepared(self) -> bool:
        """Whether the update is ready to be loaded; raises what kept it from that."""
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.slipstream_preparing.result(PREPARE_WAIT_S)
            return True
        return False

    def slipstream_received(self) -> dict[str, Any]:
        """The books of the latest update, as plain values."""
        books = self.weight_transfer_engine.books  # type: ignore[attr-defined]  the worker's
        return {"tensors": msgspec.to_builtins(books.received), "torn": books.torn}


def leave_out_ranks(version: str) -> bool:
    """Have vLLM report rank 0 for every token, where it is the version that this was written for.

    With logprobs=0 vLLM compares each sampled token with its whole vocabulary, for a rank beside the log-probability:
    https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/sample/sampler.py#L351, and on a CPU without a compiler
    that is 49,152 comparisons, kept, and summed. Its log-probabilities come from elsewhere. A way to ask for these
    alone is under discussion: https://github.com/vllm-project/vllm/pull/57442.
    """
    if version.partition("+")[0] != RANKS_LEFT_OUT_IN:
        return False
    vllm.v1.sample.sampler.batched_count_greater_than = _no_ranks  # pyright: ignore[reportPrivateImportUsage]
    return True


def _no_ranks(logprobs_NV: torch.Tensor, sampled_N1: torch.Tensor) -> torch.Tensor:
    return torch.zeros(logprobs_NV.shape[0], dtype=torch.int64, device=logprobs_NV.device)


def _end_with(owner: int, core: list[int]) -> None:
    select.select([owner], [], [])  # a pidfd is readable when its process has ended
    for process in core:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
