"""This file writes every objective out a second time, from its formula, in loops over plain numbers.

It shares no code and no shapes with learners/, is slow, and differentiates by complex steps: the derivative of an
analytic f is the imaginary part of f(x + ih) / h, exact to rounding because nothing is subtracted. So log π comes in as
complex numbers; sg() is the answer's own real log π; comparisons look at real parts. See each formula's source in the
docstrings of learners/losses.py and learners/advantages.py.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence

from rl.algorithm_config import AlgorithmSection
from tests.learners.oracles_batch import MAX_TOKENS, Answer, Batch, answers_of, lengths_of, rewards_of

STEP = 1e-30
EPSILON = 1e-6  # the project's, in the denominators of advantages
Numbers = Sequence[complex]


def advantages(name: str, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    everything = [reward for group in rewards for reward in group]
    return [[_advantage(name, group, i, rewards, everything) for i in range(len(group))] for group in rewards]


def _advantage(
    name: str, group: Sequence[float], i: int, batch: Sequence[Sequence[float]], every: list[float]
) -> float:
    own, others = group[i], [reward for j, reward in enumerate(group) if j != i]
    mean = sum(group) / len(group)
    match name:
        case "grpo":
            return (own - mean) / (_deviation(group) + EPSILON)
        case "dr_grpo":
            return own - mean
        case "rloo":
            return own - sum(others) / len(others)
        case "reinforce_pp":
            return (own - sum(every) / len(every)) / (_deviation(every) + EPSILON)
        case "reinforce_pp_baseline" | "batch_std":
            shaped = [reward - sum(g) / len(g) for g in batch for reward in g]
            shaped_mean = sum(shaped) / len(shaped)
            return (own - mean - shaped_mean) / (_deviation(shaped) + EPSILON)
        case "max_rl":  # the score function of a success counts 1 / successes, and the baseline is the mean score
            return (own / sum(group) - 1 / len(group)) * len(group) if sum(group) > 0 else 0.0
    raise AssertionError(name)


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def weights(name: str, lengths: Sequence[Sequence[int]], max_tokens: int) -> list[list[float]]:
    """What a token weighs, from the nested means that the papers write."""
    prompts, answers = len(lengths), sum(len(group) for group in lengths)
    tokens = sum(length for group in lengths for length in group)
    found: list[list[float]] = []
    for group in lengths:
        found.append([])
        for length in group:
            match name:
                case "token_mean":
                    found[-1].append(1 / tokens)
                case "sequence_mean":  # (1/answers) sum over answers of (1/|o|) sum over tokens
                    found[-1].append(1 / answers * (1 / length))
                case "constant_length":
                    found[-1].append(1 / answers * (1 / max_tokens))
                case "prompt_mean":  # (1/prompts) sum over prompts of 1/(tokens of the prompt) sum over its tokens
                    found[-1].append(1 / prompts * (1 / sum(group)))
    return found


def objective(section: AlgorithmSection, batch: Batch) -> tuple[float, list[float]]:
    """The scalar that a step minimises, and its derivative with respect to each token's log π."""
    frozen = [[complex(value) for value in answer.policy] for answer in answers_of(batch)]
    gradient = []
    for values in frozen:
        for t in range(len(values)):
            values[t] += 1j * STEP
            gradient.append(_scalar(section, batch, frozen).imag / STEP)
            values[t] -= 1j * STEP
    return _scalar(section, batch, frozen).real, gradient


def token_losses(section: AlgorithmSection, batch: Batch) -> list[float]:
    """The loss of each token before weights."""
    frozen = [[complex(value) for value in answer.policy] for answer in answers_of(batch)]
    return [value.real for answer in _losses(section, batch, frozen) for value in answer]


def _scalar(section: AlgorithmSection, batch: Batch, log_policy: Sequence[Numbers]) -> complex:
    of_answer = [weight for group in weights(section.aggregation, lengths_of(batch), MAX_TOKENS) for weight in group]
    losses = _losses(section, batch, log_policy)
    return sum((weight * value for weight, own in zip(of_answer, losses, strict=True) for value in own), 0j)


def _losses(section: AlgorithmSection, batch: Batch, log_policy: Sequence[Numbers]) -> list[list[complex]]:
    shaped = [value for group in advantages(section.advantage, rewards_of(batch)) for value in group]
    kept = _second_moment_survivors(batch, section.loss.tau) if section.loss.name == "m2po" else None
    found: list[list[complex]] = []
    for s, (answer, advantage, x) in enumerate(zip(answers_of(batch), shaped, log_policy, strict=True)):
        found.append([])
        for t in range(len(x)):
            if _left_out(section, answer, t):
                found[-1].append(0j)
                continue
            keeps = kept is None or (s, t) in kept
            loss = FORMULAS[section.loss.name](section.loss, answer, advantage, x, t) if keeps else 0j
            if section.kl is not None:
                loss += section.kl.coefficient * _divergence(section.kl.estimator, answer, x, t)
            found[-1].append(loss - section.entropy_coefficient * answer.entropy[t])
    return found


def _left_out(section: AlgorithmSection, answer: Answer, t: int) -> bool:
    if section.mask_truncated and answer.truncated:
        return True
    if section.mask is None:
        return False
    ratios = _ratios(answer)
    product = math.prod(ratios)
    found = {"token": ratios[t], "sequence": product, "geometric": product ** (1 / len(ratios))}[section.mask.level]
    return not section.mask.low <= found <= section.mask.high


def _ratios(answer: Answer) -> list[float]:
    return [math.exp(own) / math.exp(mu) for own, mu in zip(answer.policy, answer.sampler, strict=True)]


def _divergence(name: str, answer: Answer, x: Numbers, t: int) -> complex:
    ratio = cmath.exp(answer.reference[t]) / cmath.exp(x[t])
    match name:
        case "k1":  # the score function: its value is kept beside it, which is a constant
            value = answer.policy[t] - answer.reference[t]
            return value + value * (x[t] - answer.policy[t])
        case "k2":
            return cmath.log(ratio) ** 2 / 2
    return ratio - 1 - cmath.log(ratio)


def _least(a: complex, b: complex) -> complex:
    return a if a.real <= b.real else b


def _most(a: complex, b: complex) -> complex:
    return b if a.real <= b.real else a


def _clip(value: complex, low: float, high: float) -> complex:
    return _most(_least(value, complex(high)), complex(low))


def _surrogate(u: complex, advantage: float, low: float, high: float) -> complex:
    return _least(u * advantage, _clip(u, 1 - low, 1 + high) * advantage)


def _ppo_clip(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    ratio = cmath.exp(x[t]) / cmath.exp(answer.sampler[t])
    gain = _surrogate(ratio, advantage, knobs.clip_low, knobs.clip_high)
    if knobs.dual_clip is not None and advantage < 0:
        gain = _most(gain, complex(knobs.dual_clip * advantage))
    return -gain


def _decoupled(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    anchor = answer.policy[t]
    if knobs.anchor == "log_linear":
        v_policy, v_sampler = answer.lags[t], 0
        v_anchor = max(v_policy - 1, v_sampler)
        share = (v_anchor - v_sampler) / (v_policy - v_sampler) if v_policy else 0.0
        anchor = answer.sampler[t] + share * (answer.policy[t] - answer.sampler[t])
    weight = min(math.exp(anchor) / math.exp(answer.sampler[t]), knobs.weight_high)
    u = cmath.exp(x[t]) / cmath.exp(anchor)
    return -weight * _surrogate(u, advantage, knobs.clip_low, knobs.clip_high)


def _cispo(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    weight = min(max(_ratios(answer)[t], knobs.weight_low or 0.0), knobs.weight_high)
    return -weight * advantage * x[t]


def _aipo(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    return -min(_ratios(answer)[t], knobs.weight_high) * advantage * x[t]


def _correction(knobs, answer: Answer, t: int) -> float:
    return _ratios(answer)[t] if knobs.level == "token" else math.prod(_ratios(answer))


def _tis(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    u = cmath.exp(x[t]) / cmath.exp(answer.policy[t])
    return -min(_correction(knobs, answer, t), knobs.weight_high) * _surrogate(u, advantage, 0.2, 0.2)


def _icepop(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    found = _correction(knobs, answer, t)
    u = cmath.exp(x[t]) / cmath.exp(answer.policy[t])
    return -found * _surrogate(u, advantage, 0.2, 0.2) if knobs.weight_low <= found <= knobs.weight_high else 0j


def _gspo(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    log_ratio = sum((own - mu for own, mu in zip(x, answer.sampler, strict=True)), 0j)
    return -_surrogate(cmath.exp(log_ratio / len(x)), advantage, knobs.clip_low, knobs.clip_high)


def _dppo_tv(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    moved = math.exp(answer.policy[t]) - math.exp(answer.sampler[t])
    log_ratio = x[t] - answer.sampler[t]
    dropped = moved > knobs.delta if advantage > 0 else moved < -knobs.delta
    return (0j if dropped else -advantage * cmath.exp(log_ratio)) + knobs.kappa * log_ratio**2


def _m2po(knobs, answer: Answer, advantage: float, x: Numbers, t: int) -> complex:
    return -advantage * cmath.exp(x[t] - answer.sampler[t])


def _second_moment_survivors(batch: Batch, tau: float) -> set[tuple[int, int]]:
    moments = {
        (s, t): (own - mu) ** 2
        for s, answer in enumerate(answers_of(batch))
        for t, (own, mu) in enumerate(zip(answer.policy, answer.sampler, strict=True))
    }
    while moments and sum(moments.values()) / len(moments) >= tau:
        del moments[max(moments, key=lambda place: moments[place])]
    return set(moments)


FORMULAS: dict[str, Callable] = {
    "ppo_clip": _ppo_clip,
    "decoupled": _decoupled,
    "cispo": _cispo,
    "aipo": _aipo,
    "tis": _tis,
    "icepop": _icepop,
    "gspo": _gspo,
    "dppo_tv": _dppo_tv,
    "m2po": _m2po,
}
