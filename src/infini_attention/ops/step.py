"""One token a row, in place: the step of decoding, over buffers whose shapes never change.

`infini_attention` plans every call on the host, from lengths. Here all that differs from row to row is a
number on the device, so that a step can be captured as a CUDA graph or compiled once, and takes the same time
at any length of context. What it computes is what `infini_attention` computes for one more token.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from infini_attention.ops import feature_maps
from infini_attention.ops.local import local_attention
from infini_attention.ops.normalization import normalized, read
from infini_attention.ops.state import MemoryState, is_empty, state_dtype


@dataclass
class StepBuffers:
    """The states of all layers for a fixed number of rows, at their largest size.

    Attributes:
        memory, pending_memory: (layers, rows, kv_heads, feature_dim, value_dim) fp32 (fp64 for fp64 models).
        normalizer, pending_normalizer: (layers, rows, kv_heads, feature_dim), same dtype.
        local_key: (layers, rows, kv_heads, segment_length, head_dim), in the inputs' dtype.
        local_value: (layers, rows, kv_heads, segment_length, value_dim), same dtype.
        used: (rows,) int64 on the same device: tokens of each row's open segment.
        active: (rows,) bool on the same device: which rows the next step is meant for.
        recent, open_recent: what short convolutions look back at from the open segment's first token and
            from the next one, (layers, rows, width - 1, channels) in the inputs' dtype; of no size without
            one.
    """

    memory: Tensor
    normalizer: Tensor
    pending_memory: Tensor
    pending_normalizer: Tensor
    local_key: Tensor
    local_value: Tensor
    used: Tensor
    active: Tensor
    recent: Tensor
    open_recent: Tensor

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        segment_length: int,
        feature_map: str = "elu1",
        recent: tuple[int, int] = (0, 0),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "StepBuffers":
        """Buffers of rows that have seen nothing; `dtype` is that of the inputs to come.

        `recent` are the sizes (width - 1, channels) of what a short convolution looks back at.
        """
        feature_dim = feature_maps.get(feature_map).feature_dim(head_dim)

        def zeros(*sizes: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(layers, rows, kv_heads, *sizes, dtype=dtype, device=device)

        return cls(
            memory=zeros(feature_dim, value_dim, dtype=state_dtype(dtype)),
            normalizer=zeros(feature_dim, dtype=state_dtype(dtype)),
            pending_memory=zeros(feature_dim, value_dim, dtype=state_dtype(dtype)),
            pending_normalizer=zeros(feature_dim, dtype=state_dtype(dtype)),
            local_key=zeros(segment_length, head_dim, dtype=dtype),
            local_value=zeros(segment_length, value_dim, dtype=dtype),
            used=torch.zeros(rows, dtype=torch.int64, device=device),
            active=torch.zeros(rows, dtype=torch.bool, device=device),
            recent=torch.zeros(layers, rows, *recent, dtype=dtype, device=device),
            open_recent=torch.zeros(layers, rows, *recent, dtype=dtype, device=device),
        )

    @property
    def segment_length(self) -> int:
        """N, the places of an open segment."""
        return self.local_key.shape[3]

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def load(self, row: int, states: list[MemoryState]) -> None:
        """Put a sequence into `row`: the state of each layer, of batch size 1."""
        for name in _SUMS:
            getattr(self, name)[:, row].copy_(torch.stack([getattr(state, name)[0] for state in states]))
        for name in _LOCAL:
            places = getattr(self, name)[:, row]
            new = torch.stack([getattr(state, name)[0] for state in states])
            places[:, :, : new.shape[2]].copy_(new)
            places[:, :, new.shape[2] :].zero_()  # nothing of whoever was here before
        for name in _RECENT:
            for recent, state in zip(getattr(self, name), states, strict=True):
                kept = getattr(state, name)
                recent[row] = 0 if kept is None else kept[0]
        self.used[row] = int(states[0].open_length[0])

    def store(self, row: int, length: int) -> list[MemoryState]:
        """The states of the sequence in `row`, which has seen `length` tokens; copies, one a layer."""
        size = self.segment_length
        opened = length % size
        copies = {name: getattr(self, name)[:, row : row + 1].clone() for name in _SUMS}
        copies |= {name: getattr(self, name)[:, row : row + 1, :, :opened].clone() for name in _LOCAL}
        if self.recent.numel():
            copies |= {name: getattr(self, name)[:, row : row + 1].clone() for name in _RECENT}
        return [
            MemoryState(
                **{name: copy[layer] for name, copy in copies.items()},
                length=torch.tensor([length]),
                segment_length=size,
            )
            for layer in range(len(self.memory))
        ]

    def look_back(self, layer: int, recent: Tensor | None) -> None:
        """Take over what the layer's short convolution looks back at, for active rows; part of the step."""
        if recent is not None:
            kept = self.open_recent[layer]
            kept.copy_(torch.where(self.active[:, None, None], recent, kept))

    def advance(self) -> None:
        """Count the token that every active row has taken in all layers; part of the step."""
        self.used += self.active

    def commit(self, rows: list[int]) -> None:
        """Add the open segments of `rows`, which have become whole, to their memories."""
        index = torch.tensor(rows, device=self.used.device)
        for name in ("memory", "normalizer"):
            pending = getattr(self, f"pending_{name}")
            getattr(self, name).index_add_(1, index, pending.index_select(1, index))
            pending.index_fill_(1, index, 0)
        self.recent.index_copy_(1, index, self.open_recent.index_select(1, index))
        self.used.index_fill_(0, index, 0)


_SUMS = ("memory", "normalizer", "pending_memory", "pending_normalizer")
_LOCAL = ("local_key", "local_value")
_RECENT = ("recent", "open_recent")


def infini_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    buffers: StepBuffers,
    layer: int,
    *,
    local_query: Tensor,
    local_key: Tensor,
    update_rule: str = "linear",
    feature_map: str = "elu1",
    normalization: str = "sum",
    empty_memory: str = "local",
    scale: float,
    softcap: float | None = None,
    width: int | None = None,
) -> Tensor:
    """One token of every active row through one layer, equations (6) to (10); changes `buffers` in place.

    `buffers.advance` after the last layer counts the tokens, and `commit` ends segments: both are the
    caller's, once for all layers. Rows that are not active get an output of no meaning and keep their state.

    Args:
        query: (rows, heads, 1, head_dim), without position embedding; `local_query` with it.
        key: (rows, kv_heads, 1, head_dim), without position embedding; `local_key` with it.
        value: (rows, kv_heads, 1, value_dim).
        gate: (heads,) logits.
        buffers: the rows' states.
        layer: which of the buffers' layers this is.
        local_query: see `query`.
        local_key: see `key`.
        update_rule: as in `infini_attention`, and so are the next three and `softcap`.
        feature_map: see there.
        normalization: see there.
        empty_memory: see there.
        scale: of local scores.
        softcap: see there.
        width: places of the open segments to look at, more than any active row has used; default all.

    Returns:
        (rows, heads, 1, value_dim) in query's dtype.
    """
    rows, heads = query.shape[:2]
    memory, normalizer = buffers.memory[layer], buffers.normalizer[layer]
    kv_heads = memory.shape[1]
    width = buffers.segment_length if width is None else width

    def grouped(x: Tensor) -> Tensor:  # a group of heads reads one memory: (rows, kv_heads, group, dim)
        return x.reshape(rows, kv_heads, -1, x.shape[-1])

    keys, values = buffers.local_key[layer], buffers.local_value[layer]
    place = buffers.used[:, None, None, None]
    keys.scatter_(2, place.expand_as(local_key), local_key)
    values.scatter_(2, place.expand_as(value), value)
    visible = torch.arange(width, device=place.device) <= place
    local = local_attention(
        grouped(local_query),
        keys[:, :, :width],
        values[:, :, :width],
        scale=scale,
        softcap=softcap,
        mask=visible,
    )

    sigma = normalized(feature_maps.get(feature_map), normalization)
    features = sigma(grouped(query).to(memory.dtype))
    share = torch.sigmoid(gate.to(memory.dtype)).view(1, kv_heads, -1, 1)
    if empty_memory == "local":
        share = torch.where(is_empty(normalizer)[..., None, None], 0, share)
    from_memory = read(features, memory, normalizer, normalization)
    output = torch.lerp(local.to(memory.dtype), from_memory, share)

    key_features, new_values = sigma(key.to(memory.dtype)), value.to(memory.dtype)
    if update_rule == "delta":
        new_values = new_values - read(key_features, memory, normalizer, normalization)
    key_features = key_features * buffers.active[:, None, None, None]
    buffers.pending_memory[layer].add_(key_features.transpose(-1, -2) * new_values)
    buffers.pending_normalizer[layer].add_(key_features.squeeze(2))
    return output.reshape(rows, heads, 1, -1).to(query.dtype)
