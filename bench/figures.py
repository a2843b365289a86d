"""Samples of contenders measured in turn, and what is made of them: medians, spread, ratios, goals.

A machine's speed drifts while one measures. So contenders take turns, round by round, and a ratio is
the median of the *rounds'* ratios: each compares two figures that were taken within a second or two.
Spread is the interquartile range, which one bad round does not move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """Median and quartiles of some samples; all nan without any."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """As ``1.02 [0.99 to 1.05]``."""
        return f"{number(self.median)} [{number(self.low)} to {number(self.high)}]"


class Series(msgspec.Struct, frozen=True):
    """One figure: samples by contender, one of each round, in the order of the rounds."""

    name: str
    unit: str
    samples: dict[str, list[float]]
    better: Literal["more", "less"]
    #: what is measured and how, one sentence
    what: str = ""
    #: the contender that the tables compare the others with; '': they show how ours compares with each
    reference: str = ""

    def spread(self, contender: str) -> Spread:
        """Median and quartiles of one contender."""
        return spread(self.samples[contender])

    def ratio(self, ours: str, theirs: str) -> Spread:
        """Of ``ours`` to ``theirs``, round by round."""
        pairs = zip(self.samples[ours], self.samples[theirs], strict=False)
        return spread([a / b for a, b in pairs if b > 0])


class Goal(msgspec.Struct, frozen=True):
    """One goal and whether it is met; ``figure`` is the sentence that shows it."""

    name: str
    met: bool
    figure: str


class Part(msgspec.Struct, frozen=True):
    """What one part of the benchmark found."""

    name: str
    series: list[Series]
    goals: list[Goal]
    #: single facts that are no series (memory, counts)
    facts: dict[str, str] = {}


def at_least(name: str, series: Series, ours: str, theirs: str, limit: float) -> Goal:
    """The goal that ``ours`` is at least ``limit`` times ``theirs``.

    Where less is better (latency) the ratio is turned round, so that more of it is always better.
    """
    ratio = series.ratio(ours, theirs) if series.better == "more" else series.ratio(theirs, ours)
    return Goal(name, ratio.median >= limit, f"{ratio}, goal >= {number(limit)}")


def at_most(name: str, series: Series, ours: str, theirs: str, limit: float) -> Goal:
    """The goal that ``ours`` takes at most ``limit`` times what ``theirs`` takes."""
    ratio = series.ratio(ours, theirs)
    return Goal(name, ratio.median <= limit, f"{ratio}, goal <= {number(limit)}")


def spread(samples: Sequence[float]) -> Spread:
    """Median and quartiles (linear interpolation between neighbours)."""
    if not samples:
        return Spread(math.nan, math.nan, math.nan)
    ordered = sorted(samples)
    return Spread(_quantile(ordered, 0.5), _quantile(ordered, 0.25), _quantile(ordered, 0.75))


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def number(value: float) -> str:
    """Three significant digits, or whole from 1,000 on."""
    if math.isnan(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
