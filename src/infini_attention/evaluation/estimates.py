"""Means of repeated trials, with the interval that the trials support."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Two-sided 95 % quantiles of Student's t for 1, 2, 3, ... degrees of freedom.
_STUDENT_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
)
_NORMAL = 1.960
_DRAWS, _DRAWS_AT_ONCE = 10_000, 500  # of the bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95 % interval, in the unit of the samples."""

    mean: float
    interval: float


def estimate(samples: Sequence[float]) -> Estimate:
    """Return the mean of independent `samples` and Student's 95 % interval around it.

    One sample has no interval: it is NaN. So are both numbers when a sample is not finite.
    """
    if not all(map(math.isfinite, samples)):
        return Estimate(math.nan, math.nan)
    mean = statistics.fmean(samples)
    if len(samples) == 1:
        return Estimate(mean, math.nan)
    return Estimate(mean, _quantile(len(samples) - 1) * statistics.stdev(samples) / math.sqrt(len(samples)))


@dataclass(frozen=True)
class Proportion:
    """A share of `trials` trials, and the ends of its 95 % interval."""

    share: float
    low: float
    high: float
    trials: int


def proportion(outcomes: Sequence[float]) -> Proportion:
    """Return the mean of independent `outcomes`, each from 0 to 1, and Wilson's 95 % interval around it.

    Where outcomes are other than 0 and 1, as a share of right tokens is, the interval is wider than it need
    be: nothing between 0 and 1 varies more than 0 and 1 do. Raises ValueError where there are none.
    """
    if not outcomes:
        raise ValueError("no outcomes are given; a proportion needs at least one")
    share, trials = statistics.fmean(outcomes), len(outcomes)
    doubt = _NORMAL**2 / trials
    middle = (share + doubt / 2) / (1 + doubt)
    half = math.sqrt(doubt * (share * (1 - share) + doubt / 4)) / (1 + doubt)
    return Proportion(share, max(0.0, middle - half), min(1.0, middle + half), trials)


@dataclass(frozen=True)
class Interval:
    """A figure, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Return the ratio of two sums over independent units, and its bootstrap interval over units.

    Units, such as documents with their nats and tokens, are drawn with replacement, as many as there are,
    10,000 times with a fixed seed; the interval is from the 2.5th to the 97.5th percentile of the ratios. Of
    fewer than ten units or so it is too narrow. One unit has none: its ends are NaN, and so is everything
    where the denominators come to 0.

    Raises:
        ValueError: there are no units, or not as many numerators as denominators.
    """
    above, below = np.array(numerators, float), np.array(denominators, float)
    if not len(above) or len(above) != len(below):
        given = f"{len(above)} numerators and {len(below)} denominators are given"
        raise ValueError(f"{given}; give at least one of each, and as many")
    if not below.sum():
        return Interval(math.nan, math.nan, math.nan)
    (result,) = figures_of_sums(np.stack([above, below], axis=1), _ratio)
    return result


def figures_of_sums(units: np.ndarray, figures: Callable[[np.ndarray], np.ndarray]) -> list[Interval]:
    """Return figures of sums over independent units, and their bootstrap intervals, as `ratio` has.

    `units` (units, columns) fp64 are what is summed up; `figures` makes (draws, figures) of (draws, columns)
    sums, NaN where a draw has none. One unit has no intervals: their ends are NaN.
    """
    values = figures(units.sum(axis=0, keepdims=True))[0]
    ends = np.full((2, len(values)), np.nan)
    if len(units) > 1:
        ends = np.nanpercentile(figures(_sums_of_draws(units)), (2.5, 97.5), axis=0)
    return [Interval(*row) for row in np.stack([values, *ends], axis=1).tolist()]


def _sums_of_draws(units: np.ndarray) -> np.ndarray:
    """The sums of each draw, (draws, columns) fp64."""
    random, even = np.random.default_rng(0), np.full(len(units), 1 / len(units))
    counts = (random.multinomial(len(units), even, _DRAWS_AT_ONCE) for _ in range(_DRAWS // _DRAWS_AT_ONCE))
    return np.concatenate([each @ units for each in counts])


def _ratio(sums: np.ndarray) -> np.ndarray:
    above, below = sums[:, :1], sums[:, 1:]
    return above / np.where(below == 0, np.nan, below)


def _quantile(degrees: int) -> float:
    """Exact from the table; beyond it the first-order expansion around the normal, right to 0.3 %."""
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    return _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * degrees)
