"""Beyond inputs and outputs, memory does not grow with the length in inference."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from infini_attention.ops import infini_attention

N = 16


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


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infini_attention.ops.parallel.BLOCK_TOKENS", 4 * N)


def extra_bytes(
    length: int, update_rule: str, local_attention: str = "segment", **masks: torch.Tensor
) -> int:
    """Most bytes alive at once beyond inputs and output."""
    tensors = torch.randn(3, 1, 2, length, 8)
    settings = {"segment_length": N, "update_rule": update_rule, "local_attention": local_attention}
    with torch.no_grad(), PeakBytes([tensors, *masks.values()]) as counted:
        output, _ = infini_attention(*tensors, torch.zeros(2), **settings, **masks)
    return counted.peak - output.nbytes


def test_the_count_is_of_what_is_alive_at_once() -> None:
    with PeakBytes([]) as counted:
        for _ in range(3):
            torch.zeros(100)
        kept = [torch.zeros(100), torch.zeros(100)]
        kept[0].view(10, 10)
    assert counted.peak == 2 * 400


@pytest.mark.parametrize("rest", [0, 5], ids=["whole", "open"])
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("local_attention", ["segment", "sliding", "sink"])
def test_inference_holds_no_more_for_a_longer_text(update_rule: str, rest: int, local_attention: str) -> None:
    extra = [extra_bytes(N * segments + rest, update_rule, local_attention) for segments in (9, 65)]
    assert extra[1] <= 1.05 * extra[0]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_padding_and_packing_hold_no_more_than_where_tokens_stand(update_rule: str, layout: str) -> None:
    """Two int64 positions a token, whatever the number of heads and their width."""
    extra, lengths = [], (N * 64, N * 128)
    for length in lengths:
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[:, :3] = False
        ends = torch.tensor([0, length // 2, length])
        masks = {"padding_mask": mask} if layout == "padded" else {"cu_seqlens": ends}
        extra.append(extra_bytes(length, update_rule, **masks))
    assert extra[1] - extra[0] <= 1.05 * 16 * (lengths[1] - lengths[0])
