"""This file turns graded held-out answers into scores with 95% intervals, per source and level and overall."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from rl.metrics import Metrics, last
from rl.orders import Graded

Z_95 = 1.959964  # the standard normal quantile of a two-sided 95% interval


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """What some held-out prompts scored.

    total: judged prompts; failed: prompts whose judging failed, counted nowhere else; correct: rewards of at least 1.
    mean, low and high: the mean reward and its 95% interval, None where the prompts are too few to tell.
    """

    correct: int
    total: int
    failed: int
    mean: float | None
    low: float | None
    high: float | None


class LevelScore(msgspec.Struct, frozen=True, kw_only=True):
    """The score of one source and level."""

    source: str
    level: str
    score: Score


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out scores of exactly one policy version, taken after optimizer step `step`; a line of evaluations.jsonl."""

    step: int
    version: int
    scores: tuple[LevelScore, ...]
    overall: Score

    def metrics(self) -> Metrics:
        """Means by source and level, and overall; a score without judged prompts is left out."""
        named = {f"evaluation/score/{entry.source}/{entry.level}": entry.score for entry in self.scores}
        named["evaluation/score/overall"] = self.overall
        metrics = {name: last(score.mean) for name, score in named.items() if score.mean is not None}
        metrics["evaluation/failed/prompts"] = last(self.overall.failed)
        return metrics


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Interval of a binomial proportion that holds for few trials and near 0 and 1 (E. B. Wilson, JASA 22, 1927).

    ValueError where total is 0 or correct is not within 0..total.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total} is no proportion")
    share, square = correct / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def score_of(rewards: Sequence[float | None]) -> Score:
    """Score rewards [N], None where judging failed: Wilson's interval where all are 0 or 1, else the normal one."""
    judged = [reward for reward in rewards if reward is not None]
    correct = sum(reward >= 1.0 for reward in judged)
    mean = statistics.fmean(judged) if judged else None
    low, high = None, None
    if judged and set(judged) <= {0.0, 1.0}:
        low, high = wilson_interval(correct, len(judged))
    elif mean is not None and len(judged) > 1:
        half = Z_95 * statistics.stdev(judged) / math.sqrt(len(judged))
        low, high = mean - half, mean + half
    failed = len(rewards) - len(judged)
    return Score(correct=correct, total=len(judged), failed=failed, mean=mean, low=low, high=high)


def summarise(step: int, version: int, graded: Sequence[Graded]) -> Evaluation:
    """Score held-out answers, [N], by source and level in their order of appearance.

    ValueError names a prompt that was answered under another policy version, even in part.
    """
    levels: dict[tuple[str, str], list[float | None]] = {}
    for answer in graded:
        if set(answer.versions) != {version}:
            raise ValueError(
                f"held-out prompt {answer.prompt_id} was answered under versions {sorted(set(answer.versions))}, "
                f"but the evaluation is of version {version}; hold weight updates back while it runs"
            )
        levels.setdefault((answer.source, answer.level), []).append(answer.reward)
    scores = tuple(
        LevelScore(source=source, level=level, score=score_of(rewards)) for (source, level), rewards in levels.items()
    )
    return Evaluation(step=step, version=version, scores=scores, overall=score_of([a.reward for a in graded]))
