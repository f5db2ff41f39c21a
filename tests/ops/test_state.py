"""MemoryState: moved, copied, reordered, joined, read."""

from dataclasses import replace

import pytest
import torch

from infini_attention.ops import MemoryState, infini_attention
from infini_attention.ops.normalization import NORMALIZATIONS
from infini_attention.ops.state import OPEN

from .cases import assert_states_equal, make_case, run, state_fields
from .oracle import retrieve, sigma, unit


def filled(lengths: list[int], *, segment_length: int = 4, **settings: str) -> MemoryState:
    """The state after rows of these lengths, with a graph behind it."""
    case = make_case(lengths, segment_length=segment_length, update_rule="delta", **settings).leaves()
    return run(case, backend="parallel")[1]


@pytest.fixture(params=["segment", "sliding", "sink"])
def local_attention(request: pytest.FixtureRequest) -> str:
    return request.param


def test_detach_cuts_the_graph_and_clone_keeps_it(local_attention: str) -> None:
    state = filled([10, 7], local_attention=local_attention)
    assert all(field.requires_grad for field in state_fields(state).values())
    assert not any(field.requires_grad for field in state_fields(state.detach()).values())
    assert state.clone().memory.requires_grad
    assert_states_equal(state.detach(), state.clone(), tolerance=0)


def test_a_clone_shares_no_memory(local_attention: str) -> None:
    state = filled([10], local_attention=local_attention).detach()
    copy = state.clone()
    for name in state.tensors():
        getattr(copy, name).fill_(7)
        assert not (getattr(state, name) == 7).any()


def test_rows_can_be_dropped_repeated_and_reordered() -> None:
    state = filled([10, 7, 3])
    chosen = state.select(torch.tensor([2, 0, 0]))
    assert chosen.length.tolist() == [3, 10, 10]
    assert torch.equal(chosen.memory, state.memory[[2, 0, 0]])
    assert torch.equal(chosen.local_key, state.local_key[[2, 0, 0]])


def test_dropping_the_longest_open_segment_drops_its_places(local_attention: str) -> None:
    chosen = filled([10, 7, 8], local_attention=local_attention).select(torch.tensor([0, 2]))
    assert chosen.open_length.tolist() == [2, 0]
    assert {chosen.tensors()[name].shape[2] for name in OPEN if name in chosen.tensors()} == {2}
    assert chosen.context_tokens == (0 if local_attention == "segment" else 4)


def test_gradients_flow_to_the_chosen_rows_alone() -> None:
    case = make_case([10, 7], segment_length=4, update_rule="linear").leaves()
    run(case, backend="parallel")[1].select(torch.tensor([1])).memory.sum().backward()
    first, second = (row.value.grad for row in case.rows)
    assert not first.any()
    assert second.any()


def test_forgotten_rows_start_afresh_and_the_others_go_on(local_attention: str) -> None:
    case = make_case([10, 7, 3], segment_length=4, update_rule="delta", local_attention=local_attention)
    state = run(case, backend="parallel")[1]
    forgotten = state.forget(torch.tensor([False, True, True]))
    assert forgotten.length.tolist() == [10, 0, 0]
    assert forgotten.local_key.shape[2] == 2  # no places but the first row's
    after = run(case, backend="parallel", state=forgotten)
    fresh = run(case, backend="parallel")
    onward = run(case, backend="parallel", state=state)
    torch.testing.assert_close(after[0][0], onward[0][0])
    torch.testing.assert_close(after[0][1:], fresh[0][1:])
    assert after[1].length.tolist() == [20, 7, 3]
    assert state.forget(torch.tensor([False] * 3)) is state


@pytest.mark.parametrize("lengths", [[10, 7, 3], [8, 12, 4], [0, 21, 4]])
def test_what_comes_after_fewer_tokens_is_the_same(lengths: list[int], local_attention: str) -> None:
    settings = {"segment_length": 4, "update_rule": "delta", "local_attention": local_attention}
    state = run(make_case(lengths, **settings), backend="parallel")[1]
    recounted = state.recounted()
    whole = 0 if local_attention == "segment" else 4  # else tokens see others before their segment
    assert recounted.length.tolist() == [n % 4 + whole * (n >= 4) for n in lengths]
    case = make_case([10, 10, 9], **settings)
    for backend in ("reference", "parallel"):
        expected, after = run(case, backend=backend, state=state)
        output, again = run(case, backend=backend, state=recounted)
        assert all(ours.equal(theirs) for ours, theirs in zip(output, expected, strict=True))
        assert_states_equal(replace(again, length=after.length), after, tolerance=0.0)


def test_joined_rows_go_on_as_they_would_alone(local_attention: str) -> None:
    """Rows whose open segments differ: 2, 3 and 0 tokens."""
    whole = filled([10, 7, 8], local_attention=local_attention)
    joined = MemoryState.cat(
        [filled([10, 7], local_attention=local_attention), whole.select(torch.tensor([2]))]
    )
    assert joined.open_length.tolist() == [2, 3, 0]
    tensors = torch.randn(3, 3, 2, 5, 4, dtype=torch.float64)
    query = torch.randn(3, 4, 5, 4, dtype=torch.float64)
    gate = torch.zeros(4, dtype=torch.float64)
    settings = {"segment_length": 4, "update_rule": "delta", "local_attention": local_attention}
    value = tensors[1][..., :3]
    output, _ = infini_attention(query, tensors[0], value, gate, state=joined, **settings)
    for row in range(3):
        alone = joined.select(torch.tensor([row]))
        piece = slice(row, row + 1)
        expected, _ = infini_attention(
            query[piece], tensors[0][piece], value[piece], gate, state=alone, **settings
        )
        torch.testing.assert_close(output[piece], expected)


def test_states_of_other_segment_lengths_do_not_join() -> None:
    with pytest.raises(ValueError, match=r"cannot join states with segment_length \[4, 8\]"):
        MemoryState.cat([filled([10]), filled([10], segment_length=8)])


def test_states_with_and_without_a_short_convolution_are_not_joined() -> None:
    state = filled([10]).detach()
    convolved = replace(state, recent=torch.ones(1, 2, 3), open_recent=torch.ones(1, 2, 3))
    assert torch.equal(MemoryState.cat([convolved, convolved]).recent, torch.ones(2, 2, 3))
    for states in ([state, convolved], [convolved, state]):
        with pytest.raises(ValueError, match="some are of a short convolution"):
            MemoryState.cat(states)


def test_states_of_another_local_attention_do_not_join() -> None:
    states = [filled([10]), filled([10], local_attention="sink")]
    with pytest.raises(ValueError, match="another local attention; use states of one model"):
        MemoryState.cat(states)


def test_places_without_a_token_are_zero(local_attention: str) -> None:
    state = filled([10, 7, 8, 2], local_attention=local_attention)
    for row, used in enumerate(state.open_length.tolist()):
        for name in OPEN:
            assert name not in state.tensors() or not state.tensors()[name][row, :, used:].any()
    if state.context_key is not None and state.context_value is not None:
        assert state.context_key[:3].any() and not state.context_key[3].any()
        assert state.context_value[:3].any() and not state.context_value[3].any()


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_the_size_does_not_depend_on_the_length(update_rule: str, local_attention: str) -> None:
    sizes = set()
    for length in (8, 80, 800):
        settings = {"update_rule": update_rule, "local_attention": local_attention}
        case = make_case([length], segment_length=4, **settings)
        sizes.add(run(case, backend="parallel")[1].nbytes)
    assert len(sizes) == 1


def test_bytes_are_those_of_all_tensors() -> None:
    state = MemoryState.empty(2, 3, 8, 6, segment_length=4)
    assert state.nbytes == 4 * 2 * 2 * 3 * (8 * 6 + 8) + 2 * 8
    assert state.batch_size == 2
    sizes = {"segment_length": 10, "sink_tokens": 5}
    sink, sliding = (
        MemoryState.empty(2, 3, 8, 6, local_attention=name, **sizes) for name in ("sink", "sliding")
    )
    assert sink.nbytes == state.nbytes + 4 * 2 * 3 * 5 * (8 + 6)
    assert sliding.nbytes == state.nbytes + 4 * 2 * 3 * (10 * (8 + 6) + 8 * 6 + 8)


def test_to_moves_everything_but_the_lengths(local_attention: str) -> None:
    moved = filled([10], local_attention=local_attention).to("meta")
    assert all(field.device.type == "meta" for field in state_fields(moved).values())
    assert moved.length.tolist() == [10]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_read_is_equation_7_as_it_is_normalized(normalization: str) -> None:
    state = filled([10])
    query = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    answers = state.read(query, feature_map="elu1", normalization=normalization)
    for head in range(4):
        memory, normalizer = (x[0, head // 2].detach().numpy() for x in (state.memory, state.normalizer))
        for token in range(3):
            features = sigma("elu1", query[0, head, token].numpy())
            features = unit(features) if normalization == "unit" else features
            expected = torch.from_numpy(retrieve(features, memory, normalizer, normalization))
            torch.testing.assert_close(answers[0, head, token].detach(), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_an_empty_memory_answers_zero(normalization: str) -> None:
    state = MemoryState.empty(1, 2, 8, 6, segment_length=4)
    assert not state.read(torch.randn(1, 4, 5, 8), normalization=normalization).any()
