"""This file holds the tests of actors/vllm_engine.py and actors/weight_receiver.py on a real engine and model."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import sys
import time

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from actors.engine import EngineDied, SampleRequest
from actors.vllm_engine import VllmEngine, _readable
from actors.watched_process import WatchedProcess
from actors.weight_receiver import digest_all
from rl.weights import TensorDigest, WeightUpdate, WeightUpdateError, combined
from tests.fakes_engine import until

QUESTION = "<|im_start|>user\nWhat is 3+4?<|im_end|>\n<|im_start|>assistant\n"
NORM = "model.layers.0.input_layernorm.weight"
KEY_PROJECTION = "model.layers.3.self_attn.k_proj.weight"


@pytest.fixture(scope="session")
def prompt(model_dir) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(model_dir).encode(QUESTION))


@pytest.fixture(scope="session")
def weights(model_dir) -> dict[str, torch.Tensor]:
    """The starting weights, as they lie in the model's directory."""
    return load_file(pathlib.Path(model_dir) / "model.safetensors")


@pytest.fixture
async def restored(engine, weights, tmp_path):
    """The engine, which gets its starting weights back after the test, as the version the test left."""
    yield engine
    await engine.load(write_update(tmp_path / "restored.safetensors", engine.version, weights))


def write_update(path: pathlib.Path, version: int, tensors: dict[str, torch.Tensor]) -> WeightUpdate:
    save_file(tensors, path)
    digests = tuple(digest_all(tensors.items()))
    return WeightUpdate(
        version=version,
        backend="shared_memory",
        tensors=digests,
        digest=combined(digests),
        canary_token_ids=(1, 2),
        canary_logprobs=(-1.0,),
        path=str(path),
        node="here",
        num_bytes=path.stat().st_size,
    )


def scaled(weights: dict[str, torch.Tensor], factor: float) -> dict[str, torch.Tensor]:
    return {name: tensor * factor if name == NORM else tensor for name, tensor in weights.items()}


def without(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in weights.items() if key != name}


def ask(prompt, request_id: str, **changes) -> SampleRequest:
    fields = {"count": 4, "max_tokens": 24, "temperature": 1.0, "seed": 5}
    return SampleRequest(request_id=request_id, token_ids=prompt, **fields | changes)


async def tokens(engine, request: SampleRequest) -> list[tuple[int, ...]]:
    """What the engine answers when nothing else is running."""
    (completions,) = await engine.sample_round([request])
    return [completion.token_ids for completion in completions]


async def test_a_group_has_tokens_logprobs_and_one_version_per_token(engine, prompt):
    completions = await engine.sample(ask(prompt, "group", count=8))
    assert len({completion.token_ids for completion in completions}) > 1, "the samples must not share one seed"
    for completion in completions:
        assert len(completion.logprobs) == len(completion.token_ids) > 0
        assert all(logprob <= 0.0 for logprob in completion.logprobs)
        assert [(span.version, span.start, span.end) for span in completion.spans] == [
            (engine.version, 0, len(completion.token_ids))
        ]
        assert (completion.finish_reason == "length") == (len(completion.token_ids) == 24)


async def test_more_prompt_tokens_at_once_than_one_engine_step_takes_are_sampled_with_seeds(engine, prompt):
    long = prompt * 6
    prompts = [(100 + index, *long) for index in range(1 + 2 * 2048 // len(long))]
    requests = [ask(each, f"crowd {index}", count=1, max_tokens=2) for index, each in enumerate(prompts)]
    answers = await asyncio.gather(*(engine.sample(request) for request in requests))
    assert len(answers) == len(prompts) and all(completion.token_ids for (completion,) in answers)


async def test_logprobs_are_those_of_the_sampled_tokens_under_the_temperature(engine, prompt, model_dir):
    (completion,) = await engine.sample(ask(prompt, "temperature", count=1, temperature=0.5, max_tokens=96))
    sequence, logprobs_T = prompt + completion.token_ids, torch.tensor(completion.logprobs)
    scaled_T = reference_logprobs(model_dir, sequence, temperature=0.5)[len(prompt) - 1 :]
    unscaled_T = reference_logprobs(model_dir, sequence)[len(prompt) - 1 :]
    assert (logprobs_T - scaled_T).abs().mean() < 0.1  # dividing by 0.5 doubles what bf16 makes of it
    assert (logprobs_T - unscaled_T).abs().mean() > 0.2


async def test_a_score_agrees_with_transformers(engine, prompt, model_dir):
    (completion,) = await engine.sample(ask(prompt, "scored", count=1, max_tokens=96))
    sequence = prompt + completion.token_ids
    score_T = torch.tensor(await engine.score(sequence))
    assert score_T.shape == (len(sequence) - 1,)
    assert (score_T - reference_logprobs(model_dir, sequence)).abs().mean() < 0.05


def reference_logprobs(model_dir: str, sequence: tuple[int, ...], temperature=1.0, weights=None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model.load_state_dict(weights or {}, strict=False)
    ids_L = torch.tensor(sequence)
    with torch.no_grad():
        logits_LV = model(ids_L[None]).logits[0, :-1].float() / temperature
    return logits_LV.log_softmax(-1).gather(-1, ids_L[1:, None])[:, 0]


async def test_an_answers_text_is_the_one_that_vllm_writes_token_by_token(engine, prompt):
    parameters = {"max_tokens": 40, "seed": 3, "output_kind": RequestOutputKind.FINAL_ONLY}
    seen: set[str] = set()
    for temperature in (1.0, 2.0):  # sense, and parts of characters
        asked = SamplingParams(n=24, temperature=temperature, **parameters)
        (answer,) = [each async for each in engine._llm.generate(tokens_input(list(prompt)), asked, f"{temperature}")]
        texts = await engine._detokeniser.texts(prompt, [_readable(each) for each in answer.outputs])
        assert texts == [each.text for each in answer.outputs]
        seen |= set(texts)
    assert len(seen) > 20


async def test_the_text_of_an_answer_leaves_out_the_token_that_ended_it(engine, prompt, model_dir):
    completions = await engine.sample(ask(prompt, "text", count=16, max_tokens=64))
    ended = [each for each in completions if each.finish_reason == "stop"]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert ended and all(each.text == tokenizer.decode(each.token_ids[:-1]) for each in ended)


async def test_with_priorities_the_lowest_number_of_those_that_wait_starts_first(engine, engine_settings, prompt):
    settings = msgspec.structs.replace(engine_settings, name="by priority", by_priority=True, max_sequences=4)
    other = await VllmEngine.start(settings)
    ended: list[str] = []

    async def sample(name: str, priority: int) -> None:
        await other.sample(ask(prompt, name, max_tokens=16, temperature=2.0, priority=priority))
        ended.append(name)

    await other._llm.pause_generation(mode="keep", clear_cache=False)
    samples = [asyncio.create_task(sample(*each)) for each in (("short", -1), ("unknown", 0), ("longest", -9))]
    await until(lambda: len(other._in_hand) == 3)
    await other._llm.resume_generation()
    await asyncio.gather(*samples)
    assert ended == ["longest", "short", "unknown"]
    same = [await each.sample_round([ask(prompt, "same")]) for each in (engine, other)]
    assert same[0][0][0].token_ids == same[1][0][0].token_ids
    await other.stop()


async def test_a_prompt_that_cannot_fit_is_refused_with_its_id_and_lengths(engine, prompt):
    with pytest.raises(ValueError, match=r"prompt too-long has 16 tokens and asks for 241 .*256.*to 257"):
        await engine.sample(ask(prompt[:16], "too-long", max_tokens=241))
    with pytest.raises(ValueError, match="prompt too-long"):
        await engine.sample_round([ask(prompt, "fits"), ask(prompt[:16], "too-long", max_tokens=241)])
    assert await engine.sample(ask(prompt[:16], "fits", max_tokens=4))


async def test_rounds_of_one_seed_are_the_same_to_the_last_bit(engine, prompt):
    requests = [ask(prompt[: len(prompt) - index % 3], f"round {index}", seed=index) for index in range(8)]
    first = await engine.sample_round(requests)
    assert first == await engine.sample_round(requests)
    assert first[0] != await engine.sample(ask(prompt, "another seed", seed=99))


async def test_an_update_in_the_middle_of_generation_splits_the_versions(restored, prompt, weights, tmp_path):
    engine, version = restored, restored.version
    update = write_update(tmp_path / "update", version + 1, scaled(weights, 1.01))
    running = asyncio.create_task(engine.sample(ask(prompt, "spans", count=8, max_tokens=200, temperature=1.5)))
    await engine.score(prompt)  # comes back only after the group has begun
    receipt = await engine.load(update)
    assert (receipt.version, receipt.tensors) == (version + 1, tuple(sorted_by(receipt.tensors, update.tensors)))
    assert set(receipt.seconds) == {"prepare", "pause", "load", "resume"}
    completions = await running
    split = [completion for completion in completions if len(completion.spans) == 2]
    assert split and all([span.version for span in each.spans] == [version, version + 1] for each in split)
    assert all(each.spans[0].end == each.spans[1].start > 0 for each in split)
    after = await engine.sample(ask(prompt, "after"))
    assert {span.version for completion in after for span in completion.spans} == {version + 1}


def sorted_by(received: tuple[TensorDigest, ...], sent: tuple[TensorDigest, ...]) -> list[TensorDigest]:
    """The sent digests in the order in which they were received."""
    by_name = {tensor.name: tensor for tensor in sent}
    return [by_name[tensor.name] for tensor in received]


async def test_an_update_changes_what_is_computed_and_its_inverse_restores_every_bit(engine, prompt, weights, tmp_path):
    before = await engine.score(prompt)
    await engine.load(write_update(tmp_path / "changed", engine.version + 1, scaled(weights, 1.5)))
    changed = await engine.score(prompt)
    await engine.load(write_update(tmp_path / "restored", engine.version + 1, weights))
    assert changed != before and await engine.score(prompt) == before


async def test_an_update_reaches_the_output_head_that_shares_its_weights_with_the_embedding(
    restored, prompt, weights, model_dir, tmp_path
):
    """On a CPU vLLM computes with a repacked copy of the tied head, which a reload of the embedding does not renew."""
    assert "lm_head.weight" not in weights
    changed = weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"] * 1.5}
    await restored.load(write_update(tmp_path / "changed", restored.version + 1, changed))
    score_T = torch.tensor(await restored.score(prompt))
    expected_T = reference_logprobs(model_dir, prompt, weights=changed)
    assert (expected_T - reference_logprobs(model_dir, prompt)).abs().mean() > 0.5
    assert (score_T - expected_T).abs().mean() < 0.1


async def test_bytes_other_than_those_sent_are_refused_and_the_old_weights_stay(engine, prompt, weights, tmp_path):
    version, before = engine.version, await tokens(engine, ask(prompt, "before"))
    update = write_update(tmp_path / "altered", version + 1, scaled(weights, 1.5))
    save_file(scaled(weights, 1.6), tmp_path / "altered")
    with pytest.raises(WeightUpdateError, match=f"stays at {version}: .*other bytes than were sent: {NORM}"):
        await engine.load(update)
    assert engine.version == version
    assert await tokens(engine, ask(prompt, "before")) == before
    await engine.load(write_update(tmp_path / "whole", version + 1, weights))
    assert engine.version == version + 1


@pytest.mark.parametrize("name, complaint", [(NORM, NORM), (KEY_PROJECTION, "model.layers.3.self_attn.qkv_proj")])
async def test_a_tensor_that_the_sender_forgot_is_named_and_a_whole_update_heals(
    engine, prompt, weights, tmp_path, name, complaint
):
    version, before = engine.version, await engine.score(prompt)
    with pytest.raises(WeightUpdateError, match=f"filled by no received tensor: {complaint}"):
        await engine.load(write_update(tmp_path / "partial", version + 1, without(scaled(weights, 1.5), name)))
    assert engine.version == version
    with pytest.raises(WeightUpdateError, match="parts of two versions"):
        await engine.sample(ask(prompt, "between"))
    await engine.load(write_update(tmp_path / "whole", version + 1, weights))
    assert engine.version == version + 1 and await engine.score(prompt) == before


async def test_a_file_that_is_not_there_leaves_the_engine_as_it_was(engine, prompt, weights, tmp_path):
    version = engine.version
    update = write_update(tmp_path / "update", version + 1, weights)
    with pytest.raises(WeightUpdateError, match="missing"):
        await engine.load(msgspec.structs.replace(update, path=str(tmp_path / "missing")))
    assert engine.version == version and await engine.sample(ask(prompt, "goes on", max_tokens=2))


async def test_an_abandoned_request_is_aborted_and_the_engine_goes_on(engine, prompt):
    abandoned = asyncio.create_task(engine.sample(ask(prompt, "abandoned", max_tokens=200)))
    await engine.score(prompt)
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    assert await engine.sample(ask(prompt, "next", max_tokens=2))


async def test_an_aborted_group_answers_at_once_with_what_it_has_and_leaves_nothing_in_the_engine(
    restored, prompt, weights, tmp_path
):
    engine, version = restored, restored.version
    running = asyncio.create_task(engine.sample(ask(prompt, "tail", count=8, max_tokens=200, temperature=1.5)))
    alone = asyncio.create_task(engine.sample(ask(prompt, "alone", count=1, max_tokens=200, temperature=1.5)))
    states = engine._llm.output_processor.request_states
    await until(lambda: len(states) == 9 and all(each.detokenizer.num_output_tokens() for each in states.values()))
    loading = asyncio.create_task(engine.load(write_update(tmp_path / "update", version + 1, weights)))
    await asyncio.sleep(0)
    just_asked = asyncio.create_task(engine.sample(ask(prompt, "just asked", max_tokens=200)))
    await asyncio.sleep(0)
    await engine.abort(["tail", "alone", "just asked", "nobody's"])
    async with asyncio.timeout(10):
        completions = [*await running, *await alone, *await just_asked]
    await loading
    assert len(completions) == 8 + 1 + 4
    cut = [each for each in completions if each.finish_reason == "abort"]
    assert any(0 < len(each.token_ids) < 200 for each in cut) and all(len(each.token_ids) < 200 for each in cut)
    assert all({span.version for span in each.spans} <= {version, version + 1} for each in cut)
    books = engine._llm.output_processor
    assert not (books.request_states or books.parent_requests or books.external_req_ids or engine._in_hand)
    assert {each.finish_reason for each in await engine.sample(ask(prompt, "next", max_tokens=2))} <= {"length", "stop"}


async def test_a_probe_is_answered_while_the_engine_samples_and_while_it_loads(restored, prompt, weights, tmp_path):
    engine = restored
    running = asyncio.create_task(engine.sample(ask(prompt, "long", count=8, max_tokens=200, temperature=1.5)))
    await engine.score(prompt)  # comes back only after the group has begun
    await engine.probe(30)
    assert not running.done()
    loading = asyncio.create_task(engine.load(write_update(tmp_path / "update", engine.version + 1, weights)))
    await asyncio.sleep(0)
    await engine.probe(30)
    await asyncio.gather(running, loading)


async def test_a_stopped_engine_is_noticed_by_a_probe_within_its_time(engine, prompt):
    (core,) = engine.pids  # on a CPU the worker lives in the engine core
    os.kill(core, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(EngineDied, match="engine of test hangs: no answer for 2 s to a probe of its workers"):
            await engine.probe(2)
        assert time.monotonic() - began < 10
    finally:
        os.kill(core, signal.SIGCONT)
    await engine.probe(60)
    assert await engine.sample(ask(prompt, "after the stop", max_tokens=2))


async def test_a_killed_engine_ends_every_pending_call_and_leaves_no_process(engine, engine_settings, prompt):
    doomed = await VllmEngine.start(msgspec.structs.replace(engine_settings, name="doomed"))
    round_here = await engine.sample_round([ask(prompt, "same")])
    assert round_here[0][0].token_ids == (await doomed.sample_round([ask(prompt, "same")]))[0][0].token_ids
    (core,) = doomed.pids
    pending = [
        asyncio.create_task(doomed.sample(ask(prompt, "pending", max_tokens=200))),
        asyncio.create_task(doomed.sample_round([ask(prompt, "pending", max_tokens=200)])),
    ]
    await doomed.score(prompt)
    os.kill(core, signal.SIGKILL)
    async with asyncio.timeout(10):
        for outcome in await asyncio.gather(*pending, return_exceptions=True):
            assert isinstance(outcome, EngineDied) and "engine of doomed died" in str(outcome)
        for call in (doomed.score(prompt), doomed.sample(ask(prompt, "late")), doomed.probe(5), doomed.watch()):
            with pytest.raises(EngineDied):
                await call
    await doomed.stop()
    assert not is_running(core)


def is_running(pid: int) -> bool:
    """Zombies do not run: where nobody reaps orphans, as in many containers, they stay."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


OWNER = """
import asyncio, sys, msgspec
from actors.engine import EngineSettings
from actors.vllm_engine import VllmEngine

async def main():
    engine = await VllmEngine.start(msgspec.json.decode(sys.argv[1], type=EngineSettings))
    print("pids", *engine.pids, flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_an_engine_does_not_outlive_a_killed_owner(engine_settings, tmp_path):
    script = tmp_path / "owner.py"  # a file, because vLLM's spawned processes import the main module
    script.write_text(OWNER)
    owner = await asyncio.create_subprocess_exec(
        sys.executable,
        script,
        msgspec.json.encode(engine_settings),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )
    async with asyncio.timeout(120):
        while not (line := await owner.stdout.readline()).startswith(b"pids"):
            assert line, "the owner ended before its engine was up"
    processes = [WatchedProcess(int(pid)) for pid in line.split()[1:]]
    owner.kill()
    async with asyncio.timeout(10):
        await asyncio.gather(owner.wait(), *(process.ended.wait() for process in processes))
