"""Feature maps: sizes, signs and extremes."""

import pytest
import torch

from infini_attention.ops import feature_maps
from infini_attention.ops.normalization import normalized

EXTREMES = torch.tensor([-1e4, -30.0, -1.0, -0.0, 0.0, 1.0, 30.0, 1e4])


@pytest.mark.parametrize("name", feature_maps.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_map_keeps_dtype_and_states_its_width(name: str, dtype: torch.dtype) -> None:
    feature_map = feature_maps.get(name)
    for head_dim in (1, 3, 8):
        features = feature_map(torch.randn(2, 5, head_dim, dtype=dtype))
        assert features.shape == (2, 5, feature_map.feature_dim(head_dim))
        assert features.dtype == dtype


@pytest.mark.parametrize("name", feature_maps.names())
def test_features_are_finite_and_as_non_negative_as_the_map_says(name: str) -> None:
    feature_map = feature_maps.get(name)
    features = feature_map(EXTREMES)
    assert features.isfinite().all()
    assert bool((features >= 0).all()) == feature_map.nonnegative


@pytest.mark.parametrize("name", feature_maps.names())
def test_gradients_at_extremes_are_finite(name: str) -> None:
    x = EXTREMES.clone().requires_grad_()
    feature_maps.get(name)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_exp_is_clamped_so_that_ten_million_tokens_still_sum_exactly_enough() -> None:
    features = feature_maps.get("exp")(EXTREMES)
    assert features.min().item() == pytest.approx(torch.e**-20)
    assert features.max().item() == pytest.approx(torch.e**10)


@pytest.mark.parametrize("name", feature_maps.names())
def test_unit_features_have_length_1_or_are_zero_and_so_have_their_gradients(name: str) -> None:
    """All zero are those of relu2 for a negative vector; the largest and the smallest stay finite."""
    sigma = normalized(feature_maps.get(name), "unit")
    x = torch.stack([torch.randn(8), EXTREMES, -EXTREMES.abs(), torch.zeros(8)]).requires_grad_()
    lengths = sigma(x).norm(dim=-1)
    found = feature_maps.get(name)(x).any(dim=-1)
    torch.testing.assert_close(lengths, found.float())
    sigma(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("normalization", ["sum", "root", "none"])
def test_only_unit_scales_features(normalization: str) -> None:
    sigma = feature_maps.get("elu1")
    assert normalized(sigma, normalization) is sigma
