"""This file guesses what a run's parts cost from the model's size and a table of devices, before anything was measured.

The CPU core is SmolLM2-135M under vLLM with one thread: 210 tokens/s with 16 sequences in flight, 305 with 64. The
GPUs are data sheets times the shares of them that are usual. docs/planner.md says what is in the guess and what not.
"""

from __future__ import annotations

import math

import msgspec

from rl import model_size
from rl.config import RunConfig
from rl.planner_costs import Costs, Lengths

WEIGHT_BYTES = 2  # bf16
OPTIMISER_BYTES = 40  # read and written per parameter: fp32 master, gradient and moments
TRAINING_BYTES = 18  # per parameter, held by the learner ranks together
CACHE_BYTES_OF_8B = 131_072  # keys and values of a token in Llama 3 8B; larger models share heads among more layers
DOUBLING = 0.9  # of the speed that twice the devices of one engine could bring

MEAN_LENGTH = 0.4  # of rollout.max_tokens
LENGTH_SIGMA = 0.6
ZERO_ADVANTAGE = 0.35
JUDGE_S = 0.01
MEASURE = "guessed; measure with: rl run CONFIG run.steps=6, then rl plan CONFIG --from RUN"


class Device(msgspec.Struct, frozen=True):
    """What one device reaches in practice: bytes/s of memory, FLOP/s when it samples and when it trains."""

    name: str
    memory_bytes_per_s: float
    sampling_flops: float
    training_flops: float
    update_bytes_per_s: float  # of weights, from learner to engine
    memory_bytes: float


def _gpu(name: str, bandwidth: float, flops: float, gigabytes: float) -> Device:
    """A data sheet at 60% of its bandwidth, 40% of its bf16 FLOP/s to sample and 35% to train; half a 400 Gb link."""
    return Device(name, 0.6 * bandwidth, 0.4 * flops, 0.35 * flops, 25e9, gigabytes * 1e9)


DEVICES = {
    "cpu": Device("CPU core", 8.7e9, 96e9, 96e9, 0.4e9, 8e9),
    "a100": _gpu("A100", 2.04e12, 312e12, 80),
    "h100": _gpu("H100", 3.35e12, 989e12, 80),
    "h200": _gpu("H200", 4.8e12, 989e12, 141),
}


def step_ratio(device: str) -> float:
    """engine_fixed_s / engine_sequence_s of a model of any size: how many sequences cost as much as the weights."""
    one = DEVICES[device]
    return WEIGHT_BYTES / one.memory_bytes_per_s * one.sampling_flops / 2


def guess(config: RunConfig, device: str, engine_devices: int = 1, rank_devices: int = 1) -> Costs:
    """Costs of a configuration on a device, one engine and one rank each on so many of them.

    Raises:
        ValueError: nothing says how large the model is.
    """
    parameters = model_size.count_parameters(config.model.path)
    if parameters is None:
        raise ValueError(
            f"model.path {config.model.path} is not on disk and its name says no size, so that nothing can be guessed; "
            "download it, or give costs: --costs FILE, or --from RUN"
        )
    mean = max(1.0, MEAN_LENGTH * config.rollout.max_tokens)
    return guess_for(
        parameters,
        DEVICES[device],
        Lengths(mean_tokens=mean, sigma=LENGTH_SIGMA),
        prompt_tokens=config.max_prompt_tokens / 2,
        group_size=config.rollout.group_size,
        engine_devices=engine_devices,
        rank_devices=rank_devices,
    )


def guess_for(
    parameters: int,
    device: Device,
    lengths: Lengths,
    prompt_tokens: float,
    group_size: int,
    engine_devices: int = 1,
    rank_devices: int = 1,
) -> Costs:
    """Costs of a model of so many parameters: reading weights and cache, and 2 or 6 FLOP a parameter and token."""
    engine, rank = _together(engine_devices), _together(rank_devices)
    cache = CACHE_BYTES_OF_8B * (parameters / 8e9) ** 0.35 * (prompt_tokens + lengths.mean / 2)
    token_flop_s = 2 * parameters / device.sampling_flops / engine
    trained_per_token = 1 + prompt_tokens / (group_size * lengths.mean)  # a prompt is computed once for its group
    weights_s = WEIGHT_BYTES * parameters / device.update_bytes_per_s
    return Costs(
        engine_fixed_s=WEIGHT_BYTES * parameters / device.memory_bytes_per_s / engine,
        engine_sequence_s=token_flop_s + cache / device.memory_bytes_per_s / engine,
        prefill_token_s=token_flop_s,
        prompt_tokens=prompt_tokens,
        lengths=lengths,
        judge_s=JUDGE_S,
        zero_advantage_share=ZERO_ADVANTAGE,
        learner_fixed_s=OPTIMISER_BYTES * parameters / device.memory_bytes_per_s / least_ranks(parameters, device),
        learner_token_s=6 * parameters * trained_per_token / device.training_flops / rank,
        publish_s=weights_s / 2,
        pause_s=weights_s / engine_devices,
        origin=f"{device.name}, {parameters / 1e6:,.0f} million parameters: {MEASURE}",
    )


def least_ranks(parameters: int, device: Device) -> int:
    """Ranks below which the optimizer's state does not fit, with a fifth of the memory left for activations."""
    return max(1, math.ceil(TRAINING_BYTES * parameters / (0.8 * device.memory_bytes)))


def _together(devices: int) -> float:
    """The speed of so many devices that compute one thing together, of one of them."""
    return devices * DOUBLING ** math.log2(devices)
