"""What tokens see outside their own segment, against masks drawn in full and memories written in a loop."""

import pytest
import torch
from torch import Tensor

from infini_attention.ops import feature_maps, infini_attention

from .cases import assert_equal

N, SINKS, LENGTH, DIM = 4, 3, 18, 6
CONTEXT = {"sliding": N, "sink": SINKS}


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one row and one head, without positions."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 1, 1, LENGTH, DIM, dtype=torch.float64, generator=generator))


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions in full precision."""
    first, second = x.chunk(2, dim=-1)
    angles = places[:, None] * 10.0 ** -torch.arange(DIM // 2, dtype=x.dtype)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attended(
    backend: str, local_attention: str, gate: float, length: int = LENGTH, **settings: str
) -> Tensor:
    """Our output of the first `length` tokens, with rotary positions that restart in every segment."""
    query, key, value = (x[:, :, :length] for x in tokens())
    places = torch.arange(length) % N
    output, _ = infini_attention(
        query,
        key,
        value,
        torch.full((1,), gate, dtype=torch.float64),
        segment_length=N,
        local_query=rotated(query, places),
        local_key=rotated(key, places),
        context_key=rotated(key, places - CONTEXT[local_attention]),
        local_attention=local_attention,
        sink_tokens=SINKS,
        backend=backend,
        **settings,
    )
    return output[0, 0]


def visible(local_attention: str) -> Tensor:
    """(length, length) bool: which keys (columns) a token (row) sees."""
    at = torch.arange(LENGTH)
    row, column = at[:, None], at[None]
    back = row // N - column // N  # segments
    mask = (back == 0) & (column <= row)
    return mask | ((back == 1) if local_attention == "sliding" else (column < SINKS) & (back > 0))


def dense(local_attention: str) -> Tensor:
    """Softmax attention under that mask; in it, sinks stand just before the segment."""
    query, key, value = tokens()
    at, mask = torch.arange(LENGTH), visible(local_attention)
    output = torch.zeros(LENGTH, DIM, dtype=torch.float64)
    for t in range(LENGTH):
        seen = mask[t].nonzero()[:, 0]
        places = at if local_attention == "sliding" or t < N else torch.arange(LENGTH)
        distance = t - places[seen]
        if local_attention == "sink" and t >= N:
            distance = torch.where(seen < SINKS, SINKS + t % N - seen, distance)
        keys = rotated(key[:, :, seen], -distance)  # a rotation knows distances alone
        scores = (keys @ query[:, :, t, :, None])[0, 0, :, 0] * DIM**-0.5
        output[t] = scores.softmax(0) @ value[0, 0, seen]
    return output


def remembered(local_attention: str, update_rule: str) -> Tensor:
    """What a memory of all segments outside the window answers to each token, 0 if empty; in a loop."""
    (query, key, value), sigma = (x[0, 0] for x in tokens()), feature_maps.get("elu1")
    output = torch.zeros(LENGTH, DIM, dtype=torch.float64)
    for t in range(LENGTH):
        M, z = torch.zeros(DIM, DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64)
        for segment in range(t // N - (1 if local_attention == "sliding" else 0)):
            part = slice(segment * N, (segment + 1) * N)
            features, values = sigma(key[part]), value[part]
            if update_rule == "delta" and segment:
                values = values - features @ M / (features @ z)[:, None]
            M, z = M + features.T @ values, z + features.sum(0)
        if z.any():
            output[t] = sigma(query[t]) @ M / (sigma(query[t]) @ z)
    return output


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("local_attention", CONTEXT)
def test_the_output_is_that_of_a_mask_and_of_a_memory_written_in_a_loop(
    backend: str, local_attention: str, update_rule: str
) -> None:
    from_memory = remembered(local_attention, update_rule)
    share = torch.where(from_memory.any(dim=1, keepdim=True), 0.5, 0.0)
    expected = share * from_memory + (1 - share) * dense(local_attention)
    actual = attended(backend, local_attention, 0.0, update_rule=update_rule)
    assert_equal(actual, expected, tolerance=1e-12)


def test_a_window_that_slides_shows_or_remembers_every_earlier_token_once(backend: str) -> None:
    """The tokens that a loss at token t reaches, through attention alone and through the memory alone."""
    query, key, value = (x.clone() for x in tokens())
    reached = []
    for gate in (-1e4, 1e4):
        leaf = value.clone().requires_grad_()
        settings = {"segment_length": N, "local_attention": "sliding", "empty_memory": "gated"}
        gates = torch.full((1,), gate, dtype=torch.float64)
        output, _ = infini_attention(query, key, leaf, gates, backend=backend, **settings)
        gradients = [
            torch.autograd.grad(output[0, 0, t].sum(), leaf, retain_graph=True)[0] for t in range(LENGTH)
        ]
        reached.append(torch.stack([gradient[0, 0].any(dim=1) for gradient in gradients]))
    seen, in_memory = reached
    assert torch.equal(seen, visible("sliding"))
    assert torch.equal(seen ^ in_memory, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
    assert not (seen & in_memory).any()


def test_inputs_of_at_most_two_segments_are_ordinary_attention_in_a_window_that_slides(backend: str) -> None:
    query, key, value = (x[:, :, : 2 * N] for x in tokens())
    places = torch.arange(2 * N)
    expected = torch.nn.functional.scaled_dot_product_attention(
        rotated(query, places), rotated(key, places), value, is_causal=True
    )
    assert_equal(attended(backend, "sliding", 5.0, 2 * N), expected[0, 0], tolerance=1e-12)
