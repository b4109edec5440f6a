"""This file says what a generator asks of an inference engine, and in which words the engine answers.

`vllm_engine.py` keeps this contract with vLLM; `tests/fakes_engine.py` keeps it with a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from rl.trajectory import Completion
from rl.weights import NcclGroup, TensorDigest, WeightUpdate


class EngineDied(RuntimeError):
    """A process of an engine ended without being asked to, or hangs; the engine answers nothing any more."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine is built. name is what errors call it; threads None leaves the choice to vLLM (CPU only).

    by_priority has requests start by SampleRequest.priority, else in the order of their arrival.
    """

    name: str
    model_dir: str
    device: Literal["cpu", "cuda"]
    weight_backend: Literal["shared_memory", "nccl"]
    max_context_tokens: int
    max_sequences: int = 64
    tensor_parallel: int = 1
    kv_cache_gib: float = 1.0
    gpu_memory_fraction: float = 0.85
    threads: int | None = None
    seed: int = 0
    head_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    by_priority: bool = False


class SampleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt to be answered `count` times. seed decides all samples; temperature 0 is greedy and needs count 1.

    Of requests that wait, an engine with EngineSettings.by_priority starts those of the lowest priority first, and of
    equals the oldest; others know no priority.
    """

    request_id: str
    token_ids: tuple[int, ...]
    count: int
    max_tokens: int
    temperature: float
    seed: int
    priority: int = 0


class LoadReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine received with an update; it stamps `version` on every token sampled from then on.

    seconds maps a phase (prepare, beside the sampling and of a file alone; pause, load, resume) to its wall time.
    """

    version: int
    tensors: tuple[TensorDigest, ...]
    missing: tuple[str, ...]
    seconds: dict[str, float]


class Engine(Protocol):
    """An inference engine. Every pending call raises EngineDied within seconds of the engine's death."""

    @property
    def version(self) -> int:
        """The policy version that new tokens are stamped with."""
        ...

    @property
    def pids(self) -> tuple[int, ...]:
        """Ids of the engine's processes, this one not counted."""
        ...

    async def sample(self, request: SampleRequest) -> tuple[Completion, ...]:
        """Answer one prompt, among whatever else is running. ValueError if prompt and answer exceed the context."""
        ...

    async def sample_round(self, requests: Sequence[SampleRequest]) -> list[tuple[Completion, ...]]:
        """Answer the prompts together: the same requests give the same bits, if nothing else is sampled meanwhile."""
        ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop sampling these requests of `sample`; they answer at once with what they have, finish_reason abort.

        Samples that had ended stay as they were; ids that nothing samples are passed over. Slots and cache are free
        when this returns, or with the engine's next step.
        """
        ...

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Log-probabilities [L-1], nats at temperature 1, of token_ids [L] after the first."""
        ...

    async def join(self, group: NcclGroup, index: int) -> None:
        """Meet the sender of the nccl backend, as engine `index`; returns when the whole group has met."""
        ...

    async def load(self, update: WeightUpdate) -> LoadReceipt:
        """Replace all weights under the running sequences.

        Raises WeightUpdateError, naming the parameters, where not all weights arrived as they were sent; the version
        does not move then, and the next complete update makes the engine whole again.
        """
        ...

    async def watch(self) -> None:
        """Raise EngineDied as soon as a process of the engine is gone; until then this does not return."""
        ...

    async def probe(self, seconds: float) -> None:
        """Have every worker answer, among whatever else is running. Raises EngineDied if one does not for `seconds`.

        An engine answers between two things it does, so `seconds` must exceed the longest: a step, a weight load.
        """
        ...

    async def stop(self) -> None:
        """End the engine and all its processes; returns when they are gone."""
        ...
