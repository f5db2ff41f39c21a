"""Normalization: what a read of the memory is divided by, one name for each way.

    sum     sigma(Q) M / (sigma(Q) z)         equation (7): a weighted mean of the stored values
    root    sigma(Q) M / sqrt(sigma(Q) z)     grows with the square root of how much there is to find
    none    sigma(Q) M                        grows with how much there is to find
    unit    u(Q) M                            u(X) = sigma(X) / ||sigma(X)||, which takes sigma's place in the
                                              sums M and z, too

All four find 0 in a memory that is empty. z is kept whatever the name: it tells an empty memory.
"""

from dataclasses import replace

import torch
from torch import Tensor

from infini_attention.ops.feature_maps import FeatureMap

NORMALIZATIONS = ("sum", "root", "none", "unit")
DENOMINATOR_FLOOR = 1e-30  # far below any sum of features that carries information, far above fp32 underflow
LENGTH_FLOOR = 1e-15  # the same of a vector's length, whose square must not underflow


def normalized(sigma: FeatureMap, normalization: str) -> FeatureMap:
    """The map by which queries and keys reach the memory; ValueError for an unknown `normalization`."""
    if normalization not in NORMALIZATIONS:
        known = ", ".join(map(repr, NORMALIZATIONS))
        raise ValueError(f"normalization is {normalization!r}; choose one of {known}")
    return replace(sigma, function=lambda x: _unit(sigma(x))) if normalization == "unit" else sigma


def read(features: Tensor, memory: Tensor, normalizer: Tensor, normalization: str) -> Tensor:
    """What the memory answers to the `features` of a `normalized` map; zero where it is empty.

    `features` (..., length, feature_dim), `memory` (..., feature_dim, value_dim),
    `normalizer` (..., feature_dim); returns (..., length, value_dim).
    """
    answer = features @ memory
    if normalization in ("none", "unit"):
        return answer
    total = denominator(features, normalizer)
    return answer / (total.sqrt() if normalization == "root" else total)


def denominator(features: Tensor, normalizer: Tensor) -> Tensor:
    """sigma(X) z, (..., length, 1); infinite where it is zero, as it is where the memory is empty.

    Dividing by it therefore finds nothing where nothing is stored, and with a zero gradient.
    """
    product = features @ normalizer.unsqueeze(-1)
    return torch.where(product.abs() < DENOMINATOR_FLOOR, float("inf"), product)


def _unit(features: Tensor) -> Tensor:
    """Features of length 1; those that are all zero stay so, with a zero gradient."""
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / torch.where(length < LENGTH_FLOOR, float("inf"), length)
