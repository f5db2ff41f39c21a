import math

import pytest

from infini_attention.evaluation.estimates import estimate, proportion


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
