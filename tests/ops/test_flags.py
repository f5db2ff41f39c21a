"""Marks of the host, made on the device that wants them."""

import pytest
import torch

from infini_attention.ops.flags import BITS, flags


@pytest.mark.parametrize("count", [0, 1, BITS - 1, BITS, BITS + 1, 2 * BITS, 1000])
@pytest.mark.parametrize("what", ["none", "all", "some"])
def test_flags_are_what_the_host_has_marked(count: int, what: str) -> None:
    some = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    values = {"none": [False] * count, "all": [True] * count, "some": some.tolist()}[what]
    made = flags(values, "cpu")
    assert made.dtype == torch.bool and made.tolist() == values
