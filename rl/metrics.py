"""This file gives every number its reduction where it is made: Metric, the five ways to make one, and merge."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Reduction = Literal["mean", "sum", "max", "min", "last"]


class Metric(msgspec.Struct, frozen=True):
    """A number and how it combines with others of its name; weight counts what a mean was taken over."""

    value: float
    reduction: Reduction
    weight: float = 1.0


Metrics = dict[str, Metric]


def mean(value: float, weight: float = 1.0) -> Metric:
    """A mean over `weight` observations."""
    return Metric(float(value), "mean", float(weight))


def total(value: float) -> Metric:
    """A sum."""
    return Metric(float(value), "sum")


def highest(value: float) -> Metric:
    """A maximum."""
    return Metric(float(value), "max")


def lowest(value: float) -> Metric:
    """A minimum."""
    return Metric(float(value), "min")


def last(value: float) -> Metric:
    """A state, of which the latest counts."""
    return Metric(float(value), "last")


def _combine(left: Metric, right: Metric) -> Metric:
    match left.reduction:
        case "mean":
            weight = left.weight + right.weight
            share = right.weight / weight if weight else 0.0
            return Metric(left.value + (right.value - left.value) * share, "mean", weight)
        case "sum":
            return Metric(left.value + right.value, "sum")
        case "max":
            return max(left, right, key=lambda metric: metric.value)
        case "min":
            return min(left, right, key=lambda metric: metric.value)
        case "last":
            return right


def merge(parts: Iterable[Metrics]) -> Metrics:
    """Combine metrics of several places or moments, name by name, each by its own reduction.

    Raises:
        ValueError: one name was made with two reductions.
    """
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            known = merged.get(name)
            if known is not None and known.reduction != metric.reduction:
                raise ValueError(f"metric {name} is both a {known.reduction} and a {metric.reduction}")
            merged[name] = metric if known is None else _combine(known, metric)
    return merged


def values(metrics: Metrics) -> dict[str, float]:
    """Plain numbers, for a line of metrics.jsonl."""
    return {name: metric.value for name, metric in sorted(metrics.items())}
