"""InfiniAttention and MemoryGate."""

from typing import Any

import pytest
import torch

from infini_attention import InfiniAttention, MemoryGate

WIDTH, N = 32, 8


def layer(**settings: Any) -> InfiniAttention:
    torch.manual_seed(0)
    return InfiniAttention(WIDTH, 4, **({"segment_length": N, "kv_heads": 2} | settings)).double()


def tokens(length: int = 30, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qk_norm": True, "update_rule": "delta"},
        {"rope_theta": None, "bias": True},
        {"local_attention": "sliding"},
        {"local_attention": "sink", "sink_tokens": 3},
    ],
)
def test_any_chunking_is_the_same_computation(settings: dict[str, Any]) -> None:
    module, hidden = layer(**settings), tokens()
    whole, last = module(hidden)
    state, parts = None, []
    for piece in hidden.split([1, 9, 16, 4], dim=1):
        part, state = module(piece, state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state.memory, last.memory)


@pytest.mark.parametrize("normalization", ["root", "none", "unit"])
def test_the_normalization_changes_what_memory_answers_and_nothing_else(normalization: str) -> None:
    """The first segment has no memory to read."""
    ours, plain = (layer(**settings)(tokens())[0] for settings in ({"normalization": normalization}, {}))
    assert torch.equal(ours[:, :N], plain[:, :N])
    assert not torch.isclose(ours[:, N:], plain[:, N:]).all(dim=-1).any()


def test_memory_is_written_without_rotation() -> None:
    """So it does not depend on what rotates, nor on where in the text a segment stands."""
    hidden = tokens(4 * N)
    states = [layer(rope_theta=theta)(hidden)[1] for theta in (10_000.0, 100.0, None)]
    for state in states[1:]:
        assert torch.equal(state.memory, states[0].memory)
    shifted = torch.cat([torch.randn(2, N, WIDTH, dtype=torch.float64), hidden], dim=1)
    _, later = layer()(shifted)
    _, alone = layer()(shifted[:, :N])
    torch.testing.assert_close(later.memory - alone.memory, states[0].memory)


def test_rotation_restarts_in_every_segment() -> None:
    module, segment = layer(gate_init=-1e4), tokens(N)
    output, _ = module(segment.repeat(1, 3, 1))
    for piece in output.split(N, dim=1):
        torch.testing.assert_close(piece, output[:, :N])


def test_two_segments_of_a_window_that_slides_are_one_of_twice_the_length() -> None:
    """Rotary positions of what stands outside a segment go on from those inside."""
    output, _ = layer(local_attention="sliding")(tokens(2 * N))
    expected, _ = layer(segment_length=2 * N)(tokens(2 * N))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_sinks_stand_just_before_every_segment() -> None:
    """So a segment after them is the second one of a text in which nothing stands between."""
    module, hidden = layer(local_attention="sink", sink_tokens=N, gate_init=-1e4), tokens(4 * N)
    output, _ = module(hidden)
    near, _ = module(torch.cat([hidden[:, :N], hidden[:, -N:]], dim=1))
    torch.testing.assert_close(output[:, -N:], near[:, -N:])
    both, _ = layer(segment_length=2 * N)(torch.cat([hidden[:, :N], hidden[:, -N:]], dim=1))
    torch.testing.assert_close(output[:, -N:], both[:, -N:], rtol=1e-5, atol=1e-6)


def test_rotation_makes_a_difference() -> None:
    assert not torch.allclose(layer()(tokens())[0], layer(rope_theta=None)(tokens())[0])


def test_a_padded_row_equals_its_unpadded_self() -> None:
    module, hidden = layer(), tokens(20, batch=1)
    expected, _ = module(hidden)
    padded = torch.cat([torch.full((1, 5, WIDTH), 7.0, dtype=torch.float64), hidden], dim=1)
    mask = torch.ones(1, 25, dtype=torch.bool)
    mask[:, :5] = False
    output, state = module(padded, padding_mask=mask)
    torch.testing.assert_close(output[:, 5:], expected)
    assert state.length.tolist() == [20]


def test_a_padded_batch_goes_on_as_each_of_its_rows_would() -> None:
    """As in generation: prompts padded on the left, then tokens for every row."""
    module, hidden = layer(update_rule="delta"), tokens(20)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, :5] = False
    _, state = module(hidden[:, :14], padding_mask=mask)
    output, _ = module(hidden[:, 14:], state=state)
    for row, first in enumerate((0, 5)):
        alone, _ = module(hidden[row : row + 1, first:])
        torch.testing.assert_close(output[row : row + 1], alone[:, -6:])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_equal_heads_with_copied_projections(kv_heads: int) -> None:
    grouped, full = layer(kv_heads=kv_heads, qk_norm=True), layer(kv_heads=4, qk_norm=True)
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = weights[name].unflatten(0, (kv_heads, -1))
        weights[name] = heads.repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens())[0], full(tokens())[0])


def test_normalised_queries_and_keys_do_not_depend_on_the_size_of_projections() -> None:
    module = layer(qk_norm=True)
    expected, _ = module(tokens())
    with torch.no_grad():
        module.q_proj.weight.mul_(16)
        module.k_proj.weight.mul_(16)
    torch.testing.assert_close(module(tokens())[0], expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(layer()(tokens())[0], expected)


def test_packed_documents_equal_separate_ones() -> None:
    module, hidden = layer(), tokens(30, batch=1)
    output, _ = module(hidden, cu_seqlens=torch.tensor([0, 11, 30]))
    for piece in (slice(0, 11), slice(11, 30)):
        torch.testing.assert_close(output[:, piece], module(hidden[:, piece])[0])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"hidden_size": 30, "heads": 4}, "30 is not a multiple of heads 4; give head_dim"),
        ({"hidden_size": 32, "heads": 4, "kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"hidden_size": 12, "heads": 4}, "head_dim 3 is odd"),
        ({"hidden_size": 32, "heads": 0}, "heads is 0 and kv_heads 0; give at least 1 of each"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InfiniAttention(**sizes, segment_length=N)


def test_a_gate_stays_in_full_precision() -> None:
    module = layer().float()
    with torch.no_grad():
        module.memory_gate.logits.fill_(0.123456789)
    for dtype in (torch.bfloat16, torch.float16):
        module.to(dtype)
        assert module.memory_gate().dtype == torch.float32
        assert module.memory_gate()[0].item() == pytest.approx(0.123456789, abs=1e-8)
        assert module.q_proj.weight.dtype == dtype
        assert module(tokens().to(dtype))[0].dtype == dtype
    assert module.half().memory_gate().dtype == torch.float32
    assert module.double().memory_gate().dtype == torch.float64


def test_a_layer_comes_back_from_its_state_dict() -> None:
    module, other = layer(gate_init=0.5), layer(gate_init=-1.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(tokens())[0], module(tokens())[0])
    assert "memory_gate.logits" in module.state_dict()


def test_gates_start_where_they_are_told_and_learn() -> None:
    module = layer(gate_init=-3.0)
    assert (module.memory_gate() == -3).all()
    module(tokens())[0].square().sum().backward()
    assert module.memory_gate.logits.grad.abs().min() > 0
    assert repr(MemoryGate(4, -3.0)) == "MemoryGate(heads=4, init=-3.0)"


@pytest.mark.parametrize("gate_init", [0.0, -3.0])
def test_a_gate_opens_where_the_answer_lies_in_an_earlier_segment(gate_init: float) -> None:
    """Eight places are told their symbols, and asked for them a segment later: only memory can answer."""
    torch.manual_seed(0)
    symbols = torch.eye(8)
    sizes = {"head_dim": 32, "segment_length": 8, "rope_theta": None, "feature_map": "exp"}
    module = InfiniAttention(17, 1, gate_init=gate_init, **sizes)
    body = [parameter for name, parameter in module.named_parameters() if "memory_gate" not in name]
    groups = [{"params": body, "lr": 2e-2}, {"params": module.memory_gate.parameters(), "lr": 5e-2}]
    optimizer = torch.optim.Adam(groups)
    places = symbols.expand(16, 8, 8)
    asked = torch.cat([places, torch.zeros(16, 8, 8), torch.ones(16, 8, 1)], dim=2)
    for _ in range(300):
        answers = symbols[torch.stack([torch.randperm(8) for _ in range(16)])]
        told = torch.cat([places, answers, torch.zeros(16, 8, 1)], dim=2)
        output, _ = module(torch.cat([told, asked], dim=1))
        loss = (output[:, 8:, 8:16] - answers).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01  # a guess costs 0.109
    assert module.memory_gate().sigmoid().item() > 0.5
