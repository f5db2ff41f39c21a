"""The fused kernels in Triton's interpreter, on the CPU: the same code that runs on a GPU, at tiny sizes.

Triton decides when it is imported whether it interprets, so these run in a process of their own:
`make test` starts one with TRITON_INTERPRET=1.
"""

import math
import os
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_attention.ops import MemoryState, infini_attention
from infini_attention.ops.cross_entropy import IGNORED, cross_entropy
from infini_attention.ops.write import write_whole

from .cases import (
    LAYOUTS,
    TOKEN_FIELDS,
    assert_equal,
    assert_states_equal,
    make_case,
    run,
    scalar,
    state_fields,
)
from .test_context_parallel import RUNS, Result, Task, compare, make_task, on_one_process, on_rank, on_ranks
from .test_parallel import random_fields, state_of

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1 to run the fused kernels on the CPU", allow_module_level=True)

from infini_attention.ops.triton import cross_entropy as cross_entropy_kernels  # needs triton

TOLERANCE = 2e-5  # of fp32 arithmetic against fp64, over some dozens of tokens
MAPS = ("elu1", "exp", "relu2", "softplus", "dpfp")


def check(
    lengths: list[int], *, layout: str = "right", open_lengths: list[int] | None = None, **settings: Any
) -> None:
    """Outputs, states and all gradients of the kernels in fp32 equal the reference's in fp64."""
    case = make_case(lengths, **settings)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = case.to(dtype).leaves()
        leaves = replace(leaves, rows=[replace(row, weights=_detached(row.weights)) for row in leaves.rows])
        tensors = [
            tensor for row in leaves.rows for tensor in row.tokens().values()
        ]  # not the segments' weights: the kernels give them no gradient
        tensors.append(leaves.gate)
        state = None
        if open_lengths is not None:
            fields = random_fields(case, open_lengths, seed=1)
            fields = {name: field.detach().to(dtype).requires_grad_() for name, field in fields.items()}
            tensors += fields.values()
            state = state_of(fields, open_lengths, segment_length=case.segment_length)
        outputs, last = run(leaves, backend=backend, layouts=[layout], state=state)
        loss = scalar(outputs, last) + sum(0.0 * tensor.sum() for tensor in tensors)
        results.append((outputs, last, torch.autograd.grad(loss, tensors)))
    (outputs, state, gradients), (expected, expected_state, expected_gradients) = results
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_equal(actual, wanted, tolerance=TOLERANCE)
    for name, wanted in state_fields(expected_state).items():
        assert_equal(getattr(state, name), wanted, tolerance=TOLERANCE, what=name)
    assert state.length.tolist() == expected_state.length.tolist()
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_equal(actual, wanted, tolerance=10 * TOLERANCE, what="gradient")


def _detached(weights: torch.Tensor | None) -> torch.Tensor | None:
    return None if weights is None else weights.detach()


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_kernels_equal_the_reference(update_rule: str, feature_map: str) -> None:
    check(
        [50, 33],
        kv_heads=1,
        head_dim=20,
        value_dim=24,
        segment_length=16,
        update_rule=update_rule,
        feature_map=feature_map,
    )


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_equal_the_reference_from_any_state(update_rule: str, layout: str) -> None:
    """Weighted segments, rows of several lengths, packed and padded, some with an open segment."""
    check(
        [40, 0, 21],
        layout=layout,
        open_lengths=[3, 0, 5],
        head_dim=16,
        value_dim=16,
        weighted=True,
        segment_length=8,
        update_rule=update_rule,
        feature_map="exp",
    )


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("local_attention", ["sliding", "sink"])
def test_what_is_seen_outside_a_segment_equals_the_reference(update_rule: str, local_attention: str) -> None:
    """Rows that begin here beside one that has a whole segment already."""
    settings = {"head_dim": 16, "value_dim": 16, "segment_length": 8, "feature_map": "exp"}
    settings |= {"update_rule": update_rule, "local_attention": local_attention, "sink_tokens": 2}
    check([40, 8, 21], **settings)
    check([40, 0, 21], open_lengths=[3, 0, 5], **settings)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_local_values_of_their_own_equal_the_reference(update_rule: str) -> None:
    settings = {"head_dim": 16, "value_dim": 16, "segment_length": 8, "own_values": True}
    check([40, 8, 21], update_rule=update_rule, feature_map="exp", **settings)
    settings |= {"local_attention": "sliding", "own_contexts": True}
    check([24, 21], update_rule=update_rule, feature_map="exp", **settings)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_heads_wider_than_a_block_equal_the_reference(update_rule: str) -> None:
    check(
        [40],
        kv_heads=1,
        head_dim=160,
        value_dim=144,
        segment_length=16,
        update_rule=update_rule,
        feature_map="elu1",
    )


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_the_literal_equation_10_equals_the_reference(update_rule: str) -> None:
    check(
        [40],
        head_dim=16,
        value_dim=16,
        segment_length=16,
        update_rule=update_rule,
        feature_map="elu1",
        empty_memory="gated",
        softcap=5.0,
    )


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_inference_equals_training(update_rule: str) -> None:
    """Without gradients the mixture is written over local attention's output."""
    case = make_case([70], head_dim=16, value_dim=16, segment_length=16, update_rule=update_rule).to(
        torch.float32
    )
    with torch.no_grad():
        (output,), state = run(case, backend="triton")
    (trained,), trained_state = run(case.leaves(), backend="triton")
    assert torch.equal(output, trained)
    assert_states_equal(state, trained_state, tolerance=0)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_many_short_runs_fill_programs_by_splitting_none_away(update_rule: str) -> None:
    """A segment longer than a tile is split over programs; every part of it counts once."""
    check(
        [300],
        kv_heads=1,
        group=1,
        head_dim=16,
        value_dim=16,
        segment_length=150,
        update_rule=update_rule,
        feature_map="elu1",
    )


def test_weights_that_ask_for_a_gradient_get_it_without_the_kernels() -> None:
    case = make_case([32], head_dim=16, value_dim=16, segment_length=16, update_rule="linear", weighted=True)
    case = case.to(torch.float32).leaves()
    with pytest.raises(ValueError, match=r"segment_weights ask for a gradient.*backend=.auto."):
        run(case, backend="triton")
    (row,) = case.rows
    outputs, _ = run(case, backend="auto")
    assert torch.autograd.grad(outputs[0].sum(), row.weights)[0].any()


def test_maps_that_widen_heads_too_far_are_refused_and_auto_goes_without_the_kernels() -> None:
    case = make_case([64], segment_length=16, head_dim=144, update_rule="delta", feature_map="dpfp")
    case = case.to(torch.float32)
    with pytest.raises(ValueError, match="at most 256 features and values, not 288"):
        run(case, backend="triton")
    outputs, _ = run(case, backend="auto")
    expected, _ = run(case, backend="reference")
    assert_equal(outputs[0], expected[0], tolerance=TOLERANCE)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_features_beyond_fp16_stay_finite(update_rule: str) -> None:
    tensors = torch.randn(3, 1, 1, 32, 16).mul(200).half()
    settings = {"segment_length": 16, "update_rule": update_rule, "feature_map": "dpfp", "backend": "triton"}
    output, state = infini_attention(*tensors, torch.zeros(1), **settings)
    assert torch.isfinite(output).all()
    assert torch.isfinite(state.memory).all()


@pytest.mark.parametrize("feature_map", MAPS)
def test_what_is_no_number_is_none_in_memory_either(feature_map: str) -> None:
    tensors = torch.randn(3, 1, 1, 16, 16)
    tensors[1, ..., 3, 5] = float("nan")
    settings = {"segment_length": 16, "feature_map": feature_map, "backend": "triton"}
    _, state = infini_attention(*tensors, torch.zeros(1), **settings)
    assert state.memory.isnan().any()
    assert state.normalizer.isnan().any()


@pytest.mark.parametrize("delta", [False, True])
def test_operators_are_what_their_fakes_say(delta: bool) -> None:
    """Shapes, dtypes and strides under fake tensors, of inputs as projections make them."""
    from infini_attention.ops.triton import memory

    def tokens(heads: int, width: int) -> Tensor:
        return torch.randn(3, 16, heads, width).transpose(1, 2)

    key, value, weights = tokens(2, 24), tokens(2, 20), torch.rand(3)
    start = torch.randn(2, 2, 24, 20), torch.rand(2, 2, 24)
    settings = [2, 1], "elu1", delta
    written = key, value, weights, *start, *settings
    torch.library.opcheck(memory.segment_states.op, written)
    *states, removal, reciprocal = memory.segment_states(*written)
    gradients = [torch.randn_like(tensor) for tensor in (value, *states)]
    kept = key, value, weights, *states[:2], removal, reciprocal, *settings
    torch.library.opcheck(memory.segment_states_backward.op, (*gradients, *kept))
    if not delta:  # reading knows no rule
        read = tokens(4, 24), tokens(4, 20), torch.randn(4), *states[:2], "elu1", False
        torch.library.opcheck(memory.mix.op, read)
        torch.library.opcheck(memory.mix_backward.op, (tokens(4, 20), *read))


@pytest.mark.parametrize(("update_rule", "head_dim"), [("linear", 16), ("delta", 16), ("delta", 160)])
def test_what_the_memory_has_nothing_for_reads_as_nothing(update_rule: str, head_dim: int) -> None:
    """Queries on features that no key ever had, over a memory that is not empty: finite, gradients too."""
    case = make_case(
        [32],
        kv_heads=1,
        head_dim=head_dim,
        value_dim=16,
        segment_length=16,
        update_rule=update_rule,
        feature_map="relu2",
    )
    (row,), half = case.rows, head_dim // 2
    row.query[..., :half].abs_().neg_()
    row.key[..., half:].abs_().neg_()
    fields = random_fields(case, [0], seed=1)
    fields["normalizer"].data[..., half:] = 0
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = case.to(dtype).leaves()
        started = {name: field.detach().to(dtype).requires_grad_() for name, field in fields.items()}
        state = state_of(started, [0], segment_length=16)
        (output,), last = run(leaves, backend=backend, state=state)
        tensors = [getattr(leaves.rows[0], name) for name in TOKEN_FIELDS]
        tensors += [leaves.gate, started["memory"], started["normalizer"]]
        results.append([output, last.memory, *torch.autograd.grad(scalar([output], last), tensors)])
    for actual, wanted in zip(*results, strict=True):
        assert_equal(actual, wanted, tolerance=10 * TOLERANCE)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("local_attention", ["segment", "sliding"])
def test_what_is_written_alone_is_written_by_the_kernels(update_rule: str, local_attention: str) -> None:
    generator = torch.Generator().manual_seed(0)
    key, value, context_key = torch.randn(3, 2, 2, 24, 16, dtype=torch.float64, generator=generator)
    settings = {"segment_length": 8, "update_rule": update_rule, "feature_map": "exp"}
    settings |= {"local_attention": local_attention}

    def written(dtype: torch.dtype) -> MemoryState:
        tokens = key.to(dtype), value.to(dtype)
        outside = None if local_attention == "segment" else context_key.to(dtype)
        return write_whole(*tokens, context_key=outside, **settings)

    wanted = written(torch.float64)  # which the kernels do not take
    with mock.patch("infini_attention.ops.write.write_segments", None):
        found = written(torch.float32)
    for name, x in found.tensors().items():
        assert_equal(x, wanted.tensors()[name], tolerance=TOLERANCE, what=name)


def in_kernels_on_rank(task: Task) -> Result:
    """A rank's share, where the memories before runs are made by the kernels or not at all."""
    with mock.patch("infini_attention.ops.write.write_segments", None):
        return on_rank(task)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("feature_map", ["exp", "dpfp"])
def test_processes_share_a_sequence_in_the_kernels(update_rule: str, feature_map: str) -> None:
    task = make_task(RUNS["a-tail-alone"], update_rule=update_rule, feature_map=feature_map)
    task = task.to(torch.float32)
    compare(on_ranks(task, in_kernels_on_rank), on_one_process(task), tolerance=TOLERANCE)


def test_processes_copy_segments_without_the_kernels() -> None:
    task = make_task(RUNS["two-ranks"], update_rule="delta", weighted=False).to(torch.float32)
    task = replace(task, weights=torch.tensor([[1, 3, 2, 1], [2, 1, 1, 5]]))
    compare(on_ranks(task), on_one_process(task), tolerance=TOLERANCE)


def test_torch_compile_sees_one_graph() -> None:
    case = make_case([64], head_dim=16, value_dim=16, segment_length=16, update_rule="delta").to(
        torch.float32
    )
    eager = case.leaves()
    (row,) = eager.rows

    def function(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        settings = {"segment_length": 16, "update_rule": "delta", "backend": "triton"}
        return infini_attention(query[None], key[None], value[None], gate, **settings)[0]

    tensors = row.query, row.key, row.value, eager.gate
    expected = function(*tensors)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    assert_equal(actual, expected, tolerance=1e-6)
    for compiled, wanted in zip(
        torch.autograd.grad(actual.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        assert_equal(compiled, wanted, tolerance=1e-6, what="gradient")
    with torch.no_grad():  # compiled, the mixture does not take the place of local attention's output
        inferred = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    assert_equal(inferred, expected, tolerance=1e-6)


@pytest.mark.parametrize("vocabulary", [10, 64, 100])
def test_cross_entropy_equals_torchs(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, some of them masked whole, targets that are ignored, rows that are not dense."""
    monkeypatch.setattr(cross_entropy_kernels, "MAX_BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    wide = 10 * torch.randn(7, vocabulary + 3, generator=generator)
    wide[0, : vocabulary - 1] = float("-inf")
    targets = torch.randint(vocabulary, (7,), generator=generator)
    targets[0], targets[3] = vocabulary - 1, IGNORED
    found = []
    for loss_of, dtype in ((cross_entropy, torch.float32), (_plain_cross_entropy, torch.float64)):
        leaf = wide.to(dtype).requires_grad_()
        loss = loss_of(leaf[:, :vocabulary], targets)
        found.append((loss.detach(), *torch.autograd.grad(3 * loss, leaf)))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)


def _plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def test_cross_entropy_of_nothing_and_of_what_is_no_number() -> None:
    logits = torch.randn(2, 8)
    assert cross_entropy(logits[:0], torch.tensor([], dtype=torch.long)) == 0
    assert cross_entropy(logits * float("nan"), torch.full((2,), IGNORED)) == 0
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, torch.tensor([1, 8]))  # no such token
    assert loss.isnan() and torch.autograd.grad(loss, leaf)[0][1].isnan().all()
    assert cross_entropy(torch.full((1, 8), -2e38), torch.tensor([1])).item() == pytest.approx(math.log(8))
    with pytest.raises(ValueError, match=r"targets are \(3,\) and logits \(2, 8\); give one target a token"):
        cross_entropy(logits, torch.tensor([1, 2, 3]))
    assert cross_entropy(logits.index_fill(1, torch.tensor([3]), float("nan")), torch.tensor([1, 2])).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_cross_entropy_come_in_the_logits_dtype(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    loss = cross_entropy(logits, torch.arange(5))
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(_plain_cross_entropy(exact, torch.arange(5)), exact)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, wanted.to(dtype), rtol=0, atol=torch.finfo(dtype).eps)
