"""Feature maps: what sigma is in equations (7) to (9), one name and one function each.

A map turns queries and keys into the features that write and read the memory. It is applied in the
memory's own precision (fp32, or fp64 with fp64 inputs). Non-negative maps make the memory's read a
weighted mean of stored values; the delta rule needs that, the linear rule does not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EXP_RANGE = (
    -20.0,
    10.0,
)  # exp(10) x 10M tokens still sums exactly enough in fp32; exp(-20) is still a normal number


@dataclass(frozen=True)
class FeatureMap:
    """A named map from (..., head_dim) to (..., head_dim * expansion)."""

    name: str
    function: Callable[[Tensor], Tensor]
    expansion: int = 1
    nonnegative: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        """Features of `x`, in its dtype."""
        return self.function(x)

    def feature_dim(self, head_dim: int) -> int:
        """The last dimension of the map's output for inputs of width `head_dim`."""
        return head_dim * self.expansion


_REGISTRY: dict[str, FeatureMap] = {}


def get(name: str) -> FeatureMap:
    """The map registered as `name`; ValueError with the known names if there is none."""
    if name not in _REGISTRY:
        raise ValueError(f"feature_map {name!r} is not registered; choose one of {', '.join(names())}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


def register(feature_map: FeatureMap) -> FeatureMap:
    """Make `feature_map` usable by name everywhere; ValueError if the name is taken."""
    if feature_map.name in _REGISTRY:
        raise ValueError(f"feature_map {feature_map.name!r} is already registered; choose another name")
    _REGISTRY[feature_map.name] = feature_map
    return feature_map


def _elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _exp(x: Tensor) -> Tensor:
    return x.clamp(*EXP_RANGE).exp()


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _dpfp(x: Tensor) -> Tensor:
    """Deterministic parameter-free projection, nu = 1 (Schlag et al. 2021, arXiv 2102.11174)."""
    rectified = F.relu(torch.cat([x, -x], dim=-1))
    return rectified * rectified.roll(1, dims=-1)


def _identity(x: Tensor) -> Tensor:
    return x


register(FeatureMap("elu1", _elu1))
register(FeatureMap("exp", _exp))
register(FeatureMap("relu2", _relu2))
register(FeatureMap("softplus", F.softplus))
register(FeatureMap("dpfp", _dpfp, expansion=2))
register(FeatureMap("identity", _identity, nonnegative=False))
