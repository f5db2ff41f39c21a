"""Context parallelism: each rank of a process group holds a run of whole segments of the same sequences.

All that a rank lacks is the memory that its first token meets, and the few tokens that a short convolution
looks back at, which `incoming_recent` gets by one more all-gather. What a run of segments does to a memory is
of fixed size:

    linear   M <- M + U      U is what the run makes of an empty memory
    delta    M <- T M + U    [U | T] is what it makes of the memory [0 | I], with values [V | 0]
    both     z <- z + sum of the run's features

So the same write side that makes a memory, in fused kernels where these can run, also tells what a run does.
Each rank sends this of its run, and folds what the ranks before it sent. That is one all-gather for the
linear rule, and two for delta, whose A_s needs the z before it. Backward mirrors each with a reduce-scatter.
Any rank may ask for gradients of an earlier one's keys and values, so every rank takes part in these too:
graphs have the same shape on all of them, the first included, which needs nothing of the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from infini_attention.ops.infini import checked_weights, memory_map
from infini_attention.ops.layout import plan
from infini_attention.ops.options import Options, autocast_type
from infini_attention.ops.state import MemoryState, state_dtype
from infini_attention.ops.write import writer


def incoming_state(
    key: Tensor,
    value: Tensor,
    *,
    segment_length: int,
    update_rule: str = "linear",
    feature_map: str = "elu1",
    normalization: str = "sum",
    segment_weights: Tensor | None = None,
    state: MemoryState | None = None,
    tokens_before: Tensor,
    group: "dist.ProcessGroup",
) -> MemoryState:
    """The state that this rank's first token meets: what `infini_attention` takes as `state` for its run.

    For local attention of segments alone: with another, tokens would see keys that the rank before holds.
    Collective: every rank of `group` calls it with the next run of the same sequences, without padding or
    packing. The outputs of `infini_attention` are then those of one process; the last rank's state is that
    of the whole sequences. Gradients cross ranks: each calls backward on a loss that its output enters, if
    only with weight 0, and with gradients switched on or off on all alike.

    Args:
        key: (batch, kv_heads, length, head_dim), without position embedding; length is a multiple of
            `segment_length` on every rank but the last.
        value: (batch, kv_heads, length, value_dim).
        segment_length: N, tokens a segment.
        update_rule: "linear" or "delta".
        feature_map: sigma, a name of `ops.feature_maps`.
        normalization: as in `infini_attention`.
        segment_weights: (batch, segments of this run): how often each counts in memory. Each rank checks its
            own before it meets the others.
        state: the tokens before the whole sequences, on the first rank only, with no segment open.
        tokens_before: what the function of that name says; once for all layers that share out the same runs.
        group: the ranks, in the order of their runs.

    Returns:
        MemoryState with no segment open, in fp32 (fp64 where the inputs are).

    Raises:
        ValueError: an update rule, feature map, normalization or segment weights that `infini_attention`
            refuses; a state on another rank than the first, or of another kind than the inputs need.
    """
    sigma, rank = memory_map(update_rule, feature_map, normalization), dist.get_rank(group)
    start = MemoryState.before(key, value, segment_length=segment_length, feature_map=feature_map)
    if state is not None:
        _check_state(state, start, rank)
        start = state

    options = Options.of_writing(segment_length, update_rule, sigma, normalization)
    run = _Run(key, value, segment_weights, options)
    with torch.autocast(autocast_type(key.device), enabled=False):
        memory, normalizer = (_delta if update_rule == "delta" else _linear)(run, start, group)
    return replace(start, memory=memory, normalizer=normalizer, length=tokens_before)


def incoming_recent(x: Tensor, recent: Tensor | None, before: int, group: "dist.ProcessGroup") -> Tensor:
    """The `before` tokens just before this rank's first, for its short convolution; collective.

    Args:
        x: (batch, length, channels) of this rank's run, at least `before` long on every rank but the last.
        recent: what comes before the whole sequences, (batch, before, channels), on the first rank only.
        before: how many tokens a convolution looks back.
        group: the ranks, in the order of their runs.
    """
    rank = dist.get_rank(group)
    carried = x.new_zeros(x.shape[0], before, x.shape[2]) if recent is None else recent
    last = F.pad(x, (0, 0, before, 0))[:, -before:].to(state_dtype(x.dtype))
    # The first rank takes none of these, which keeps it in the graph.
    return carried + _gather(last, group)[max(rank - 1, 0) : rank].sum(dim=0)


def tokens_before(
    length: int,
    rows: int,
    *,
    segment_length: int,
    state: MemoryState | None = None,
    group: "dist.ProcessGroup",
) -> Tensor:
    """Each row's tokens before this rank's run, (rows,) int64 on the CPU.

    Collective, once before a forward pass: it has the host wait for the device. `length` and `rows` are this
    rank's tokens and sequences, `state` is that of the tokens before the whole sequences, on the first rank.
    Raises the same ValueError on every rank where `incoming_state` cannot join the runs: one holds no tokens
    or other rows than the first, one before the last ends inside a segment, or `state` has one open.
    """
    held: list[Any] = [None] * dist.get_world_size(group)
    carried = [0] * rows if state is None else state.length.tolist()
    dist.all_gather_object(held, (length, rows, carried), group=group)
    lengths = [tokens for tokens, _, _ in held]
    _check_whole(lengths, segment_length)
    for rank, (tokens, batch, _) in enumerate(held):
        if tokens == 0:
            raise ValueError(f"rank {rank} of {len(held)} holds no tokens; divide by segment_split")
        if batch != held[0][1]:
            raise ValueError(
                f"rank {rank} of {len(held)} holds {batch} rows and rank 0 {held[0][1]}; "
                "give every rank a run of the same sequences"
            )
    before_all = torch.tensor(held[0][2])
    if open_length := int((before_all % segment_length).max()):
        raise ValueError(
            f"state has {open_length} tokens of an open segment; runs begin with a segment: finish it first"
        )
    return before_all.add(sum(lengths[: dist.get_rank(group)]))


def segment_split(length: int, *, segment_length: int, ranks: int) -> list[slice]:
    """Where each rank's tokens lie in a sequence of `length`: whole segments, shared out evenly.

    Earlier ranks have one more where they do not divide, the last has the unfinished segment. Raises
    ValueError when there are fewer segments than ranks.
    """
    whole = length // segment_length
    if -(-length // segment_length) < ranks:
        raise ValueError(
            f"{length} tokens are {-(-length // segment_length)} segments of {segment_length}, too few for "
            f"{ranks} ranks; use fewer ranks, shorter segments or longer sequences"
        )
    counts = [whole // ranks + (rank < whole % ranks) for rank in range(ranks)]
    ends = [end * segment_length for end in accumulate(counts, initial=0)]
    ends[-1] = length
    return [slice(first, last) for first, last in pairwise(ends)]


def _check_state(state: MemoryState, empty: MemoryState, rank: int) -> None:
    if rank:
        raise ValueError(f"state is given on rank {rank}; give it on rank 0, the others meet it through that")
    if state.segment_length != empty.segment_length:
        raise ValueError(
            f"state was made with segment_length {state.segment_length}, this call has "
            f"{empty.segment_length}; use the same"
        )
    if state.local_attention != "segment":
        raise ValueError(
            f"state was made with local_attention {state.local_attention!r}, whose keys the other ranks "
            "would not see; use 'segment'"
        )
    given, needed = (f"{tuple(one.memory.shape)} {one.memory.dtype}" for one in (state, empty))
    if given != needed:
        raise ValueError(
            f"state.memory is {given}; these inputs need {needed}: use a state of the same model, batch and "
            "feature map"
        )


def _check_whole(lengths: Sequence[int], segment_length: int) -> None:
    for rank, length in enumerate(lengths[:-1]):
        if length % segment_length:
            raise ValueError(
                f"rank {rank} of {len(lengths)} holds {length} tokens, not whole segments of "
                f"{segment_length}; only the last may end inside one: divide by segment_split"
            )


@dataclass(frozen=True)
class _Run:
    """This rank's tokens, (batch, kv_heads, length, dim), and how often each of their segments counts."""

    key: Tensor
    value: Tensor
    weights: Tensor | None
    options: Options

    def written(self, memory: Tensor, normalizer: Tensor) -> tuple[Tensor, Tensor]:
        """M and z after the whole segments of the run, which begins with those given."""
        segment_length = self.options.segment_length
        whole = self.key.shape[2] // segment_length * segment_length
        if not whole:
            none = self.key[:, :, :0].sum() + self.value[:, :, :0].sum()  # keeps them in the graph
            return memory + none, normalizer + none
        batch, device = self.key.shape[0], self.key.device
        layout = plan(batch, whole, segment_length=segment_length, lengths=[0] * batch, device=device)
        (block,) = layout.whole()
        key, value = (layout.take(x[:, :, :whole], block) for x in (self.key, self.value))
        weights = self.weights
        if weights is not None:
            weights = checked_weights(weights[:, : layout.columns], layout, memory, self.options.update_rule)
            weights = layout.take_weights(weights, block)
        write = writer(self.key, memory, weights, self.options.normalization)
        _, _, memory, normalizer = write(key, value, weights, memory, normalizer, block, self.options)
        return memory, normalizer


def _linear(run: _Run, start: MemoryState, group: "dist.ProcessGroup") -> tuple[Tensor, Tensor]:
    """M and z before this rank's run, by one all-gather of both."""
    own = run.written(torch.zeros_like(start.memory), torch.zeros_like(start.normalizer))
    before = _sum_before(_side_by_side(start.memory, start.normalizer), _side_by_side(*own), group)
    return before[..., :-1].contiguous(), before[..., -1].contiguous()


def _side_by_side(memory: Tensor, normalizer: Tensor) -> Tensor:
    return torch.cat([memory, normalizer[..., None]], dim=-1)


def _delta(run: _Run, start: MemoryState, group: "dist.ProcessGroup") -> tuple[Tensor, Tensor]:
    """M and z before this rank's run."""
    normalizer = _sum_before(start.normalizer, _features_of(run, start.normalizer), group)
    feature_dim, value_dim = start.memory.shape[-2:]
    one = torch.eye(feature_dim, device=normalizer.device, dtype=normalizer.dtype)
    through = F.pad(one, (value_dim, 0)).expand(*normalizer.shape[:2], -1, -1)  # [0 | I]
    padded = replace(run, value=F.pad(run.value, (0, feature_dim)))  # [V | 0]
    U, T = padded.written(through, normalizer)[0].tensor_split([value_dim], dim=-1)
    D = T - one
    # The last part has no columns. It ties the two gathers together where a run has no whole segment, so that
    # both are in every rank's backward.
    X = torch.cat([D, start.memory + D @ start.memory + U, normalizer[..., None][..., :0]], dim=-1)

    gathered = _gather(X, group)
    memory = start.memory + gathered[:0, ..., feature_dim:].sum(dim=0)  # the first rank's part in the graph
    for D, U in (pair.tensor_split([feature_dim], dim=-1) for pair in gathered[: dist.get_rank(group)]):
        memory = memory + D @ memory + U
    return memory, normalizer


def _features_of(run: _Run, normalizer: Tensor) -> Tensor:
    """What a run adds to z, (batch, kv_heads, feature_dim); the memory beside it is of one column."""
    column = replace(run, value=run.value[..., :1], options=replace(run.options, update_rule="linear"))
    return column.written(torch.zeros_like(normalizer)[..., None], torch.zeros_like(normalizer))[1]


def _sum_before(carried: Tensor, own: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sum of what the first rank has `carried` and the `own` of the ranks before this one.

    Nothing is subtracted from a prefix. The first rank sums over none, which keeps it in the graph.
    """
    return carried + _gather(carried + own, group)[: dist.get_rank(group)].sum(dim=0)


def _gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Every rank's `x`, (ranks, ...); `x` is changed in place to require gradients where they are on."""
    if torch.is_grad_enabled():
        x.requires_grad_()  # its backward is collective: every rank takes part, whatever its inputs need
    gathered: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather; backward gives each rank the sum of what all ranks ask of its tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(gradient.shape[1:])
        dist.reduce_scatter(own, list(gradient.contiguous()), group=ctx.group)
        return own, None


def _all_gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    gathered = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group=group)
    return gathered
