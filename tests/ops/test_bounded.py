"""Beyond inputs and outputs, memory does not grow with the length in inference."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infini_attention.ops import infini_attention


class PeakBytes(TorchDispatchMode):
    """Counts bytes of storages made and still alive under it; `given` were there before."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.alive.keys() | self.given:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_inference_holds_no_more_for_a_longer_text(update_rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infini_attention.ops.parallel.BLOCK_TOKENS", 64)
    extra = []
    for segments in (8, 64):
        tensors = torch.randn(3, 1, 2, 16 * segments, 8)
        with torch.no_grad(), PeakBytes([tensors]) as counted:
            output, _ = infini_attention(*tensors, torch.zeros(2), segment_length=16, update_rule=update_rule)
        extra.append(counted.peak - output.nbytes)
    assert extra[1] <= 1.05 * extra[0]
