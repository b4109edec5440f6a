"""This file is a world that can be solved on paper: levels of questions, a tabular policy, the exact chance to pass.

An answer to a level is a string of tokens, one per skill that the level asks for, and is right if every token is. The
policy is a softmax over a small vocabulary per skill. Levels of a source ask for the skills of the levels below and
for some of their own, so that what an easy level teaches makes the next one reachable; with linked=False each level
has its own copy of every skill, and nothing carries over. The reward of a level is a product of probabilities: quality,
its gradient and its optimum (1.0) are exact, and no evaluation is needed.

Shapes: S seeds, C skills, V tokens of the vocabulary, L levels, T tokens of the longest answer, M groups, G answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

END = 0  # ends an answer before its time, which is wrong: answers of one group differ in length

Rungs = Mapping[str, Mapping[str, tuple[float, ...]]]

# The sources, levels and weights of configs/arithmetic.yaml. Each level has the chances that SmolLM2-135M-Instruct
# starts from, as pass rates of a run's first steps show them: FORMAT (stopping in time) times the tokens that the
# level and those below it add. Where no answer was right in a few hundred, the chance is a guess below what was seen.
FORMAT = (0.6,)
ARITHMETIC: Rungs = {
    "sums": {
        "one_digit": (0.53, 0.53),
        "three_terms": (0.35,),
        "two_digits": (0.17,),
        "three_digits": (0.1,),
        "four_digits": (0.05,),
    },
    "products": {"one_digit": (0.67, 0.67), "two_digits": (0.04,), "three_digits": (0.05,)},
    "operations": {"one_digit": (0.55, 0.55), "four_terms": (0.13,), "two_digits": (0.05,)},
    "divisors": {"up_to_20": (0.74, 0.74), "up_to_1000": (0.033,)},
}
ARITHMETIC_WEIGHTS = {"sums": 3.0, "products": 1.0, "operations": 1.0, "divisors": 0.5}


@dataclass(frozen=True)
class Ladder:
    """Levels by source; skills_LT holds the skill of each answer token, -1 behind the end; start_C the first chances.

    Two things make skills share a network, and leave the optimum at 1.0. interference is what a row of logits common to
    all skills weighs: skills have different right tokens, and what one learns disturbs the others. mixed turns the
    parameters by an orthogonal matrix, so that none belongs to one skill: AdamW scales each parameter's step by its own
    past gradients, and were they apart, a skill would learn as fast from one group in a hundred as from all of them.
    """

    levels: tuple[tuple[str, str], ...]
    weights: dict[str, float]
    skills_LT: np.ndarray
    start_C: np.ndarray
    vocabulary: int = 8
    interference: float = 0.3
    mixed: bool = True

    @property
    def lengths_L(self) -> np.ndarray:
        """Tokens of a whole answer to each level."""
        return (self.skills_LT >= 0).sum(1)

    @property
    def right_C(self) -> np.ndarray:
        """The right token of each skill."""
        return 1 + np.arange(len(self.start_C)) % (self.vocabulary - 1)

    def levels_of(self) -> dict[str, tuple[str, ...]]:
        """Level names by source, easiest first."""
        return {source: tuple(name for owner, name in self.levels if owner == source) for source in self.weights}

    def start(self, seeds: Sequence[int], spread: float = 0.3) -> Tensor:
        """The first parameters [S, P], P = (C + 1) V: start_C on the right tokens, then noise per seed."""
        chances_C = torch.from_numpy(self.start_C)
        logits_CV = ((1 - chances_C) / (self.vocabulary - 1)).log()[:, None].repeat(1, self.vocabulary)
        logits_CV[torch.arange(len(chances_C)), torch.from_numpy(self.right_C)] = chances_C.log()
        noise = [np.random.default_rng([seed, 0]).normal(size=logits_CV.shape) for seed in seeds]
        own = logits_CV + spread * torch.from_numpy(np.stack(noise))
        both = torch.cat([own, own.new_zeros(len(seeds), 1, self.vocabulary)], dim=1).flatten(1)
        return both @ self.rotation if self.mixed else both

    @cached_property
    def rotation(self) -> Tensor:
        """An orthogonal matrix [P, P], the same for all seeds."""
        size = (len(self.start_C) + 1) * self.vocabulary
        return torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0])

    def logits(self, parameters: Tensor) -> Tensor:
        """Parameters [S, P] to logits [S, C, V]."""
        turned = parameters @ self.rotation.T if self.mixed else parameters
        rows = turned.reshape(len(parameters), -1, self.vocabulary)
        return rows[:, :-1] + self.interference * rows[:, -1:]

    def pass_rates(self, logits_SCV: Tensor) -> Tensor:
        """The exact expected reward of every level, [S, L], differentiable."""
        logprobs_SCV = logits_SCV.log_softmax(-1)
        index = torch.from_numpy(self.right_C)[None, :, None].expand(len(logits_SCV), -1, 1)
        right_SC = logprobs_SCV.gather(2, index).squeeze(2)
        skills_LT = torch.from_numpy(self.skills_LT)
        return (right_SC[:, skills_LT.clamp(min=0)] * (skills_LT >= 0)).sum(-1).exp()

    def quality(self, logits_SCV: Tensor) -> Tensor:
        """The mean pass rate over all levels, each counting the same, [S]; what an evaluation would estimate."""
        return self.pass_rates(logits_SCV).mean(-1)


def build_ladder(
    rungs: Rungs,
    weights: Mapping[str, float],
    shared: Sequence[float] = (),
    linked: bool = True,
    mixed: bool = True,
) -> Ladder:
    """A ladder from the chances of the tokens that each level adds; `shared` tokens begin every answer."""
    start, rows, levels = list(shared), [], []
    for source, added in rungs.items():
        below: list[float] = []
        skills = list(range(len(shared)))
        for level, chances in added.items():
            new = list(chances) if linked else [*shared, *below, *chances]
            skills = (skills if linked else []) + list(range(len(start), len(start) + len(new)))
            start += new
            below += chances
            levels.append((source, level))
            rows.append(skills)
    longest = max(map(len, rows))
    table = np.array([row + [-1] * (longest - len(row)) for row in rows])
    return Ladder(tuple(levels), dict(weights), table, np.array(start), mixed=mixed)


def arithmetic_ladder(linked: bool = True, mixed: bool = True) -> Ladder:
    """The default run's sources as a ladder."""
    return build_ladder(ARITHMETIC, ARITHMETIC_WEIGHTS, FORMAT, linked, mixed)


@dataclass(frozen=True)
class Answers:
    """M groups of G answers. logprobs are the sampler's; sampled marks the tokens up to the end of each answer."""

    tokens_MGT: np.ndarray
    logprobs_MGT: np.ndarray
    sampled_MGT: np.ndarray
    rewards_MG: np.ndarray


def sample(
    ladder: Ladder, logprobs_SCV: np.ndarray, seed_M: np.ndarray, level_M: np.ndarray, uniform_MGT: np.ndarray
) -> Answers:
    """Answer group m's level with seed m's policy; uniform random numbers become tokens by the inverse CDF."""
    skills_MT = ladder.skills_LT[level_M]
    table_MTV = logprobs_SCV[seed_M[:, None], skills_MT]
    cdf_MTV = np.exp(table_MTV).cumsum(-1)
    tokens_MGT = (uniform_MGT[..., None] * cdf_MTV[:, None, :, -1:] > cdf_MTV[:, None]).sum(-1)
    logprobs_MGT = np.take_along_axis(table_MTV[:, None], tokens_MGT[..., None], -1)[..., 0]
    inside_MGT = np.broadcast_to((skills_MT >= 0)[:, None], tokens_MGT.shape)
    ended_MGT = (tokens_MGT == END) & inside_MGT
    before_MGT = ended_MGT.cumsum(-1) - ended_MGT  # ends among the tokens before
    right_MGT = (tokens_MGT == ladder.right_C[skills_MT][:, None]) | ~inside_MGT
    return Answers(tokens_MGT, logprobs_MGT, inside_MGT & (before_MGT == 0), right_MGT.all(-1).astype(float))
