"""This file trains the policy of learners/ladder.py with the run's own parts: Curriculum, Gate, advantages and losses.

One step of S seeds at once: each seed's curriculum draws levels, as many as its gate has room for; groups are sampled
and finish; those whose rewards are all equal are dropped and their capacity is drawn again; the first groups_per_step
make a batch, and AdamW takes a step on the algorithm's own objective. No seed sees another: each has its own random
streams, and what a loss or an advantage looks at as a whole (batch_std, m2po) is given one seed at a time.

What is left out: time (a generator answers as many groups as the gate lets in), answers that cross a weight update (a
group is of one version), and generalisation (a prompt is its level).

Shapes as in learners/ladder.py, and B groups of a batch, N tokens of all seeds, K steps.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from learners.algorithms import Algorithm, find_algorithm
from learners.ladder import Ladder, sample
from learners.losses import Tokens
from learners.optimizer import adamw, apply_step
from rl.algorithm_config import AlgorithmSection
from rl.curriculum import Curriculum
from rl.curriculum_config import CurriculumSection
from rl.staleness import Gate


@dataclass(frozen=True)
class Experiment:
    """One arm. schedule: every group exactly `lag` versions old, or Gate(max_lag=lag) with groups that overtake.

    engine_noise is the deviation of what the sampler's logits differ by, drawn anew for each version: the gap in
    numerics between engine and learner, in nats.
    """

    algorithm: AlgorithmSection = field(default_factory=lambda: AlgorithmSection.model_validate({}))
    curriculum: CurriculumSection = CurriculumSection(name="uniform")
    lr: float = 0.05
    steps: int = 100
    lag: int = 0
    schedule: Literal["stationary", "gate"] = "stationary"
    groups_per_step: int = 8
    group_size: int = 8
    first_answers: int | None = None
    engine_noise: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Group:
    """A sampled group; its answers as in learners/ladder.py, without the leading M."""

    level: int
    version: int
    tokens_GT: np.ndarray
    logprobs_GT: np.ndarray
    sampled_GT: np.ndarray
    rewards_G: np.ndarray

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return int(self.sampled_GT.sum())

    @property
    def informs(self) -> bool:
        """Whether its rewards differ."""
        return bool(self.rewards_G.min() != self.rewards_G.max())


@dataclass(frozen=True)
class Curves:
    """What an arm did. quality and tokens after each step, the start first; useful: tokens of trained groups."""

    quality_SK: np.ndarray
    tokens_SK: np.ndarray
    useful_SK: np.ndarray
    levels_SKL: np.ndarray
    stopped_S: np.ndarray  # the step at which nothing informed any more; -1: never
    lag_mean: float
    effective_sample_fraction: float
    clip_fraction: float


class Traffic:
    """One seed's groups, from draw to batch: its curriculum, its gate, what runs and what waits."""

    def __init__(self, ladder: Ladder, experiment: Experiment, seed: int) -> None:
        self._experiment = experiment
        self._index = {level: index for index, level in enumerate(ladder.levels)}
        self._names = ladder.levels
        self._curriculum = Curriculum(
            ladder.levels_of(), ladder.weights, experiment.curriculum, experiment.group_size, seed
        )
        self._gate = Gate(experiment.lag if experiment.schedule == "gate" else 0, experiment.groups_per_step)
        self._order = random.Random(f"{seed}/order")
        self._running: list[Group] = []
        self._waiting: list[Group] = []
        self.numbers = np.random.default_rng([seed, 1])
        self.tokens = 0
        self.useful = 0
        self.stopped = -1

    def needs_groups(self, version: int) -> bool:
        """Whether the batch is not full yet; False once the curriculum has stopped the run for want of signal."""
        if self.stopped < 0:
            try:
                self._curriculum.check_signal(self._experiment.groups_per_step)
            except ValueError:
                self.stopped = version
        return self.stopped < 0 and len(self._waiting) < self._experiment.groups_per_step

    def draw(self, version: int) -> list[int]:
        """The level of each group that the gate lets in."""
        drawn = []
        while self._gate.room(version):
            choice = self._curriculum.draw(version)
            drawn.append(self._index[choice.source, choice.level])
            self._gate.admit()
        return drawn

    def start(self, groups: Sequence[Group]) -> None:
        """These are running."""
        self._running += groups

    def finish(self) -> None:
        """A step's worth of the running groups end, whichever: where the gate allows a lag they overtake each other."""
        for _ in range(min(self._experiment.groups_per_step, len(self._running))):
            group = self._running.pop(self._order.randrange(len(self._running)))
            self.tokens += group.tokens
            self._observe(group)
            if group.informs:
                self._gate.publish()
                self._waiting.append(group)
            else:
                self._gate.drop_running()

    def _observe(self, group: Group) -> None:
        source, level = self._names[group.level]
        pass_rate, answers = float(group.rewards_G.mean()), len(group.rewards_G)
        self._curriculum.observe(source, level, pass_rate, group.informs, group.version, answers)

    def take(self, version: int) -> list[Group]:
        """The batch; groups that are too old by now are left out, and their capacity comes back."""
        if self._experiment.schedule == "gate":
            fresh = [group for group in self._waiting if self._gate.is_fresh(version, group.version)]
            self._gate.drop_accepted(len(self._waiting) - len(fresh))
            self._waiting = fresh
        if self.needs_groups(version) or self.stopped >= 0:
            return []
        batch = self._waiting[: self._experiment.groups_per_step]
        self._waiting = self._waiting[self._experiment.groups_per_step :]
        self.useful += sum(group.tokens for group in batch)
        self._curriculum.step_made()
        return batch


def _answer(
    ladder: Ladder,
    experiment: Experiment,
    traffics: Sequence[Traffic],
    wants: Sequence[list[int]],
    policy: tuple[int, np.ndarray],
) -> None:
    """Sample what each seed drew, with the policy (its version, its log-probabilities [S, C, V])."""
    version, logprobs_SCV = policy
    seed_M = np.repeat(np.arange(len(traffics)), [len(want) for want in wants])
    level_M = np.array([level for want in wants for level in want])
    shape = (experiment.group_size, ladder.skills_LT.shape[1])
    numbers = [traffic.numbers.random((len(want), *shape)) for traffic, want in zip(traffics, wants, strict=True)]
    answers = sample(ladder, logprobs_SCV, seed_M, level_M, np.concatenate(numbers))
    row = 0
    for traffic, want in zip(traffics, wants, strict=True):
        groups = []
        for level in want:
            rewards_G, kept = answers.rewards_MG[row], experiment.group_size
            first = experiment.first_answers
            if first is not None and (rewards_G[:first] == rewards_G[0]).all():
                kept = first  # they agree: the others are never sampled
            parts = (answers.tokens_MGT, answers.logprobs_MGT, answers.sampled_MGT, answers.rewards_MG)
            groups.append(Group(level, version, *(part[row, :kept] for part in parts)))
            row += 1
        traffic.start(groups)


@dataclass(frozen=True)
class Batch:
    """The trained groups of the S' seeds that have not stopped: which seeds, and the groups of each."""

    seeds: tuple[int, ...]
    groups: tuple[tuple[Group, ...], ...]

    def stack(self, name: str) -> Tensor:
        """One field of all groups, [S', B, ...]."""
        return torch.from_numpy(np.array([[getattr(group, name) for group in batch] for batch in self.groups]))


def batch_loss(
    ladder: Ladder, algorithm: Algorithm, batch: Batch, logits_SCV: Tensor, version: int, reference_SCV: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """The scalar to minimise, a sum over independent seeds; r of every token [N]; the fraction of clipped tokens."""
    seeds = torch.tensor(batch.seeds)
    sampled = batch.stack("sampled_GT")
    skills = torch.from_numpy(ladder.skills_LT)[batch.stack("level")]
    index = (seeds[:, None, None, None].expand_as(sampled), skills[:, :, None].expand_as(sampled))
    which = (index[0][sampled], index[1][sampled], batch.stack("tokens_GT")[sampled])
    logprobs_SCV = logits_SCV.log_softmax(-1)
    entropy_SC = -(logprobs_SCV.exp() * logprobs_SCV).sum(-1)
    advantages, weights = _credit(algorithm, batch, sampled, ladder.skills_LT.shape[1])
    sequence = torch.arange(sampled[..., 0].numel()).reshape(sampled.shape[:3])[..., None].expand_as(sampled)
    lags = (version - batch.stack("version"))[:, :, None, None].expand_as(sampled).to(torch.float64)
    columns = {
        "logprobs_N": logprobs_SCV[which],
        "behaviour_N": batch.stack("logprobs_GT")[sampled],
        "advantages_N": advantages[..., None].expand_as(sampled)[sampled],
        "lags_N": lags[sampled],
        "sequence_N": sequence[sampled],
        "truncated_N": torch.zeros(int(sampled.sum()), dtype=torch.bool),
        "entropy_N": entropy_SC[which[:2]],
    }
    if reference_SCV is not None:
        columns["reference_N"] = reference_SCV.log_softmax(-1)[which]
    weights_N = weights[..., None].expand_as(sampled)[sampled]
    loss, clipped = _objective(algorithm, columns, weights_N, which[0])
    ratio_N = (columns["logprobs_N"].detach() - columns["behaviour_N"]).exp()
    return loss, ratio_N, clipped


def _credit(algorithm: Algorithm, batch: Batch, sampled: Tensor, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Advantages and token weights, [S', B, G], from the run's own functions, one seed at a time."""
    rewards, lengths = batch.stack("rewards_G").tolist(), sampled.sum(-1).tolist()
    advantages = [algorithm.advantage(groups) for groups in rewards]
    weights = [algorithm.aggregation(groups, max_tokens) for groups in lengths]
    return torch.tensor(advantages, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


def _objective(
    algorithm: Algorithm, columns: dict[str, Tensor], weights_N: Tensor, seed_N: Tensor
) -> tuple[Tensor, float]:
    """All seeds at once where a loss looks at tokens and sequences; seed by seed where it looks at the whole batch."""
    if algorithm.prepare is None:
        parts = [torch.ones_like(seed_N, dtype=torch.bool)]
    else:
        parts = [seed_N == seed for seed in seed_N.unique()]
    loss, clipped = weights_N.new_zeros(()), 0.0
    for part_N in parts:
        own = {name: column[part_N] for name, column in columns.items()}
        own["sequence_N"] = own["sequence_N"].unique(return_inverse=True)[1]
        extra = (
            {}
            if algorithm.prepare is None
            else {"cutoff": algorithm.prepare(own["logprobs_N"].detach() - own["behaviour_N"])}
        )
        losses = algorithm.objective(Tokens(**{"reference_N": None, **own, **extra}))
        loss = loss + (weights_N[part_N] * losses.loss_N).sum()
        clipped += float((losses.clipped_N | losses.masked_N).sum())
    return loss, clipped / len(seed_N)


def _clip_each_seed(gradient: Tensor, max_norm: float) -> None:
    """Scale each seed's gradient [S, P] down to a norm of at most max_norm."""
    norm_S = gradient.norm(dim=1)
    gradient.mul_((max_norm / norm_S.clamp(min=max_norm))[:, None])


def run_experiment(ladder: Ladder, experiment: Experiment, seeds: Sequence[int]) -> Curves:
    """Train every seed; the same seed has the same start and the same draws whatever the others are."""
    parameters = torch.nn.Parameter(ladder.start(seeds))
    optimizer = adamw([parameters], experiment.betas, weight_decay=0.0)
    traffics = [Traffic(ladder, experiment, seed) for seed in seeds]
    noises = [np.random.default_rng([seed, 2]) for seed in seeds]
    policies: deque[tuple[int, np.ndarray]] = deque(maxlen=experiment.lag + 1)
    reference = parameters.detach().clone()
    history: dict[str, list] = {"quality": [], "tokens": [], "useful": [], "levels": []}
    health = []  # per step: mean lag, effective sample fraction, clipped or masked fraction
    for version in range(experiment.steps + 1):
        with torch.no_grad():
            _record(history, ladder, parameters, traffics)
            logits_SCV = ladder.logits(parameters)
            noise = np.stack([rng.normal(size=logits_SCV.shape[1:]) for rng in noises]) * experiment.engine_noise
            policies.append((version, (logits_SCV + torch.from_numpy(noise)).log_softmax(-1).numpy()))
        if version == experiment.steps:
            break
        batch = _collect(ladder, experiment, traffics, policies, version)
        if batch.seeds:
            health.append(_step(ladder, experiment, batch, version, (parameters, reference, optimizer)))
    if not health:
        raise ValueError("no seed made a step: all groups got the same reward; use a ladder with easier levels")
    lag, effective, clipped = np.mean(health, axis=0)
    return Curves(
        *(np.stack(history[name], axis=1) for name in ("quality", "tokens", "useful", "levels")),
        stopped_S=np.array([traffic.stopped for traffic in traffics]),
        lag_mean=float(lag),
        effective_sample_fraction=float(effective),
        clip_fraction=float(clipped),
    )


def _step(
    ladder: Ladder,
    experiment: Experiment,
    batch: Batch,
    version: int,
    learner: tuple[Tensor, Tensor, torch.optim.AdamW],
) -> tuple[float, float, float]:
    """One optimizer step of every seed that has a batch, and of the reference; returns the step's health."""
    parameters, reference, optimizer = learner
    algorithm, kl = find_algorithm(experiment.algorithm), experiment.algorithm.kl
    reference_SCV = ladder.logits(reference) if algorithm.needs_reference else None
    loss, ratio_N, clipped = batch_loss(ladder, algorithm, batch, ladder.logits(parameters), version, reference_SCV)
    loss.backward()
    before = parameters.detach().clone()
    assert parameters.grad is not None
    _clip_each_seed(parameters.grad, experiment.max_grad_norm)
    apply_step(optimizer, experiment.lr)
    stopped = [index for index in range(len(parameters)) if index not in batch.seeds]
    parameters.data[stopped] = before[stopped]  # a run that stopped does not drift on with its momentum
    if kl is not None and kl.reference == "ema":
        reference.lerp_(parameters.detach(), 1 - kl.ema_decay)
    lag = float((version - batch.stack("version")).double().mean())
    return lag, float(ratio_N.sum() ** 2 / (len(ratio_N) * (ratio_N**2).sum())), clipped


def _collect(
    ladder: Ladder,
    experiment: Experiment,
    traffics: Sequence[Traffic],
    policies: deque[tuple[int, np.ndarray]],
    version: int,
) -> Batch:
    """Draw, sample and finish until every seed has its batch, or has stopped."""
    policy = policies[0] if experiment.schedule == "stationary" else policies[-1]
    batches: dict[int, list[Group]] = {}
    while missing := [index for index in range(len(traffics)) if index not in batches]:
        hungry = [index for index in missing if traffics[index].needs_groups(version)]
        wants = [traffic.draw(version) if index in hungry else [] for index, traffic in enumerate(traffics)]
        if any(wants):
            _answer(ladder, experiment, traffics, wants, policy)
        for index in hungry:
            traffics[index].finish()
        for index in missing:
            if not traffics[index].needs_groups(version):
                batch = traffics[index].take(version)
                if batch or traffics[index].stopped >= 0:
                    batches[index] = batch
    trained = sorted(index for index, batch in batches.items() if batch)
    return Batch(tuple(trained), tuple(tuple(batches[index]) for index in trained))


def _record(history: dict[str, list], ladder: Ladder, parameters: Tensor, traffics: Sequence[Traffic]) -> None:
    levels_SL = ladder.pass_rates(ladder.logits(parameters))
    history["quality"].append(levels_SL.mean(1).numpy())
    history["levels"].append(levels_SL.numpy())
    history["tokens"].append(np.array([traffic.tokens for traffic in traffics]))
    history["useful"].append(np.array([traffic.useful for traffic in traffics]))
