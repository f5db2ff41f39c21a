"""`write_whole` leaves what `infini_attention` leaves of whole segments, and its gradients are the same."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infini_attention.ops import MemoryState, infini_attention
from infini_attention.ops.write import write_whole

ROWS, HEADS, KV_HEADS, DIM, SEGMENT = 3, 4, 2, 6, 5


def tokens(segments: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int) -> Tensor:
        return torch.randn(ROWS, heads, segments * SEGMENT, DIM, dtype=torch.float64, generator=generator)

    names = {"key": KV_HEADS, "value": KV_HEADS, "context_key": KV_HEADS, "query": HEADS}
    return {name: random(heads).requires_grad_() for name, heads in names.items()}


def settings_of(local_attention: str, update_rule: str, feature_map: str) -> dict[str, Any]:
    settings = {"segment_length": SEGMENT, "local_attention": local_attention, "sink_tokens": 2}
    return settings | {"update_rule": update_rule, "feature_map": feature_map}


def attended(given: dict[str, Tensor], state: MemoryState | None, settings: dict[str, Any]) -> MemoryState:
    """What `infini_attention` leaves."""
    given = dict(given)
    if settings["local_attention"] == "segment":
        del given["context_key"]
    gate = torch.zeros(HEADS, dtype=torch.float64)
    query, key, value = (given.pop(name) for name in ("query", "key", "value"))
    return infini_attention(query, key, value, gate, state=state, **given, **settings)[1]


def written(given: dict[str, Tensor], state: MemoryState | None, settings: dict[str, Any]) -> MemoryState:
    context_key = None if settings["local_attention"] == "segment" else given["context_key"]
    return write_whole(given["key"], given["value"], context_key=context_key, state=state, **settings)


def gradients(state: MemoryState, given: dict[str, Tensor]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for x in state.tensors().values():
        if x.is_floating_point() and x.requires_grad:
            total = total + (x * torch.randn(x.shape, dtype=x.dtype, generator=generator)).sum()
    return list(torch.autograd.grad(total, [given[name] for name in ("key", "value")], allow_unused=True))


@pytest.mark.parametrize("before", ["nothing", "whole segments", "one row afresh"])
@pytest.mark.parametrize("feature_map", ["elu1", "dpfp"])
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("local_attention", ["segment", "sliding", "sink"])
def test_the_state_and_its_gradients_are_those_of_attention(
    local_attention: str, update_rule: str, feature_map: str, before: str
) -> None:
    settings, state = settings_of(local_attention, update_rule, feature_map), None
    if before != "nothing":
        state = attended(tokens(2, seed=0), None, settings).detach()
    if before == "one row afresh":
        assert state is not None
        state = state.forget(torch.tensor([False, True, False]))
    for segments in (1, 3):
        given = tokens(segments, seed=1)
        wanted, found = attended(given, state, settings), written(given, state, settings)
        assert found.tensors().keys() == wanted.tensors().keys()
        for name, x in wanted.tensors().items():
            torch.testing.assert_close(found.tensors()[name], x, msg=name)
        for ours, theirs in zip(gradients(found, given), gradients(wanted, given), strict=True):
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours, theirs)


def test_segments_that_are_not_whole_are_refused() -> None:
    settings = settings_of("segment", "linear", "elu1")
    given = tokens(2, seed=0)
    cut = {name: x[:, :, :7] for name, x in given.items()}
    with pytest.raises(ValueError, match="7 tokens after 0 of an open segment are not whole segments of 5"):
        written(cut, None, settings)
    with pytest.raises(ValueError, match="10 tokens after 2 of an open segment are not whole"):
        written(given, attended(cut, None, settings), settings)
    with pytest.raises(ValueError, match="update_rule is 'none'"):
        written(given, None, settings | {"update_rule": "none"})
