from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infini_attention.ops import MemoryState, infini_attention
from infini_attention.ops.step import StepBuffers, infini_attention_step

from .cases import assert_states_equal

SEGMENT, HEADS, KV_HEADS, DIM = 4, 4, 2, 6


def tokens(length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(heads: int) -> Tensor:
        return torch.randn(1, heads, length, DIM, generator=generator, dtype=torch.float64)

    tensors = {name: randn(HEADS) for name in ("query", "local_query")}
    tensors |= {name: randn(KV_HEADS) for name in ("key", "local_key", "value", "context_key")}
    return tensors


def piece(tensors: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: x[:, :, part] for name, x in tensors.items()}


def batch(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in pieces]) for name in pieces[0]}


@pytest.mark.parametrize(
    ("update_rule", "normalization"),
    [("linear", "sum"), ("linear", "root"), ("linear", "none"), ("linear", "unit"), ("delta", "sum")],
)
@pytest.mark.parametrize("empty_memory", ["local", "gated"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("width", [None, SEGMENT - 1])
@pytest.mark.parametrize("local_attention", ["segment", "sliding", "sink"])
def test_steps_equal_the_function_for_rows_at_different_places(
    update_rule: str,
    normalization: str,
    empty_memory: str,
    softcap: float | None,
    width: int | None,
    local_attention: str,
) -> None:
    gate = torch.randn(HEADS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = {
        "update_rule": update_rule,
        "normalization": normalization,
        "empty_memory": empty_memory,
        "softcap": softcap,
    }
    texts, starts, steps = [tokens(20, seed) for seed in range(3)], [0, 5, 10], 7
    outside = {"local_attention": local_attention, "sink_tokens": 2}
    if local_attention == "segment":
        for text in texts:
            del text["context_key"]
    buffers = StepBuffers.empty(
        1, 3, KV_HEADS, DIM, DIM, segment_length=SEGMENT, dtype=torch.float64, **outside
    )
    states: list[MemoryState | None] = [None, None, None]
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        if start:
            _, states[row] = infini_attention(
                **piece(text, slice(start)), gate=gate, segment_length=SEGMENT, **settings, **outside
            )
            buffers.load(row, [states[row]])
    places = list(starts)
    buffers.active[:] = True
    for number in range(steps):
        buffers.active[1] = number != 3  # a row that sits one out
        news = [piece(text, slice(place, place + 1)) for text, place in zip(texts, places, strict=True)]
        narrow = width if all(place % SEGMENT < SEGMENT - 1 for place in places) else None
        output = infini_attention_step(
            **batch(news), gate=gate, buffers=buffers, layer=0, scale=DIM**-0.5, width=narrow, **settings
        )
        buffers.advance()
        for row in range(3):
            if not buffers.active[row]:
                continue
            expected, states[row] = infini_attention(
                **news[row], gate=gate, segment_length=SEGMENT, state=states[row], **settings, **outside
            )
            assert torch.allclose(output[row : row + 1], expected, atol=1e-12)
            places[row] += 1
            if places[row] % SEGMENT == 0:
                buffers.commit([row])
    for row in range(3):
        (stored,) = buffers.store(row, places[row])
        assert_states_equal(stored, states[row], tolerance=1e-12)


@pytest.mark.parametrize("local_attention", ["segment", "sliding", "sink"])
def test_a_loaded_row_holds_nothing_of_its_predecessor(local_attention: str) -> None:
    settings = {"segment_length": SEGMENT, "dtype": torch.float64, "local_attention": local_attention}
    buffers = StepBuffers.empty(2, 1, KV_HEADS, DIM, DIM, **settings)
    for name, x in vars(buffers).items():
        if x.is_floating_point() and "recent" not in name:
            x.fill_(float("nan"))
    buffers.has_context.fill_(True)
    empty = MemoryState.empty(1, KV_HEADS, DIM, DIM, **settings)
    buffers.load(0, [empty, empty])
    assert not any(x.isnan().any() or x.any() for x in vars(buffers).values())


def test_what_a_convolution_looks_back_at_is_each_rows_own() -> None:
    buffers = StepBuffers.empty(1, 2, KV_HEADS, DIM, DIM, segment_length=SEGMENT, recent=(2, 3))
    buffers.active[0] = True
    buffers.look_back(0, torch.ones(2, 2, 3))
    assert buffers.open_recent[0, 0].all() and not buffers.open_recent[0, 1].any()  # it takes no part
    assert not buffers.recent.any()  # no segment has ended
    buffers.open_recent.fill_(1)
    buffers.commit([1])
    assert not buffers.recent[0, 0].any() and buffers.recent[0, 1].all()  # its segment has
    assert buffers.open_recent.all()


def test_what_a_convolution_looks_back_at_is_loaded_and_stored() -> None:
    buffers = StepBuffers.empty(1, 1, KV_HEADS, DIM, DIM, segment_length=SEGMENT, recent=(2, 3))
    empty = MemoryState.empty(1, KV_HEADS, DIM, DIM, segment_length=SEGMENT)
    buffers.load(0, [replace(empty, recent=torch.ones(1, 2, 3), open_recent=torch.full((1, 2, 3), 2.0))])
    (stored,) = buffers.store(0, 0)
    assert stored.recent is not None and stored.recent.eq(1).all()
    assert stored.open_recent is not None and stored.open_recent.eq(2).all()
    buffers.load(0, [empty])
    assert not buffers.recent.any() and not buffers.open_recent.any()  # nothing of the predecessor
