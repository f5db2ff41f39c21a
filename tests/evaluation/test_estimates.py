import math

import numpy as np
import pytest

from infini_attention.evaluation.estimates import estimate, figures_of_sums, proportion, ratio


def test_the_interval_is_students() -> None:
    # five samples, standard deviation 1: t is 2.776 with four degrees of freedom
    samples = [0.0, 0.0, 0.0, 1.58113883, -1.58113883]
    result = estimate([x + 7 for x in samples])
    assert result.mean == pytest.approx(7)
    assert result.interval == pytest.approx(2.776 * 1.1180340 / math.sqrt(5), rel=1e-6)


def test_many_samples_approach_the_normal_quantile() -> None:
    samples = [float(i % 2) for i in range(10_000)]
    assert estimate(samples).interval == pytest.approx(1.960 * 0.5 / 100, rel=1e-3)


def test_one_sample_has_no_interval() -> None:
    result = estimate([3.0])
    assert result.mean == 3
    assert math.isnan(result.interval)


def test_what_is_not_finite_stays_visible() -> None:
    assert math.isnan(estimate([1.0, math.inf]).mean)


@pytest.mark.parametrize(
    ("successes", "low", "high"), [(0, 0.0, 0.2775), (8, 0.4902, 0.9433), (10, 0.7225, 1.0)]
)
def test_the_interval_of_a_share_is_wilsons(successes: int, low: float, high: float) -> None:
    result = proportion([1.0] * successes + [0.0] * (10 - successes))
    assert (result.share, result.trials) == (successes / 10, 10)
    assert (result.low, result.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a proportion needs at least one"):
        proportion([])


def test_a_ratio_is_of_sums_and_its_interval_over_units() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(50, 150, 400)
    nats = tokens * (3 + 0.2 * random.standard_normal(400))
    result = ratio(list(nats), list(tokens))
    assert result.value == pytest.approx(nats.sum() / tokens.sum())
    assert result.low < result.value < result.high
    # The standard error of 400 equal units is 0.01; these weigh a little unequally.
    assert result.high - result.low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.15)
    assert ratio(list(nats), list(tokens)) == result


def test_one_unit_has_no_interval_and_nothing_no_ratio() -> None:
    one = ratio([6.0], [2.0])
    assert one.value == 3 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(ratio([0.0, 0.0], [0.0, 0.0]).value)
    assert ratio([2.0, 0.0], [1.0, 0.0]).value == 2  # a document too short to count anything


def test_figures_of_the_same_draws_are_paired() -> None:
    hard, noise = np.random.default_rng(2).standard_normal((2, 200))
    units = np.stack([hard, hard + 0.1 + 0.01 * noise, np.ones(200)], axis=1)
    mean, other, difference = figures_of_sums(
        units, lambda sums: np.stack([sums[:, 0], sums[:, 1], sums[:, 1] - sums[:, 0]], axis=1) / sums[:, 2:]
    )
    assert mean == ratio(list(hard), [1.0] * 200)
    assert other.value - mean.value == pytest.approx(difference.value)
    assert mean.low < 0 < mean.high and 0.09 < difference.low < difference.high < 0.11


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_units_that_do_not_match_are_refused(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError, match="give at least one of each, and as many"):
        ratio(above, below)
