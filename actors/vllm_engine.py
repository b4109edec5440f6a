"""This file puts vLLM behind the Engine contract: grouped sampling, in-flight weight updates, and death made audible.

A new version arrives between two steps of the engine: pause, keep the running sequences and their cached keys and
values, replace the weights, stamp the new version, resume. Nothing is admitted meanwhile, and a request carries the
version as its cache salt, so that it never starts on a prefix that older weights computed for another prompt's sake.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Awaitable, Iterator, Sequence
from typing import TypeVar

import msgspec
from tokenizers import Tokenizer
from transformers import TokenizersBackend
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from actors.detokenise import Detokeniser
from actors.engine import EngineDied, EngineSettings, LoadReceipt, SampleRequest
from actors.engine_arguments import engine_arguments, engine_variables, environment
from actors.watched_process import WatchedProcess
from rl.trajectory import Completion, VersionSpan
from rl.waits import Silent, answered
from rl.weights import NcclGroup, TensorDigest, WeightUpdate, WeightUpdateError

T = TypeVar("T")
STOP_SECONDS = 20.0


class VllmEngine:
    """One vLLM engine in processes of its own. Make it with `await VllmEngine.start(settings)`."""

    def __init__(self, settings: EngineSettings, llm: AsyncLLM) -> None:
        self.settings = settings
        self.version = 0
        self._llm = llm
        self._detokeniser = Detokeniser(_backend(settings, llm.get_tokenizer()))
        self._turn = asyncio.Lock()  # admission, pause and update exclude each other
        self._rounds = asyncio.Lock()
        self._torn = False
        self._processes: tuple[WatchedProcess, ...] = ()
        self._deaths: list[asyncio.Task] = []
        self._in_hand: dict[str, str] = {}  # of `sample`: the id of a request, and vLLM's own for it
        self._rounds_begun = 0
        self._scorings_begun = 0

    @classmethod
    async def start(cls, settings: EngineSettings) -> VllmEngine:
        """Start the engine's processes and load model_dir as version 0; takes a quarter of a minute on a CPU."""
        with environment(engine_variables(settings)):
            llm = await asyncio.to_thread(AsyncLLM.from_engine_args, engine_arguments(settings))
        try:
            engine = cls(settings, llm)
            await engine._set_up()
        except BaseException:
            await asyncio.to_thread(llm.shutdown)
            raise
        return engine

    async def _set_up(self) -> None:
        pids = {pid for pair in await self._llm.collective_rpc("slipstream_processes") for pid in pair} - {os.getpid()}
        self._processes = tuple(WatchedProcess(pid) for pid in sorted(pids))
        self._deaths = [asyncio.create_task(process.ended.wait()) for process in self._processes]
        await self._alive(self._llm.collective_rpc("slipstream_follow", args=(os.getpid(),)))
        await self._alive(self._llm.collective_rpc("slipstream_leave_out_ranks"))
        if self.settings.weight_backend == "shared_memory":
            await self._alive(self._llm.init_weight_transfer_engine(WeightTransferInitRequest()))
        await self._alive(self._llm.update_weight_version("0"))

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of vLLM's engine core and workers."""
        return tuple(process.pid for process in self._processes)

    async def sample(self, request: SampleRequest) -> tuple[Completion, ...]:
        async with self._turn:
            self._refuse_unfit(request)
            queue = await self._alive(self._add(request, salt=str(self.version)))
            self._in_hand[request.request_id] = queue.request_id
        try:
            return await self._finish(request, queue)
        finally:
            self._in_hand.pop(request.request_id, None)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """vLLM's own ids name the parent of a group's samples, which its public ids would leave behind in its books."""
        async with self._turn:  # whoever called `sample` before has handed his request over by then
            ours = [self._in_hand[request_id] for request_id in request_ids if request_id in self._in_hand]
            if ours:
                await self._alive(self._llm.abort(ours, internal=True))

    async def sample_round(self, requests: Sequence[SampleRequest]) -> list[tuple[Completion, ...]]:
        """All requests wait in the paused engine before the first is scheduled, so that its batches are always alike.

        The salt keeps cached prefixes of other rounds out: what is hit there depends on what ran before.
        """
        if not requests:
            return []
        async with self._rounds:
            async with self._turn:
                for request in requests:
                    self._refuse_unfit(request)
                await self._alive(self._llm.pause_generation(mode="keep", clear_cache=False))
                self._rounds_begun += 1
                salt = f"{self.version}, round {self._rounds_begun}"
                try:
                    queues = [await self._alive(self._add(request, salt)) for request in requests]
                finally:
                    await self._alive(self._llm.resume_generation())
            return list(await asyncio.gather(*map(self._finish, requests, queues)))

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        self._scorings_begun += 1
        parameters = SamplingParams(
            temperature=1.0, max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False
        )
        async with self._turn:
            self._refuse_torn()
            prompt = tokens_input(list(token_ids), cache_salt=str(self.version))
            queue = await self._alive(self._llm.add_request(f"score-{self._scorings_begun}", prompt, parameters))
        output = await self._alive(self._collect(queue))
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(token_ids)
        return tuple(
            entry[token].logprob for token, entry in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        )

    async def join(self, group: NcclGroup, index: int) -> None:
        info = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": group.rank_offset(index),
            "world_size": group.world_size,
            "packed": True,
        }
        await self._alive(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)))

    async def load(self, update: WeightUpdate) -> LoadReceipt:
        seconds: dict[str, float] = {}
        if update.path is not None:
            with _timed(seconds, "prepare"):
                await self._prepare(update)
        async with self._turn:
            with _timed(seconds, "pause"):
                await self._alive(self._llm.pause_generation(mode="keep", clear_cache=False))
            with _timed(seconds, "load"):
                received = await self._replace_weights(update)
            with _timed(seconds, "resume"):
                await self._alive(self._llm.resume_generation())
        return LoadReceipt(version=update.version, tensors=received, missing=(), seconds=seconds)

    async def watch(self) -> None:
        await asyncio.wait(self._deaths, return_when=asyncio.FIRST_COMPLETED)
        raise self._died()

    async def probe(self, seconds: float) -> None:
        try:
            await answered(self._alive(self._llm.collective_rpc("slipstream_processes")), seconds)
        except Silent as silence:
            raise EngineDied(
                f"the engine of {self.settings.name} hangs: {silence} to a probe of its workers"
            ) from silence

    async def stop(self) -> None:
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would log the end of its engine as an error
        await asyncio.to_thread(self._llm.shutdown)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await asyncio.gather(*(process.ended.wait() for process in self._processes))
        for process in self._processes:
            process.kill()
        await asyncio.gather(*self._deaths)
        del self._llm  # else vLLM shuts it down once more when the interpreter ends, and complains

    async def _prepare(self, update: WeightUpdate) -> None:
        """Have an update's file read and verified while the engine goes on; its workers are asked between two steps."""
        try:
            await self._alive(self._llm.collective_rpc("slipstream_prepare", args=(_update_info(update),)))
            while not all(await self._alive(self._llm.collective_rpc("slipstream_prepared"))):
                pass
        except EngineDied:
            raise
        except Exception as error:
            raise self._not_taken(update, error) from error

    async def _replace_weights(self, update: WeightUpdate) -> tuple[TensorDigest, ...]:
        """Load an update into the paused engine. On failure, resume only if the old weights are still whole."""
        request = WeightTransferUpdateRequest(update_info=_update_info(update))
        try:
            await self._alive(self._llm.start_weight_update())
            await self._alive(self._llm.update_weights(request))
            await self._alive(self._llm.finish_weight_update())
            received, _ = await self._received()
        except EngineDied:
            raise
        except Exception as error:  # vLLM reports a worker's exception as a bare Exception with its text
            _, self._torn = await self._received()
            if not self._torn:
                await self._alive(self._llm.resume_generation())
            raise self._not_taken(update, error) from error
        await self._alive(self._llm.update_weight_version(str(update.version)))
        self.version = update.version
        self._torn = False
        return received

    def _not_taken(self, update: WeightUpdate, error: Exception) -> WeightUpdateError:
        return WeightUpdateError(
            f"engine {self.settings.name} did not take version {update.version} and stays at {self.version}"
            f"{', paused between the two' if self._torn else ''}: {_reason(error)}"
        )

    async def _received(self) -> tuple[tuple[TensorDigest, ...], bool]:
        """What the workers received last, each having verified it, and whether one holds parts of two versions."""
        books = await self._alive(self._llm.collective_rpc("slipstream_received"))
        return msgspec.convert(books[0]["tensors"], tuple[TensorDigest, ...]), any(book["torn"] for book in books)

    async def _add(self, request: SampleRequest, salt: str) -> RequestOutputCollector:
        """Hand a request to the engine; returns when it is on its way, with the queue its output will come from."""
        parameters = SamplingParams(
            n=request.count,
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=_spread(request.seed),  # sample i uses this seed + i
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=False,
        )
        prompt = tokens_input(list(request.token_ids), cache_salt=salt)
        return await self._llm.add_request(request.request_id, prompt, parameters, priority=request.priority)

    async def _finish(self, request: SampleRequest, queue: RequestOutputCollector) -> tuple[Completion, ...]:
        output = await self._alive(self._collect(queue))
        outputs = sorted(output.outputs, key=lambda each: each.index)
        texts = await self._detokeniser.texts(request.token_ids, [_readable(each) for each in outputs])
        return tuple(map(_completion, outputs, texts))

    async def _collect(self, queue: RequestOutputCollector) -> RequestOutput:
        """The final output; an abandoned request is aborted, so that it frees its place."""
        try:
            while not (output := await queue.get()).finished:
                pass
            return output
        except asyncio.CancelledError:
            if not self._dead:
                await self._llm.abort(queue.request_id, internal=True)
            raise
        finally:
            queue.close()

    def _refuse_unfit(self, request: SampleRequest) -> None:
        self._refuse_torn()
        needed = len(request.token_ids) + request.max_tokens
        if needed > self.settings.max_context_tokens:
            raise ValueError(
                f"prompt {request.request_id} has {len(request.token_ids)} tokens and asks for {request.max_tokens} "
                f"more, but the context holds {self.settings.max_context_tokens}; raise model.max_context_tokens to "
                f"{needed}, lower rollout.max_tokens, or leave this prompt out"
            )

    def _refuse_torn(self) -> None:
        if self._torn:
            raise WeightUpdateError(f"engine {self.settings.name} holds parts of two versions since an update failed")

    @property
    def _dead(self) -> bool:
        return any(process.ended.is_set() for process in self._processes) or self._llm.errored

    async def _alive(self, call: Awaitable[T]) -> T:
        """Await an answer of the engine, or its death: vLLM itself leaves some calls pending for ever then."""
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait({task, *self._deaths}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        except EngineDeadError as error:
            raise self._died() from error
        finally:
            task.cancel()
        raise self._died()

    def _died(self) -> EngineDied:
        gone = [process.pid for process in self._processes if process.ended.is_set()]
        how = f"its processes {gone} ended, and nobody had called stop()" if gone else "vLLM gave up after an error"
        return EngineDied(f"the engine of {self.settings.name} died: {how}; the log of {self.settings.name} says why")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _spread(seed: int) -> int:
    """A 62-bit seed, so that neighbouring request seeds do not share samples: those add their index to it."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest()) >> 2


def _update_info(update: WeightUpdate) -> dict:
    tensors = msgspec.to_builtins(update.tensors)
    if update.path is not None:
        return {"path": update.path, "tensors": tensors}
    broadcast = sorted(update.tensors, key=lambda tensor: tensor.name)  # the order of learners/nccl_sender.py
    return {
        "names": [tensor.name for tensor in broadcast],
        "dtype_names": [tensor.dtype for tensor in broadcast],
        "shapes": [list(tensor.shape) for tensor in broadcast],
        "tensors": tensors,
    }


def _backend(settings: EngineSettings, tokenizer: object) -> Tokenizer:
    """What vLLM's tokenizer decodes with. Raises ValueError for one of vLLM's own making, or in Python."""
    if not isinstance(tokenizer, TokenizersBackend):
        raise ValueError(
            f"the tokenizer of {settings.model_dir} is a {type(tokenizer).__name__}, which the tokenizers library does "
            "not run; add a tokenizer.json to the model's directory"
        )
    return tokenizer.backend_tokenizer


def _readable(output: CompletionOutput) -> Sequence[int]:
    """The tokens that vLLM would make text of: without the one that ended the answer."""
    return output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids


def _completion(output: CompletionOutput, text: str) -> Completion:
    """vLLM's output in our words. Completion itself refuses lengths and spans that disagree."""
    token_ids = tuple(output.token_ids)
    entries = output.logprobs or []
    return Completion(
        text=text,
        token_ids=token_ids,
        logprobs=tuple(entry[token].logprob for token, entry in zip(token_ids, entries, strict=True)),
        spans=tuple(VersionSpan(int(span.version), span.start, span.end) for span in output.weight_versions or ()),
        finish_reason=output.finish_reason if output.finish_reason in ("stop", "length") else "abort",
    )


def _reason(error: Exception) -> str:
    """What a worker said: vLLM hands its exception on as a bare Exception, with words around the text."""
    said = re.search(r"Worker failed with error '(.*)', please check", str(error), re.DOTALL)
    return said[1] if said else str(error)
