"""Several processes with a run of segments each, against one process with all of them.

Compared are outputs, states and the gradients of everything that goes in. Gradients of a rank's keys and
values come from other ranks' losses too, so they are wrong wherever a backward collective is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_attention.ops import MemoryState, infini_attention
from infini_attention.ops.context_parallel import incoming_state, segment_split, tokens_before

from ..distributed import run_on
from .cases import assert_equal, assert_states_equal, lay_out, make_case

N = 4
RULES = ("linear", "delta")
STATE_TENSORS = ("memory", "normalizer")
RUNS = {
    "two-ranks": [2 * N, 2 * N],
    "uneven-with-a-tail": [3 * N, N, 2 * N, N + 3],
    "a-tail-alone": [N, 2 * N, 2],
}


@dataclass(frozen=True)
class Task:
    """What the processes are to do: `layers` calls in a row on sequences that are divided into `runs`.

    `tensors` are whole and the same on all: those of tokens, the gate, and of the carried state, if any.
    The loss of each rank counts `loss_weights` times; the inputs of the `frozen` rank need no gradient.
    """

    runs: list[int]
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    weights: Tensor | None = None
    carried: list[int] | None = None
    layers: int = 1
    checkpointed: bool = False
    loss_weights: list[float] = field(default_factory=list)
    frozen: int | None = None

    @property
    def parts(self) -> list[slice]:
        return [slice(*ends) for ends in pairwise(accumulate(self.runs, initial=0))]

    def to(self, dtype: torch.dtype) -> "Task":
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})


def make_task(
    runs: list[int],
    *,
    update_rule: str,
    feature_map: str = "elu1",
    normalization: str = "sum",
    carried: bool = True,
    weighted: bool = True,
    value_dim: int = 4,
    **more: Any,
) -> Task:
    """Two rows of grouped heads in fp64; their carried states are of different lengths."""
    settings = {"segment_length": N, "update_rule": update_rule}
    settings |= {"feature_map": feature_map, "normalization": normalization}
    case = make_case([sum(runs)] * 2, value_dim=value_dim, weighted=weighted, **settings)
    tensors, _ = lay_out(case.rows, "none")
    tensors["gate"] = case.gate
    if carried:
        before = make_case([3 * N] * 2, value_dim=value_dim, seed=1, **settings)
        _, state = infini_attention(**lay_out(before.rows, "none")[0], gate=before.gate, **settings)
        tensors |= {name: getattr(state, name) for name in STATE_TENSORS}
    weights = torch.stack([row.weights for row in case.rows]) if weighted else None
    lengths = [3 * N, 5 * N] if carried else None
    return Task(
        runs,
        tensors,
        settings,
        weights,
        lengths,
        **{"loss_weights": [1.0, -2.0, 3.0, 0.5][: len(runs)]} | more,
    )


@dataclass
class Result:
    """Of one rank, or of one process: outputs of its tokens, its last layer's state, gradients by name."""

    output: Tensor
    state: MemoryState
    gradients: dict[str, Tensor]


def on_rank(task: Task) -> Result:
    """One rank's share of the task."""
    rank = dist.get_rank()
    leaves = _leaves(task, frozen=rank == task.frozen)
    output, state = _layers(task, leaves, task.parts[rank], dist.group.WORLD)
    loss = task.loss_weights[rank] * _loss(task, output, task.parts[rank])
    if rank == dist.get_world_size() - 1:
        loss = loss + task.loss_weights[rank] * _state_loss(state)
    loss.backward()
    return _result(output, state, leaves)


def on_one_process(task: Task) -> Result:
    """All of the task, without a process group."""
    leaves = _leaves(task)
    output, state = _layers(task, leaves, slice(0, sum(task.runs)), None)
    losses = [_loss(task, output[:, :, part], part) for part in task.parts]
    losses[-1] = losses[-1] + _state_loss(state)
    torch.stack(losses).mul(torch.tensor(task.loss_weights)).sum().backward()
    return _result(output, state, leaves)


def _leaves(task: Task, *, frozen: bool = False) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_(not frozen) for name, tensor in task.tensors.items()}


def _result(output: Tensor, state: MemoryState, leaves: dict[str, Tensor]) -> Result:
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }
    return Result(output.detach(), state.detach(), gradients)


def _layers(
    task: Task, leaves: dict[str, Tensor], part: slice, group: dist.ProcessGroup | None
) -> tuple[Tensor, MemoryState]:
    """Calls whose queries, keys and values are sums of the inputs and what the call before gave."""
    names = ("query", "key", "value", "local_query", "local_key")
    tokens = {name: leaves[name][:, :, part] for name in names}
    for layer in range(task.layers):
        if layer:
            grouped = output.unflatten(1, (tokens["key"].shape[1], -1)).mean(dim=2)  # noqa: F821
            changes = {"query": output, "key": grouped, "value": grouped}  # noqa: F821
            tokens = tokens | {name: tokens[name] + change for name, change in changes.items()}
        arguments = (task, tokens, leaves, part, group)
        if task.checkpointed:
            output, state = checkpoint(_attend, *arguments, use_reentrant=False)
        else:
            output, state = _attend(*arguments)
    return output, state


def _attend(
    task: Task,
    tokens: dict[str, Tensor],
    leaves: dict[str, Tensor],
    part: slice,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, MemoryState]:
    state = _carried_state(task, leaves) if task.carried and part.start == 0 else None
    columns = slice(part.start // N, -(-part.stop // N))
    weights = None if task.weights is None else task.weights[:, columns]
    if group is not None:
        state = _incoming_of(
            tokens["key"], tokens["value"], **task.settings, segment_weights=weights, state=state, group=group
        )
    return infini_attention(
        **tokens, gate=leaves["gate"], **task.settings, segment_weights=weights, state=state
    )


def _incoming_of(
    key: Tensor, value: Tensor, *, segment_length: int, state: MemoryState | None, group: Any, **settings: Any
) -> MemoryState:
    """As one layer alone would ask for it."""
    before = tokens_before(key.shape[2], len(key), segment_length=segment_length, state=state, group=group)
    given = {"segment_length": segment_length, "state": state, "group": group} | settings
    return incoming_state(key, value, tokens_before=before, **given)


def _carried_state(task: Task, leaves: dict[str, Tensor]) -> MemoryState:
    value = leaves["value"]
    empty = MemoryState.empty(
        value.shape[0],
        value.shape[1],
        leaves["key"].shape[-1],
        value.shape[-1],
        segment_length=N,
        feature_map=task.settings["feature_map"],
        dtype=value.dtype,
    )
    sums = {name: leaves[name] for name in STATE_TENSORS}
    return replace(empty, **sums, length=torch.tensor(task.carried))


def _loss(task: Task, output: Tensor, part: slice) -> Tensor:
    """A number that depends on every output in its own way, by its place in the whole sequences."""
    sizes = (*task.tensors["query"].shape[:3], output.shape[-1])
    directions = torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return (output * directions[:, :, part]).sum()


def _state_loss(state: MemoryState) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sums = (state.memory, state.normalizer, state.pending_memory)
    return sum((x * torch.randn(x.shape, dtype=torch.float64, generator=generator)).sum() for x in sums)


def on_ranks(task: Task, function: Callable[[Task], Result] = on_rank) -> Result:
    """The task on its ranks: outputs side by side, the last rank's state, gradients added up."""
    results = run_on(len(task.runs), function, task)
    output = torch.cat([result.output for result in results], dim=2)
    gradients = {name: sum(result.gradients[name] for result in results) for name in task.tensors}
    return Result(output, results[-1].state, gradients)


def check(task: Task, *, tolerance: float) -> None:
    """The task gives the same on its ranks as on one process."""
    compare(on_ranks(task), on_one_process(task), tolerance=tolerance)


def compare(actual: Result, expected: Result, *, tolerance: float) -> None:
    """Outputs, the last state and all gradients."""
    assert_equal(actual.output, expected.output, tolerance=tolerance)
    assert_states_equal(actual.state, expected.state, tolerance=tolerance)
    _check_gradients(actual, expected, tolerance=tolerance)


def _check_gradients(actual: Result, expected: Result, *, tolerance: float) -> None:
    for name, gradient in expected.gradients.items():
        assert_equal(actual.gradients[name], gradient, tolerance=tolerance, what=f"gradient of {name}")


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("carried", [False, True], ids=["afresh", "from-a-state"])
def test_ranks_with_a_run_each_are_one_process(update_rule: str, runs: list[int], carried: bool) -> None:
    task = make_task(runs, update_rule=update_rule, carried=carried, weighted=carried, value_dim=3)
    check(task, tolerance=1e-10)


@pytest.mark.parametrize("update_rule", RULES)
def test_ranks_are_one_process_in_fp32(update_rule: str) -> None:
    task = make_task(RUNS["uneven-with-a-tail"], update_rule=update_rule).to(torch.float32)
    check(task, tolerance=2e-6)


def test_segments_may_be_copied_under_delta() -> None:
    task = make_task(RUNS["two-ranks"], update_rule="delta", weighted=False)
    check(replace(task, weights=torch.tensor([[1, 3, 2, 1], [2, 1, 1, 5]])), tolerance=1e-10)


@pytest.mark.parametrize("update_rule", RULES)
def test_a_feature_map_may_widen_keys(update_rule: str) -> None:
    task = make_task(RUNS["two-ranks"], update_rule=update_rule, feature_map="dpfp")
    check(task, tolerance=1e-10)


@pytest.mark.parametrize("normalization", ["root", "none", "unit"])
def test_every_normalization_is_that_of_one_process(normalization: str) -> None:
    task = make_task(RUNS["two-ranks"], update_rule="linear", normalization=normalization)
    check(task, tolerance=1e-10)


def test_a_normalization_with_which_delta_diverges_is_refused() -> None:
    tensors = torch.zeros(2, 1, 1, N, 4)
    with pytest.raises(ValueError, match="normalization is 'unit', and the delta rule diverges"):
        incoming_state(
            *tensors,
            segment_length=N,
            update_rule="delta",
            normalization="unit",
            tokens_before=torch.zeros(1, dtype=torch.int64),
            group=dist.group.WORLD,
        )


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_three_layers_in_a_row_are_those_of_one_process(update_rule: str, checkpointed: bool) -> None:
    """Their collectives meet their own in the backward pass, and once more where layers are recomputed."""
    task = make_task(RUNS["a-tail-alone"], update_rule=update_rule, layers=3, checkpointed=checkpointed)
    check(task, tolerance=1e-10)


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("only", [0, 3])
def test_the_loss_of_one_rank_reaches_what_it_depends_on(update_rule: str, only: int) -> None:
    """Of the last rank: all keys before it. Of the first: none, and the others still end their backward."""
    weights = [float(rank == only) for rank in range(4)]
    task = make_task(RUNS["uneven-with-a-tail"], update_rule=update_rule, loss_weights=weights, layers=2)
    expected = on_one_process(task)
    assert expected.gradients["key"][:, :, task.parts[0]].any()
    assert expected.gradients["key"][:, :, task.parts[1]].any() == (only == 3)
    check(task, tolerance=1e-10)


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_rank_whose_inputs_need_no_gradient_hands_on_those_of_others(update_rule: str, frozen: int) -> None:
    task = make_task(RUNS["a-tail-alone"], update_rule=update_rule, layers=2, carried=False)
    expected = on_one_process(task)
    results = run_on(len(task.runs), on_rank, replace(task, frozen=frozen))
    for rank, (result, part) in enumerate(zip(results, task.parts, strict=True)):
        actual, wanted = result.gradients["key"][:, :, part], expected.gradients["key"][:, :, part]
        assert_equal(actual, wanted * (rank != frozen), tolerance=1e-10, what=f"gradient on rank {rank}")


def memory_on_rank(task: Task) -> Tensor:
    """Gradient of the keys by the memory that this rank meets."""
    leaves = _leaves(task)
    _memory_loss(_incoming(task, leaves)).backward()
    return leaves["key"].grad


@pytest.mark.parametrize("update_rule", RULES)
def test_a_loss_of_the_memories_alone_has_the_gradient_of_one_process(update_rule: str) -> None:
    """Also where a run has no whole segment, so that nothing else of it enters the backward pass."""
    task = make_task(RUNS["a-tail-alone"], update_rule=update_rule, weighted=False)
    leaves = _leaves(task)
    for part in task.parts:
        _memory_loss(_layers(task, leaves, slice(0, part.start), None)[1]).backward()
    actual = sum(run_on(len(task.runs), memory_on_rank, task))
    assert_equal(actual, leaves["key"].grad, tolerance=1e-10, what="gradient of key")


def incoming_on_rank(task: Task) -> MemoryState:
    with torch.no_grad():
        return _incoming(task, task.tensors)


def incoming_under_autocast(task: Task) -> MemoryState:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return incoming_on_rank(task)


def _incoming(task: Task, tensors: dict[str, Tensor]) -> MemoryState:
    rank = dist.get_rank()
    return _incoming_of(
        tensors["key"][:, :, task.parts[rank]],
        tensors["value"][:, :, task.parts[rank]],
        **task.settings,
        state=_carried_state(task, tensors) if rank == 0 else None,
        group=dist.group.WORLD,
    )


def _memory_loss(state: MemoryState) -> Tensor:
    return state.memory.square().sum()


@pytest.mark.parametrize("update_rule", RULES)
def test_every_rank_meets_the_state_that_one_process_has_there(update_rule: str) -> None:
    """Lengths included, of rows that had different ones before."""
    task = make_task(RUNS["uneven-with-a-tail"], update_rule=update_rule, weighted=False)
    for part, state in zip(task.parts, run_on(4, incoming_on_rank, task), strict=True):
        _, expected = _layers(task, task.tensors, slice(0, part.start), None)
        assert_states_equal(state, expected, tolerance=1e-10)


@pytest.mark.parametrize("update_rule", RULES)
def test_autocast_lowers_no_precision(update_rule: str) -> None:
    task = make_task(RUNS["two-ranks"], update_rule=update_rule, weighted=False).to(torch.float32)
    plain, cast = (run_on(2, function, task) for function in (incoming_on_rank, incoming_under_autocast))
    for actual, expected in zip(cast, plain, strict=True):
        assert_states_equal(actual, expected, tolerance=0)


def test_delta_stays_exact_in_fp32_over_many_segments() -> None:
    task = make_task([32 * N] * 4, update_rule="delta", weighted=False)
    actual, expected = on_ranks(task.to(torch.float32)), on_one_process(task)
    assert_equal(actual.output, expected.output, tolerance=2e-6)
    for name in STATE_TENSORS:
        assert_equal(getattr(actual.state, name), getattr(expected.state, name), tolerance=2e-6, what=name)
    _check_gradients(actual, expected, tolerance=2e-5)


@pytest.mark.parametrize("update_rule", RULES)
def test_large_keys_of_later_ranks_blur_nothing_before_them(update_rule: str) -> None:
    """As they would if a rank's own sums were taken off again."""
    task = make_task(RUNS["two-ranks"], update_rule=update_rule, weighted=False)
    task.tensors["key"][:, :, task.parts[1]] *= 1e6
    exact, rounded = (run_on(2, incoming_on_rank, one)[1] for one in (task, task.to(torch.float32)))
    for name in STATE_TENSORS:
        assert_equal(getattr(rounded, name), getattr(exact, name), tolerance=1e-6, what=name)


def pairs_on_rank(task: Task) -> Result:
    """Two groups of two ranks each, as with data parallelism beside: the second has twice the values."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, rank = divmod(dist.get_rank(), 2)
    leaves = _leaves(replace(task, tensors=task.tensors | {"value": task.tensors["value"] * (pair + 1)}))
    output, state = _layers(task, leaves, task.parts[rank], groups[pair])
    _loss(task, output, task.parts[rank]).backward()
    return _result(output, state, leaves)


@pytest.mark.parametrize("update_rule", RULES)
def test_groups_beside_each_other_do_not_mix(update_rule: str) -> None:
    task = make_task(RUNS["two-ranks"], update_rule=update_rule, carried=False)
    results = run_on(4, pairs_on_rank, task)
    for one, other in zip(results[:2], results[2:], strict=True):
        assert_equal(other.output, 2 * one.output, tolerance=1e-10)
        assert_equal(other.gradients["value"], one.gradients["value"], tolerance=1e-10)
    assert_equal(
        torch.cat([one.output for one in results[:2]], dim=2), on_one_process(task).output, tolerance=1e-10
    )


def refusal_of_division(held: list[tuple[int, int]]) -> str | None:
    """What `tokens_before` says where each rank has such a length and so many rows."""
    try:
        tokens_before(*held[dist.get_rank()], segment_length=N, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([(4, 2), (6, 2), (4, 2)], "rank 1 of 3 holds 6 tokens, not whole segments of 4"),
        ([(4, 2), (8, 2), (0, 2)], "rank 2 of 3 holds no tokens"),
        ([(4, 2), (0, 2), (4, 2)], "rank 1 of 3 holds no tokens"),
        ([(4, 2), (8, 1), (4, 2)], "rank 1 of 3 holds 1 rows and rank 0 2"),
    ],
)
def test_a_wrong_division_is_refused_alike_on_every_rank(held: list[tuple[int, int]], words: str) -> None:
    refusals = run_on(3, refusal_of_division, held)
    assert len(set(refusals)) == 1
    assert words in str(refusals[0])


def test_a_right_division_is_not_refused() -> None:
    assert run_on(3, refusal_of_division, [(4, 2), (8, 2), (3, 2)]) == [None] * 3


def refusal(lengths: list[int], state: MemoryState) -> str | None:
    """What is said where the ranks have so many tokens, and the first has a state."""
    rank = dist.get_rank()
    tokens = torch.zeros(1, 1, lengths[rank], 2)
    try:
        _incoming_of(tokens, tokens, segment_length=N, state=None if rank else state, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("lengths", "carried", "words"),
    [
        ([6, 4], 0, "rank 0 of 2 holds 6 tokens, not whole segments of 4"),
        ([4, 4], 3, "state has 3 tokens of an open segment"),
        ([5, 4], 3, "rank 0 of 2 holds 5 tokens"),
    ],
)
def test_runs_that_end_inside_a_segment_are_refused_on_every_rank(
    lengths: list[int], carried: int, words: str
) -> None:
    state = replace(MemoryState.empty(1, 1, 2, 2, segment_length=N), length=torch.tensor([carried]))
    for text in run_on(2, refusal, lengths, state):
        assert words in str(text)


def refusal_alone(**settings: Any) -> str:
    """What `incoming_state` says on one rank, before any collective."""
    tokens, before = torch.zeros(1, 1, N, 2), torch.zeros(1, dtype=torch.int64)
    given = {"segment_length": N, "tokens_before": before, "group": dist.group.WORLD} | settings
    with pytest.raises(ValueError) as raised:
        incoming_state(tokens, tokens, **given)
    return str(raised.value)


def refusals_alone() -> list[str]:
    """The second rank is given a state, as no other than the first may."""
    empty = MemoryState.empty(1, 1, 2, 2, segment_length=N)
    if dist.get_rank():
        return [refusal_alone(state=empty)]
    wide = MemoryState.empty(2, 1, 2, 2, segment_length=N)
    other = MemoryState.empty(1, 1, 2, 2, segment_length=2 * N)
    fp64 = MemoryState.empty(1, 1, 2, 2, segment_length=N, dtype=torch.float64)
    sliding = MemoryState.empty(1, 1, 2, 2, segment_length=N, local_attention="sliding")
    states = [{"state": state} for state in (wide, other, fp64, sliding)]
    wrong = [{"update_rule": "detla"}, {"feature_map": "elu"}, *states]
    return [refusal_alone(**settings) for settings in wrong]


def test_what_cannot_be_right_is_refused_with_a_remedy() -> None:
    texts, (elsewhere,) = run_on(2, refusals_alone)
    words = (
        "update_rule is 'detla'; choose one of",
        "feature_map 'elu' is not registered; choose",
        "state.memory is (2, 1, 2, 2) torch.float32; these inputs need (1, 1, 2, 2)",
        "segment_length 8, this call has 4; use the same",
        "state.memory is (1, 1, 2, 2) torch.float64",
        "local_attention 'sliding', whose keys the other ranks would not see; use 'segment'",
    )
    for text, wanted in zip(texts, words, strict=True):
        assert wanted in text
    assert "state is given on rank 1; give it on rank 0" in elsewhere


@pytest.mark.parametrize(
    ("length", "ranks", "ends"),
    [
        (16, 2, [8, 16]),
        (20, 2, [12, 20]),
        (23, 2, [12, 23]),
        (29, 4, [8, 16, 24, 29]),
        (9, 3, [4, 8, 9]),
        (3, 1, [3]),
    ],
)
def test_a_sequence_is_divided_at_segments_and_evenly(length: int, ranks: int, ends: list[int]) -> None:
    parts = segment_split(length, segment_length=N, ranks=ranks)
    assert parts == [slice(*pair) for pair in pairwise([0, *ends])]


@pytest.mark.parametrize(("length", "ranks"), [(8, 3), (0, 1), (5, 4)])
def test_fewer_segments_than_ranks_are_refused(length: int, ranks: int) -> None:
    with pytest.raises(
        ValueError, match=rf"{length} tokens are \d segments of 4, too few for {ranks} ranks; use"
    ):
        segment_split(length, segment_length=N, ranks=ranks)
