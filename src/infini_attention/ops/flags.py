"""What the host has marked, on a device."""

from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 63  # of an int64, none of them its sign


def flags(values: Sequence[bool], device: torch.device | str) -> Tensor:
    """(len(values),) bool on `device`.

    Computed there: the host would wait for a copy, and a CUDA graph could not be captured around it.
    """
    places = torch.arange(BITS, device=device)
    parts = [values[start : start + BITS] for start in range(0, max(1, len(values)), BITS)]
    packed = [sum(1 << place for place, value in enumerate(part) if value) for part in parts]
    return torch.cat([bits >> places & 1 for bits in packed])[: len(values)].bool()
