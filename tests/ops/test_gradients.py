"""Gradients are right: by finite differences, through the read and the write side."""

import pytest
import torch
from torch import Tensor

from .cases import MAPS, STATE_FIELDS, Case, Row, make_case, run, state_fields
from .test_parallel import random_fields, state_of

RULES = ("linear", "delta")
RULES_AND_MAPS = [(rule, name) for rule in RULES for name in MAPS if rule == "linear" or name != "identity"]


@pytest.mark.parametrize(("update_rule", "feature_map"), RULES_AND_MAPS)
def test_gradients_are_those_of_finite_differences(backend: str, update_rule: str, feature_map: str) -> None:
    """Of outputs and new state, by every input, the gate, the weights and every field of the state.

    Two rows of grouped heads with 1 and 0 tokens open, and padding: a head, whole segments and a tail.
    """
    case = make_case(
        [4, 5],
        seed=3,
        kv_heads=1,
        head_dim=2,
        value_dim=2,
        weighted=True,
        segment_length=2,
        update_rule=update_rule,
        feature_map=feature_map,
    )
    # one direction instead of every element where the map alone is new
    _check_gradients(backend, case, [1, 0], layout="holes", fast_mode=feature_map != "elu1")


@pytest.mark.parametrize("normalization", ["root", "none", "unit"])
def test_gradients_of_every_normalization_are_those_of_finite_differences(
    backend: str, normalization: str
) -> None:
    case = make_case(
        [4, 5],
        seed=3,
        kv_heads=1,
        head_dim=2,
        value_dim=2,
        weighted=True,
        segment_length=2,
        normalization=normalization,
        feature_map="elu1",
    )
    _check_gradients(backend, case, [1, 0], layout="holes", fast_mode=True)


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("local_attention", ["sliding", "sink"])
@pytest.mark.parametrize("open_lengths", [[1, 0], None], ids=["from-any-state", "from-nothing"])
def test_gradients_of_what_is_seen_outside_a_segment_are_those_of_finite_differences(
    backend: str, update_rule: str, local_attention: str, open_lengths: list[int] | None
) -> None:
    case = make_case(
        [6, 5],
        seed=3,
        kv_heads=1,
        head_dim=2,
        value_dim=2,
        weighted=True,
        segment_length=2,
        update_rule=update_rule,
        feature_map="elu1",
        local_attention=local_attention,
        sink_tokens=1,
    )
    _check_gradients(backend, case, open_lengths, layout="holes", fast_mode=True)


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("empty_memory", ["local", "gated"])
@pytest.mark.parametrize("layout", ["none", "packed"])
def test_gradients_from_an_empty_memory_are_those_of_finite_differences(
    backend: str, update_rule: str, empty_memory: str, layout: str
) -> None:
    case = make_case(
        [5, 5],
        segment_length=2,
        update_rule=update_rule,
        feature_map="elu1",
        empty_memory=empty_memory,
        softcap=3.0,
    )
    _check_gradients(backend, case, None, layout=layout, fast_mode=True)


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("chunked", [False, True], ids=["at-once", "call-by-call"])
def test_the_loss_of_segment_3_has_a_gradient_in_what_segment_1_wrote(
    backend: str, update_rule: str, chunked: bool
) -> None:
    case = make_case([12], segment_length=4, update_rule=update_rule).leaves()
    (output,), _ = run(case, backend=backend, pieces=[[4], [4], [4]] if chunked else None)
    output[:, 8:].sum().backward()
    (row,) = case.rows
    for name in ("key", "value"):
        first_segment = getattr(row, name).grad[:, :4]
        assert (first_segment.abs().amax(dim=-1) > 1e-6).all(), (
            f"{name}: a token of segment 1 has no gradient"
        )
    assert not row.query.grad[:, :8].any(), "earlier queries write nothing"
    assert not row.local_key.grad[:, :8].any(), "earlier local keys are forgotten"


@pytest.mark.parametrize("update_rule", RULES)
def test_a_detached_state_cuts_the_graph(backend: str, update_rule: str) -> None:
    case = make_case([12], segment_length=4, update_rule=update_rule).leaves()
    (row,) = case.rows
    first, second = (Case([row.cut(*ends)], case.gate, case.settings) for ends in ((0, 4), (4, 12)))
    _, state = run(first, backend=backend)
    (output,), _ = run(second, backend=backend, state=state.detach())
    output.sum().backward()
    assert not row.value.grad[:, :4].any()
    assert row.value.grad[:, 4:].all()


@pytest.mark.parametrize("feature_map", ["relu2", "dpfp"])
@pytest.mark.parametrize(
    ("update_rule", "normalization"),
    [("delta", "sum"), ("linear", "sum"), ("linear", "root"), ("linear", "none"), ("linear", "unit")],
)
def test_where_nothing_is_found_gradients_stay_moderate(
    backend: str, update_rule: str, normalization: str, feature_map: str
) -> None:
    """Features of these maps can be orthogonal to all that memory holds: sigma(q) z is exactly 0."""
    key = torch.tensor([[2.0, 1.0, -1.0, -1.0]])
    query = -key  # no feature in common, with either map
    memory_key = key.expand(2, 4).clone()
    new_key = torch.cat([query, query])
    case = Case(
        [_row(query=new_key, key=new_key, value=torch.ones(2, 3))],
        torch.zeros(1),
        {
            "segment_length": 2,
            "update_rule": update_rule,
            "feature_map": feature_map,
            "normalization": normalization,
        },
    ).leaves()
    past = Case(
        [_row(query=memory_key, key=memory_key, value=torch.ones(2, 3))], torch.zeros(1), case.settings
    )
    _, state = run(past, backend=backend)
    for name in STATE_FIELDS:
        getattr(state, name).requires_grad_()
    (output,), last = run(case, backend=backend, state=state)
    (output.sum() + last.memory.sum()).backward()
    tensors = [*case.tensors(), *(getattr(state, name) for name in STATE_FIELDS)]
    largest = max(
        float(tensor.grad.abs().max()) for tensor in tensors if tensor.grad is not None and tensor.numel()
    )
    assert largest < 100


def _row(*, query: Tensor, key: Tensor, value: Tensor) -> Row:
    return Row(query[None], key[None], value[None], query[None], key[None])


def _check_gradients(
    backend: str, case: Case, open_lengths: list[int] | None, *, layout: str, fast_mode: bool
) -> None:
    case = case.leaves()
    inputs = case.tensors()
    fields = {} if open_lengths is None else random_fields(case, open_lengths, seed=1)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given, state = case.with_tensors(tensors), None
        if open_lengths is not None:
            given_fields = dict(zip(fields, tensors[len(inputs) :], strict=True))
            state = state_of(given_fields, open_lengths, segment_length=case.segment_length)
        outputs, last = run(given, backend=backend, layouts=[layout], state=state)
        return *outputs, *(field for field in state_fields(last).values() if field.numel())

    assert torch.autograd.gradcheck(function, (*inputs, *fields.values()), fast_mode=fast_mode)
