"""This file says what a run's parts cost: Costs, read from a file, fitted to a run or guessed from the model's size."""

from __future__ import annotations

import math
import pathlib
import random
from typing import Any

import msgspec
import yaml


class Lengths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long answers are, in tokens: measured groups, or a lognormal of this mean (before the cap) and sigma.

    Measured answers stay in their groups, since those of one prompt resemble each other.
    """

    groups: tuple[tuple[int, ...], ...] = ()
    mean_tokens: float = 0.0
    sigma: float = 0.6

    def __post_init__(self) -> None:
        if self.groups and not all(group and min(group) >= 1 for group in self.groups):
            raise ValueError("lengths.groups holds an empty group or an answer without a token; leave those out")
        if not self.groups and not (self.mean_tokens >= 1 and self.sigma >= 0):
            raise ValueError(
                f"lengths has no groups, mean_tokens {self.mean_tokens:g} and sigma {self.sigma:g}; give groups of "
                "lengths, or mean_tokens of 1 or more with a sigma of 0 or more"
            )

    def draw(self, random_source: random.Random, count: int, max_tokens: int) -> tuple[int, ...]:
        """The lengths of a group of `count` answers."""
        if self.groups:
            group = random_source.choice(self.groups)
            chosen = group if len(group) == count else random_source.choices(group, k=count)
            return tuple(min(max_tokens, length) for length in chosen)
        middle = math.log(self.mean_tokens) - self.sigma**2 / 2
        drawn = (random_source.lognormvariate(middle, self.sigma) for _ in range(count))
        return tuple(max(1, min(max_tokens, round(length))) for length in drawn)

    @property
    def mean(self) -> float:
        """The mean length, before any cap."""
        answers = [length for group in self.groups for length in group]
        return sum(answers) / len(answers) if answers else self.mean_tokens


class Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds and shares that decide a run's pace; one engine and one rank each as large as they were measured.

    An engine step with n sequences in flight takes engine_fixed_s + engine_sequence_s * n, a prompt's prefill
    prefill_token_s * prompt_tokens. A learner step takes learner_fixed_s, and learner_token_s for each answer token of
    the rank with most of them; then publish_s to write the weights down and between_s of the driver's work. An update
    is prepared for prepare_s while the engine goes on, stops it for pause_s, and counts confirm_s later. While both
    sides compute, each is `contention` times slower: 1 where they have their own cores or devices.
    """

    engine_fixed_s: float
    engine_sequence_s: float
    learner_fixed_s: float
    learner_token_s: float
    lengths: Lengths
    prefill_token_s: float = 0.0
    prompt_tokens: float = 0.0
    judge_s: float = 0.0
    zero_advantage_share: float = 0.0
    publish_s: float = 0.0
    between_s: float = 0.0
    prepare_s: float = 0.0
    pause_s: float = 0.0
    confirm_s: float = 0.0
    contention: float = 1.0
    origin: str = "given"

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; seconds, tokens and shares are finite and not negative")
        if self.engine_fixed_s + self.engine_sequence_s <= 0:
            raise ValueError("engine_fixed_s and engine_sequence_s are both 0; an engine step takes some time")
        if self.zero_advantage_share >= 1:
            raise ValueError(
                f"zero_advantage_share is {self.zero_advantage_share:g}, so that no group would ever be trained; "
                "give the share of groups with equal rewards, below 1"
            )
        if self.contention < 1:
            raise ValueError(f"contention is {self.contention:g}; 1 means that neither side slows the other down")

    def engine_tokens_per_s(self, sequences: float) -> float:
        """What one engine samples per second with so many sequences in flight."""
        return sequences / (self.engine_fixed_s + self.engine_sequence_s * sequences)

    def learner_s(self, tokens: float, groups: int, ranks: int) -> float:
        """Seconds of a step on `groups` groups of `tokens` answer tokens in all, up to the next batch."""
        largest_share = math.ceil(groups / ranks) / groups
        return self.learner_fixed_s + self.learner_token_s * tokens * largest_share


def load_costs(path: str) -> Costs:
    """Read costs from a JSON or YAML file.

    Raises:
        ValueError: the file is missing, unreadable, or says something that no costs can be.
    """
    try:
        content: Any = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
        return msgspec.convert(content, Costs, strict=False)
    except FileNotFoundError:
        raise ValueError(
            f"--costs {path} does not exist; write one: rl plan CONFIG --from RUN --write {path}"
        ) from None
    except (OSError, UnicodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ValueError(f"--costs {path}: {error}; the fields are described in docs/planner.md") from None


def dump_costs(costs: Costs) -> str:
    """Costs as JSON that load_costs reads."""
    return msgspec.json.format(msgspec.json.encode(costs), indent=2).decode() + "\n"
