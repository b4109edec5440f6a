"""This file puts an interval on every figure of the study: Student's t for means, a paired bootstrap for ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# The 97.5 % quantile of Student's t, by degrees of freedom from 1 on.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Interval = list[float]  # mean, and the lower and upper end of its 95 % interval


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of independent values with its t interval; the ends are NaN where there is only one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return [mean, math.nan, math.nan]
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = (T_975[count - 2] if count - 1 <= len(T_975) else 1.96) * deviation / math.sqrt(count)
    return [mean, mean - half, mean + half]


def ratio_interval(
    above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, resamples: int = 2000
) -> Interval:
    """mean(above) / mean(below) of pairs, with the percentiles of a bootstrap over the pairs; the same every time."""
    pairs = np.array([above, below], dtype=float)
    chosen = np.random.default_rng(0).integers(pairs.shape[1], size=(resamples, pairs.shape[1]))
    means = pairs[:, chosen].mean(axis=-1)
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return [float(pairs[0].mean() / pairs[1].mean()), float(low), float(high)]


def rounded(value: object, digits: int = 4) -> object:
    """The same JSON with short numbers; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float | np.floating):
        return round(float(value), digits) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
