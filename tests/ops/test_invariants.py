"""What must hold for every backend, rule, map, dtype and grouping."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from infini_attention.ops import infini_attention

from .cases import (
    LAYOUTS,
    TOLERANCES,
    Case,
    assert_equal,
    assert_states_equal,
    cases,
    lay_out,
    make_case,
    run,
    scalar,
    splits,
)

layouts = st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3)
well_conditioned_maps = st.sampled_from(["elu1", "exp", "softplus"])


@given(st.data(), cases())
def test_any_chunking_is_the_same_computation(backend: str, data: st.DataObject, case: Case) -> None:
    outputs, state = run(case, backend=backend)
    pieces = data.draw(splits(case))
    chunked, chunked_state = run(case, backend=backend, pieces=pieces, layouts=data.draw(layouts))
    for actual, expected in zip(chunked, outputs, strict=True):
        assert_equal(actual, expected, tolerance=1e-10)
    assert_states_equal(chunked_state, state, tolerance=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
def test_any_chunking_is_the_same_computation_in_low_precision(
    backend: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    feature_map = data.draw(well_conditioned_maps)
    case = data.draw(cases(feature_map=feature_map, weighted=False)).to(dtype)
    outputs, state = run(case, backend=backend)
    pieces = data.draw(splits(case))
    chunked, chunked_state = run(case, backend=backend, pieces=pieces, layouts=data.draw(layouts))
    for actual, expected in zip(chunked, outputs, strict=True):
        assert actual.dtype == dtype
        assert_equal(actual, expected, tolerance=TOLERANCES[dtype])
    assert_states_equal(chunked_state, state, tolerance=TOLERANCES[torch.float32])


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_token_by_token_is_the_same_computation(backend: str, update_rule: str) -> None:
    case = make_case([23, 17], segment_length=5, update_rule=update_rule)
    outputs, state = run(case, backend=backend)
    pieces = [[1, int(token < 17)] for token in range(23)]
    one_by_one, last_state = run(case, backend=backend, pieces=pieces, layouts=["right", "left", "packed"])
    for actual, expected in zip(one_by_one, outputs, strict=True):
        assert_equal(actual, expected, tolerance=1e-10)
    assert_states_equal(last_state, state, tolerance=1e-10)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(data=st.data())
def test_at_most_one_segment_is_ordinary_attention_bit_for_bit(
    backend: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    """On tensors stored token by token, as layers make them; SDPA rounds otherwise on other strides."""
    segment_length = data.draw(st.integers(1, 40))
    length = data.draw(st.integers(1, segment_length))
    rows = 1 if backend == "reference" else data.draw(st.integers(1, 3))  # a batch, too, rounds otherwise
    fixed = {"segment_length": segment_length, "lengths": [length] * rows}
    case = data.draw(cases(**fixed, empty_memory="local", softcap=None)).to(dtype)
    arguments, _ = lay_out(case.rows, "none")
    arguments = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in arguments.items()}
    output, _ = infini_attention(**arguments, **case.settings, gate=case.gate, backend=backend)
    local = [arguments[name] for name in ("local_query", "local_key")]
    local.append(arguments.get("local_value", arguments["value"]))
    grouped = local[0].shape[1] != local[1].shape[1]
    scale = (
        case.settings["scale"] or local[0].shape[-1] ** -0.5
    )  # not 1 / sqrt(head_dim), which rounds otherwise
    expected = F.scaled_dot_product_attention(*local, is_causal=True, scale=scale, enable_gqa=grouped)
    assert torch.equal(output, expected)

    padded, _ = run(case, backend=backend, layouts=[data.draw(st.sampled_from(LAYOUTS))])
    assert_equal(torch.stack(padded), expected, tolerance=4 * torch.finfo(dtype).eps)


def test_a_memory_is_empty_for_its_own_group_of_heads_only(backend: str) -> None:
    """Keys of one key/value head leave nothing there with relu2: its query heads attend locally alone."""
    case = make_case([12], segment_length=4, update_rule="linear", feature_map="relu2")
    (row,) = case.rows
    key = torch.stack([-row.key[0].abs(), row.key[1].abs()])
    case = replace(case, rows=[replace(row, key=key, query=row.query.abs())])
    (output,), _ = run(case, backend=backend)
    (local,), _ = run(replace(case, gate=torch.full_like(case.gate, -1e4)), backend=backend)
    assert torch.equal(output[:2], local[:2])
    assert not torch.isclose(output[2:, 4:], local[2:, 4:]).any()


@given(st.data(), cases())
def test_rows_are_independent(backend: str, data: st.DataObject, case: Case) -> None:
    pieces = data.draw(splits(case))
    order = data.draw(st.permutations(range(len(case.rows))))
    shuffled = replace(case, rows=[case.rows[index] for index in order])
    shuffled_pieces = [[piece[index] for index in order] for piece in pieces]
    outputs, state = run(shuffled, backend=backend, pieces=shuffled_pieces, layouts=data.draw(layouts))
    for place, index in enumerate(order):
        alone = replace(case, rows=[case.rows[index]])
        alone_pieces = [[piece[index]] for piece in pieces]
        (expected,), expected_state = run(alone, backend=backend, pieces=alone_pieces)
        assert_equal(outputs[place], expected, tolerance=1e-10)
        assert_states_equal(state.select(torch.tensor([place])), expected_state, tolerance=1e-10)


@given(st.data(), cases())
def test_nan_in_one_row_reaches_no_other(backend: str, data: st.DataObject, case: Case) -> None:
    pieces, piece_layouts = data.draw(splits(case)), data.draw(layouts)
    outputs, state = run(case, backend=backend, pieces=pieces, layouts=piece_layouts)
    ill = data.draw(st.integers(0, len(case.rows) - 1))
    row = case.rows[ill]
    names = data.draw(st.sets(st.sampled_from(list(row.tokens())), min_size=1))
    bad_row = replace(row, **{name: torch.full_like(getattr(row, name), float("nan")) for name in names})
    bad_case = replace(case, rows=[bad_row if index == ill else r for index, r in enumerate(case.rows)])
    bad_outputs, bad_state = run(bad_case, backend=backend, pieces=pieces, layouts=piece_layouts)
    for index, (actual, expected) in enumerate(zip(bad_outputs, outputs, strict=True)):
        if index != ill:
            assert torch.equal(actual, expected)
    healthy = torch.tensor([index for index in range(len(case.rows)) if index != ill], dtype=torch.int64)
    assert_states_equal(bad_state.select(healthy), state.select(healthy), tolerance=0.0)


@given(st.data(), cases())
def test_padding_enters_no_gradient(backend: str, data: st.DataObject, case: Case) -> None:
    """`run` puts NaN at padded places: whatever they reach would be NaN."""
    case = case.leaves()
    outputs, state = run(case, backend=backend, pieces=data.draw(splits(case)), layouts=data.draw(layouts))
    loss = scalar(outputs, state)
    if loss.requires_grad:
        loss.backward()
    for tensor in case.tensors():
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()


@given(st.data(), cases())
def test_the_future_never_leaks(backend: str, data: st.DataObject, case: Case) -> None:
    pieces, piece_layouts = data.draw(splits(case)), data.draw(layouts)
    changed_row = data.draw(st.integers(0, len(case.rows) - 1))
    row = case.rows[changed_row]
    first = data.draw(st.integers(0, row.length))
    changed = {name: tensor.clone() for name, tensor in row.tokens().items()}
    for tensor in changed.values():
        tensor[:, first:] = 3.0 * tensor[:, first:] + 1.0
    rows = [replace(r, **changed) if index == changed_row else r for index, r in enumerate(case.rows)]
    before, _ = run(case, backend=backend, pieces=pieces, layouts=piece_layouts)
    after, _ = run(replace(case, rows=rows), backend=backend, pieces=pieces, layouts=piece_layouts)
    for index, (actual, expected) in enumerate(zip(after, before, strict=True)):
        past = slice(first) if index == changed_row else slice(None)
        assert torch.equal(actual[:, past], expected[:, past])


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("first", [1, 3, 4, 5, 8, 11], ids=lambda first: f"from-token-{first}")
def test_the_future_never_leaks_at_segment_borders(backend: str, update_rule: str, first: int) -> None:
    case = make_case([12], segment_length=4, update_rule=update_rule)
    (row,) = case.rows
    changed = replace(row, key=row.key.clone(), value=row.value.clone())
    changed.key[:, first:], changed.value[:, first:] = 5.0, -5.0
    for layout in ("none", "packed"):
        for pieces in (None, [[5], [3], [4]]):
            (before,), _ = run(case, backend=backend, pieces=pieces, layouts=[layout])
            (after,), _ = run(replace(case, rows=[changed]), backend=backend, pieces=pieces, layouts=[layout])
            assert torch.equal(after[:, :first], before[:, :first])
            assert not torch.equal(after[:, first:], before[:, first:])
