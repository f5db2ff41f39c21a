"""The parallel backend against the reference: outputs, every field of the state, every gradient."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infini_attention.ops import MemoryState, feature_maps

from .cases import LAYOUTS, Case, assert_equal, assert_states_equal, cases, make_case, run, scalar, splits

layouts = st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3)


def random_fields(case: Case, open_lengths: list[int], *, seed: int) -> dict[str, Tensor]:
    """Leaf tensors for `state_of`: such as no tokens need ever have made, so that every field matters."""
    generator = torch.Generator().manual_seed(seed)
    row, rows = case.rows[0], len(case.rows)
    kv_heads, _, head_dim = row.key.shape
    feature_dim = feature_maps.get(case.settings["feature_map"]).feature_dim(head_dim)
    value_dim, longest = row.value.shape[-1], max(open_lengths)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(rows, kv_heads, *sizes, dtype=torch.float64, generator=generator)

    fields = {
        "memory": randn(feature_dim, value_dim),
        "normalizer": randn(feature_dim).abs() + 0.5,
        "pending_memory": randn(feature_dim, value_dim),
        "pending_normalizer": randn(feature_dim).abs(),
        "local_key": randn(longest, head_dim),
        "local_value": randn(longest, value_dim),
    }
    if context := case.context_tokens:
        fields |= {"context_key": randn(context, head_dim), "context_value": randn(context, value_dim)}
        fields["open_context_key"] = randn(min(longest, context), head_dim)
    if case.settings.get("local_attention") == "sliding":
        fields["earlier_memory"] = randn(feature_dim, value_dim)
        fields["earlier_normalizer"] = randn(feature_dim).abs() + 0.5
    return {name: tensor.requires_grad_() for name, tensor in fields.items()}


def state_of(fields: dict[str, Tensor], open_lengths: list[int], *, segment_length: int) -> MemoryState:
    """A state after one whole segment and the open ones, zero wherever a row has nothing open."""
    used = torch.tensor(open_lengths)
    is_open = torch.arange(max(open_lengths)) < used[:, None]
    masks = dict.fromkeys(("local_key", "local_value"), is_open[:, None, :, None])
    if "open_context_key" in fields:
        masks["open_context_key"] = is_open[:, None, : fields["open_context_key"].shape[2], None]
    masks |= {
        "pending_memory": (used > 0)[:, None, None, None],
        "pending_normalizer": (used > 0)[:, None, None],
    }
    masked = {name: field.where(masks[name], 0) if name in masks else field for name, field in fields.items()}
    return MemoryState(**masked, length=used + segment_length, segment_length=segment_length)


@given(st.data(), cases() | cases(own_contexts=True))
def test_parallel_equals_reference(data: st.DataObject, case: Case) -> None:
    pieces, piece_layouts = data.draw(splits(case, max_pieces=2)), data.draw(layouts)
    _compare(case, None, pieces=pieces, layouts=piece_layouts)


@given(st.data(), cases() | cases(own_contexts=True))
def test_parallel_equals_reference_from_any_state(data: st.DataObject, case: Case) -> None:
    """Rows differ in how many tokens they have open; gradients flow into every field of the state."""
    open_length = st.integers(0, case.segment_length - 1)
    open_lengths = data.draw(st.lists(open_length, min_size=len(case.rows), max_size=len(case.rows)))
    pieces, piece_layouts = data.draw(splits(case, max_pieces=2)), data.draw(layouts)
    _compare(case, open_lengths, pieces=pieces, layouts=piece_layouts)


def test_blocks_of_segments_equal_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, segments are taken in blocks that bound the memory in use."""
    case = make_case([37, 12, 30], segment_length=4, update_rule="delta", weighted=True)
    outputs, state = run(case, backend="parallel")
    monkeypatch.setattr("infini_attention.ops.parallel.BLOCK_TOKENS", 9)
    for layout in LAYOUTS:
        blocked, blocked_state = run(case, backend="parallel", layouts=[layout])
        for actual, expected in zip(blocked, outputs, strict=True):
            assert_equal(actual, expected, tolerance=1e-12)
        assert_states_equal(blocked_state, state, tolerance=1e-12)


def _compare(case: Case, open_lengths: list[int] | None, **how: Any) -> None:
    outputs, state, gradients = _with_gradients("parallel", case, open_lengths, **how)
    expected, expected_state, expected_gradients = _with_gradients("reference", case, open_lengths, **how)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_equal(actual, wanted, tolerance=1e-10)
    assert_states_equal(state, expected_state, tolerance=1e-10)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_equal(actual, wanted, tolerance=1e-10, what="gradient")


def _with_gradients(
    backend: str, case: Case, open_lengths: list[int] | None, **how: Any
) -> tuple[list[Tensor], MemoryState, list[Tensor]]:
    """Outputs, last state, and the gradient of a random combination of them by every tensor going in."""
    case = case.leaves()
    tensors, state = case.tensors(), None
    if open_lengths is not None:
        fields = random_fields(case, open_lengths, seed=1)
        state = state_of(fields, open_lengths, segment_length=case.segment_length)
        tensors += fields.values()
    outputs, last = run(case, backend=backend, state=state, **how)
    loss = scalar(outputs, last) + sum(0.0 * tensor.sum() for tensor in tensors)  # a gradient for all
    return outputs, last, list(torch.autograd.grad(loss, tensors))
