"""Means of repeated trials, with the interval that the trials support."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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


def _quantile(degrees: int) -> float:
    """Exact from the table; beyond it the first-order expansion around the normal, right to 0.3 %."""
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    return _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * degrees)
