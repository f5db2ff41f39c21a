import pytest
import torch

from infini_attention.training.segments import repeated_segments, risen, some_segments


def test_half_of_the_segments_count_once_and_none_more_than_the_ceiling() -> None:
    weights = repeated_segments(400, 50, 1000.0, generator=torch.Generator().manual_seed(0))
    assert weights.shape == (400, 50)
    assert 0.45 < (weights == 1).float().mean() < 0.55
    assert weights.min() >= 1 and 300 < weights.max() <= 1000
    rows = weights.log().amax(dim=1)  # one draw a row bounds all of its segments
    assert rows.min() < 1 and rows.max() > 6


def test_a_ceiling_of_one_repeats_nothing() -> None:
    assert (repeated_segments(3, 4, 1.0) == 1).all()
    with pytest.raises(ValueError, match=r"ceiling is 0.5"):
        repeated_segments(3, 4, 0.5)


def test_the_ceiling_rises_by_the_same_factor_every_step() -> None:
    assert [round(risen(100.0, 2, 4, step), 6) for step in range(1, 8)] == [
        1.0,
        1.0,
        3.162278,
        10.0,
        31.622777,
        100.0,
        100.0,
    ]
    assert risen(100.0, 0, 0, 0) == 100.0
    assert risen(100.0, 5, 0, 4) == 1.0


def test_every_number_of_segments_comes_up() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = {some_segments(43, 8, 2, generator=generator) for _ in range(200)}
    assert lengths == {16, 24, 32, 40}
    with pytest.raises(ValueError, match="at least 6 segments are wanted, and inputs have 5"):
        some_segments(43, 8, 6)
