"""torch.compile sees one graph in a call that starts afresh."""

import shutil

import pytest
import torch
from torch import Tensor

from infini_attention.ops import infini_attention

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs g++, which is missing"
)


@needs_compiler
@pytest.mark.parametrize(
    ("update_rule", "normalization", "length", "local_attention"),
    [
        ("linear", "sum", 64, "segment"),
        ("delta", "sum", 50, "segment"),
        ("linear", "unit", 50, "segment"),
        ("delta", "sum", 50, "sliding"),
    ],
)
def test_a_compiled_call_equals_an_eager_one(
    update_rule: str, normalization: str, length: int, local_attention: str
) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        settings = {"update_rule": update_rule, "normalization": normalization, "backend": "parallel"}
        settings["local_attention"] = local_attention
        return infini_attention(query, key, value, gate, segment_length=16, **settings)[0]

    tensors = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
    tensors.append(torch.zeros(2, requires_grad=True))
    expected = function(*tensors)
    actual = torch.compile(function, fullgraph=True)(*tensors)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(output.square().sum(), tensors) for output in (actual, expected))
    for compiled, eager in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
