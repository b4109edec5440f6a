"""This file searches for the split of devices between generators and learners that gives the shortest step."""

from __future__ import annotations

import random
from collections.abc import Iterable
from fractions import Fraction

import msgspec

from rl.config import RunConfig
from rl.planner_costs import Costs
from rl.prediction import Prediction, Setting
from rl.simulation import simulate

WORTH_TELLING = 0.2  # of idle time that one side has more than the other
ALIKE = 0.01  # of a step: shorter by less is no reason for another number in flight
LENGTHS_DRAWN = 500  # groups
ANSWERS_SIMULATED = 12_000
LEAST_STEPS, MOST_STEPS, SKIPPED_STEPS = 8, 40, 4
AROUND = (0.6, 0.8, 1.0, 1.25, 1.6)  # generators to try first, of the number that an estimate says
REFINEMENTS = 4  # the last of them looks at what the one before asked for


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """Devices to share out: how many, what one generator and one rank take, and how many ranks the state needs."""

    devices: int
    per_generator: int = 1
    per_rank: int = 1
    least_ranks: int = 1


class Option(msgspec.Struct, frozen=True):
    """A setting and what is predicted of it."""

    setting: Setting
    prediction: Prediction


def setting_of(config: RunConfig) -> Setting:
    """What of a configuration decides its pace."""
    return Setting(
        generators=config.generators.count,
        ranks=config.learner.ranks,
        max_sequences=config.generators.max_sequences,
        group_size=config.rollout.group_size,
        max_tokens=config.rollout.max_tokens,
        groups_per_step=config.learner.groups_per_step,
        max_lag=config.staleness.max_lag,
        judge_workers=config.rewards.workers,
        update_every_steps=config.weights.every_steps,
        first_answers=config.rollout.first_answers,
        keep_zero_advantage=config.rollout.zero_advantage == "keep",
        cut_tails=config.rollout.long_tail == "drop",
        waits_for_delivery=config.weight_backend == "nccl",
    )


def predict(setting: Setting, costs: Costs, seed: int = 0) -> Option:
    """Simulate so many steps that the figures settle, and no more."""
    steps = ANSWERS_SIMULATED // (setting.groups_per_step * setting.group_size)
    steps = max(LEAST_STEPS, min(MOST_STEPS, steps))
    return Option(setting, simulate(setting, costs, steps + SKIPPED_STEPS, SKIPPED_STEPS, seed))


def synchronous(setting: Setting) -> Setting:
    """The same with max_lag 0, which delivers after every step."""
    return msgspec.structs.replace(setting, max_lag=0, update_every_steps=1)


def best_splits(setting: Setting, costs: Costs, pool: Pool, most: int = 5) -> list[Option]:
    """The shortest steps for a pool of devices, best first; the best also with half and double in flight, if that pays.

    Raises:
        ValueError: the pool is too small for a generator and the ranks that the state needs.
    """
    splits = _splits(setting, pool)
    if not splits:
        raise ValueError(
            f"{pool.devices} devices do not hold one generator of {pool.per_generator} and {pool.least_ranks} rank(s) "
            f"of {pool.per_rank}; ask for {pool.per_generator + pool.least_ranks * pool.per_rank} or more: --devices"
        )
    options = sorted(_search(splits, costs).values(), key=lambda option: option.prediction.step_s)
    best = options[0]
    for count in {max(1, setting.max_sequences // 2), 2 * setting.max_sequences}:
        other = predict(msgspec.structs.replace(best.setting, max_sequences=count), costs)
        if other.prediction.step_s < (1 - ALIKE) * options[0].prediction.step_s:
            options.insert(0, other)
    return options[:most]


def _search(splits: list[Setting], costs: Costs) -> dict[int, Option]:
    """Simulate some splits, by number of generators: around an estimate, then ever nearer to the best so far.

    The estimate knows no chance: where both sides are about as fast, each waits for the other's slow moments.
    """
    mean = mean_length(splits[0], costs)
    at = {each.generators: each for each in splits}
    counts = sorted(at)
    middle = min(splits, key=lambda each: estimate_s(each, costs, mean)).generators
    found: dict[int, Option] = {}
    coming = {min(counts, key=lambda count: abs(count - factor * middle)) for factor in AROUND}
    for _ in range(REFINEMENTS):
        found |= {count: predict(at[count], costs) for count in sorted(coming - found.keys())}
        best = min(found, key=lambda count: found[count].prediction.step_s)
        below = max((count for count in found if count < best), default=counts[0])
        above = min((count for count in found if count > best), default=counts[-1])
        coming = {(below + best) // 2, (best + above + 1) // 2} & at.keys()
    return found


def mean_length(setting: Setting, costs: Costs) -> float:
    """The mean answer, in tokens, with the cap."""
    chance = random.Random(0)
    drawn = [costs.lengths.draw(chance, setting.group_size, setting.max_tokens) for _ in range(LENGTHS_DRAWN)]
    return sum(map(sum, drawn)) / (LENGTHS_DRAWN * setting.group_size)


def estimate_s(setting: Setting, costs: Costs, mean: float) -> float:
    """A step's seconds if nothing but the slower side counted; with max_lag 0 the sides take turns."""
    answers = setting.groups_per_step * setting.group_size
    dropped = 0.0 if setting.keep_zero_advantage else costs.zero_advantage_share
    in_flight = min(setting.max_sequences, (setting.max_lag + 1) * answers / setting.generators)
    sampling_s = answers * mean / (1 - dropped) / (setting.generators * costs.engine_tokens_per_s(in_flight))
    training_s = costs.learner_s(answers * mean, setting.groups_per_step, setting.ranks)
    training_s += costs.publish_s + costs.between_s
    return max(sampling_s, training_s) if setting.max_lag else sampling_s + training_s


def advice(learner_idle: float, generator_idle: float, generators: int, ranks: int) -> str | None:
    """One line on a run's balance, None where there is nothing to tell.

    The ratio is that of the time each side was busy, so that with it both would be: an estimate without a simulation.
    """
    if abs(learner_idle - generator_idle) < WORTH_TELLING:
        return None
    sampling, training = generators * (1 - generator_idle), ranks * (1 - learner_idle)
    if min(sampling, training) <= 0:
        return None
    ratio = Fraction(sampling / training).limit_denominator(3)
    if ratio in (0, Fraction(generators, ranks)):
        return None
    side, idle = ("learner", learner_idle) if learner_idle > generator_idle else ("generators", generator_idle)
    return (
        f"{side} idle {idle:.0%}: generators:learners {ratio.numerator}:{ratio.denominator} would balance them; "
        "rl plan CONFIG --from RUN says what that brings"
    )


def _splits(setting: Setting, pool: Pool) -> list[Setting]:
    """Every number of generators that leaves enough for the ranks; ranks beyond the groups of a step have no work."""
    found: Iterable[tuple[int, int]] = (
        (generators, min(setting.groups_per_step, (pool.devices - generators * pool.per_generator) // pool.per_rank))
        for generators in range(1, pool.devices // pool.per_generator + 1)
    )
    return [
        msgspec.structs.replace(setting, generators=generators, ranks=ranks)
        for generators, ranks in found
        if ranks >= pool.least_ranks
    ]
