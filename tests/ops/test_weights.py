"""Segment weights: how often a segment counts in memory."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from infini_attention.ops import copies, infini, infini_attention
from infini_attention.ops.parallel import parallel

from .cases import LAYOUTS, Case, Row, assert_equal, assert_states_equal, make_case, run

N = 4
DELTA = {"segment_length": N, "update_rule": "delta"}


def rebuilt(case: Case, segments: list[int], weights: list[float] | None = None) -> Case:
    """The case's only row as the given of its segments, in order."""
    (row,) = case.rows

    def pick(x: Tensor) -> Tensor:
        return torch.cat([x[:, N * s : N * (s + 1)] for s in segments], dim=1)

    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    names = ("query", "key", "value", "local_query", "local_key")
    return replace(case, rows=[Row(*(pick(getattr(row, name)) for name in names), weights=given)])


def test_a_weight_of_3_is_the_segment_three_times(backend: str) -> None:
    case = make_case([3 * N], segment_length=N, update_rule="linear")
    _, weighted = run(rebuilt(case, [0, 1, 2], [1, 3, 2]), backend=backend)
    _, repeated = run(rebuilt(case, [0, 1, 1, 1, 2, 2]), backend=backend)
    assert_equal(weighted.memory, repeated.memory, tolerance=1e-12)
    assert_equal(weighted.normalizer, repeated.normalizer, tolerance=1e-12)


def test_a_weight_of_0_leaves_the_segment_out(backend: str) -> None:
    """Also of the first: memory is then as empty as if it had never stood there."""
    case = make_case([3 * N], segment_length=N, update_rule="linear")
    (weighted,), _ = run(rebuilt(case, [0, 1, 2], [0, 1, 1]), backend=backend)
    (left_out,), _ = run(rebuilt(case, [1, 2]), backend=backend)
    assert_equal(weighted[:, N:], left_out, tolerance=1e-12)


def test_under_delta_a_segment_is_added_by_weight_and_takes_out_once(backend: str) -> None:
    case = make_case([2 * N], segment_length=N, update_rule="delta", feature_map="elu1")
    (row,) = case.rows
    _, first = run(rebuilt(case, [0]), backend=backend)
    _, both = run(rebuilt(case, [0, 1], [1, 5]), backend=backend)
    features = torch.nn.functional.elu(row.key[:, N:]) + 1
    removed = features.transpose(-1, -2) @ first.read(row.key[None, :, N:], feature_map="elu1")[0]
    added = features.transpose(-1, -2) @ row.value[:, N:]
    assert_equal(both.memory[0], first.memory[0] - removed + 5 * added, tolerance=1e-12)
    assert_equal(both.normalizer[0], first.normalizer[0] + 5 * features.sum(dim=1), tolerance=1e-12)


def copies_of(case: Case, segments: list[int], counts: list[int]) -> Case:
    """The case's only row as the given of its segments, which stand there so often."""
    row = rebuilt(case, segments).rows[0]
    return replace(case, rows=[replace(row, weights=torch.tensor(counts))])


@pytest.mark.parametrize("head_dim", [N - 1, 2 * N])
def test_copies_under_delta_go_on_from_what_the_first_of_them_left(backend: str, head_dim: int) -> None:
    """Each adds what is missing of the segment's values in what the memory answers by the z of the first."""
    sizes = {"segment_length": N, "head_dim": head_dim}
    case = make_case([2 * N], **sizes, update_rule="delta", feature_map="elu1")
    (row,) = case.rows
    _, state = run(rebuilt(case, [0, 1]), backend=backend)
    features = torch.nn.functional.elu(row.key[:, N:]) + 1
    memory, normalizer = state.memory[0], state.normalizer[0]
    for _ in range(2):
        found = features @ memory / (features @ normalizer[..., None])
        memory = memory + features.transpose(-1, -2) @ (row.value[:, N:] - found)
    _, copied = run(copies_of(case, [0, 1], [1, 3]), backend=backend)
    assert_equal(copied.memory[0], memory, tolerance=1e-12)
    assert_equal(copied.normalizer[0], normalizer + 2 * features.sum(dim=1), tolerance=1e-12)


def test_one_copy_is_the_segment_itself(backend: str) -> None:
    case = make_case([3 * N], segment_length=N, update_rule="delta")
    _, plain = run(rebuilt(case, [0, 1, 2]), backend=backend)
    _, once = run(copies_of(case, [0, 1, 2], [1, 1, 1]), backend=backend)
    assert_equal(once.memory, plain.memory, tolerance=1e-12)


@pytest.mark.parametrize("head_dim", [2 * N, N + 1, N])
def test_a_billion_copies_bring_back_what_they_said_and_leave_the_rest(head_dim: int) -> None:
    """In fp32, where a map that is multiplied by itself 30 times would show its rounding."""
    case = make_case([2 * N], segment_length=N, update_rule="delta", feature_map="exp", head_dim=head_dim)
    case = case.to(torch.float32)
    (row,) = case.rows
    _, state = run(copies_of(case, [0, 1], [1, 2**30]), backend="parallel")
    features = row.key[:, N:].double().exp()
    _, before = run(rebuilt(case, [0, 1]), backend="parallel")
    found = features @ state.memory[0].double() / (features @ before.normalizer[0].double()[..., None])
    assert_equal(found, row.value[:, N:].double(), tolerance=1e-3)
    change = (state.memory - before.memory)[0].double()
    in_span = torch.linalg.pinv(features) @ (features @ change)
    assert_equal(change - in_span, torch.zeros_like(change), tolerance=1e-5 * change.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_copies_are_those_of_the_reference_in_every_layout(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "COPIED_AT_ONCE", 2)
    case = make_case([2 * N, 3 * N, N], segment_length=N, update_rule="delta", value_dim=3)
    counts = [torch.tensor(each) for each in ([2, 1], [1, 4, 3], [5])]
    case = replace(case, rows=[replace(row, weights=w) for row, w in zip(case.rows, counts, strict=True)])
    results = [run(case, backend=backend, layouts=[layout]) for backend in ("parallel", "reference")]
    (outputs, state), (expected, expected_state) = results
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_equal(actual, wanted, tolerance=1e-12)
    assert_states_equal(state, expected_state, tolerance=1e-12)


@pytest.mark.parametrize("head_dim", [N - 1, N + 1])
def test_gradients_flow_through_copies(head_dim: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 2 * N, head_dim, dtype=torch.float64).unbind()
    gate = torch.zeros(1, dtype=torch.float64)
    weights = torch.tensor([[1, 5]])

    def memory(*tensors: Tensor) -> Tensor:
        return infini_attention(query, *tensors, gate, segment_weights=weights, **DELTA)[1].memory

    assert torch.autograd.gradcheck(memory, (key.requires_grad_(), value.requires_grad_()))


def test_whole_numbers_are_scaled_sums_under_the_linear_rule(backend: str) -> None:
    case = make_case([2 * N], segment_length=N, update_rule="linear")
    _, whole = run(copies_of(case, [0, 1], [2, 3]), backend=backend)
    _, scaled = run(rebuilt(case, [0, 1], [2, 3]), backend=backend)
    assert_equal(whole.memory, scaled.memory, tolerance=0)


def test_the_fused_kernels_refuse_copies_and_auto_goes_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infini, "obstacle", lambda *settings: None)
    inputs = SimpleNamespace(query=torch.zeros(1, 1, N, 3), segment_weights=torch.tensor([2]))
    assert infini._backend("auto", inputs, 3, "sum") is parallel
    with pytest.raises(ValueError, match="backend is 'triton', but the fused kernels make no copies"):
        infini._backend("triton", inputs, 3, "sum")


@pytest.mark.parametrize(
    ("length", "counts", "message"),
    [
        (2 * N - 1, [1, 1], "give whole segments"),
        (2 * N, [0, 1], "at least 1"),
        (2 * N, [1, 2**31], "at most"),
    ],
)
def test_copies_that_cannot_be_made_are_refused(length: int, counts: list[int], message: str) -> None:
    tensors = torch.randn(3, 1, 1, length, 3)
    with pytest.raises(ValueError, match=message):
        infini_attention(*tensors, torch.zeros(1), segment_weights=torch.tensor([counts]), **DELTA)


def test_copies_of_a_segment_that_an_earlier_call_opened_are_refused() -> None:
    tensors = torch.randn(3, 1, 1, N, 3)
    _, state = infini_attention(*tensors[..., :1, :], torch.zeros(1), **DELTA)
    with pytest.raises(ValueError, match="a segment is not whole in this call"):
        weights = torch.tensor([[2]])
        infini_attention(*tensors[..., 1:, :], torch.zeros(1), state=state, segment_weights=weights, **DELTA)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_weights_that_are_no_counts_are_refused(dtype: torch.dtype) -> None:
    tensors = torch.randn(3, 1, 1, N, 3)
    with pytest.raises(ValueError, match=f"segment_weights are {dtype}; give how often"):
        infini_attention(*tensors, torch.zeros(1), segment_weights=torch.ones(1, 1, dtype=dtype), **DELTA)
