"""One token a row, in place: the step of decoding, over buffers whose shapes never change.

`infini_attention` plans every call on the host, from lengths. Here all that differs from row to row is a
number on the device, so that a step can be captured as a CUDA graph or compiled once, and takes the same time
at any length of context. What it computes is what `infini_attention` computes for one more token.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from infini_attention.ops import feature_maps
from infini_attention.ops.local import context_tokens, local_attention
from infini_attention.ops.normalization import normalized, read
from infini_attention.ops.state import MemoryState, is_empty, state_dtype


@dataclass
class StepBuffers:
    """The states of all layers for a fixed number of rows, at their largest size.

    Attributes:
        memory, pending_memory: (layers, rows, kv_heads, feature_dim, value_dim) fp32 (fp64 for fp64 models).
        normalizer, pending_normalizer: (layers, rows, kv_heads, feature_dim), same dtype.
        local_key: (layers, rows, kv_heads, context + segment_length, head_dim), in the inputs' dtype: what is
            seen outside the open segment, of no size where nothing is, and then that segment.
        local_value: (layers, rows, kv_heads, context + segment_length, value_dim), same dtype.
        used: (rows,) int64 on the same device: tokens of each row's open segment.
        active: (rows,) bool on the same device: which rows the next step is meant for.
        recent, open_recent: what short convolutions look back at from the open segment's first token and
            from the next one, (layers, rows, width - 1, channels) in the inputs' dtype; of no size without
            one.
        open_context_key: as in `MemoryState`, (layers, rows, kv_heads, context, head_dim).
        earlier_memory, earlier_normalizer: as in `MemoryState`, in the form of `memory` and `normalizer`; of
            no size but for local attention that slides.
        has_context: (rows,) bool on the same device: whether a row's first segment is whole.
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
    open_context_key: Tensor
    earlier_memory: Tensor
    earlier_normalizer: Tensor
    has_context: Tensor

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
        local_attention: str = "segment",
        sink_tokens: int = 4,
        recent: tuple[int, int] = (0, 0),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "StepBuffers":
        """Buffers of rows that have seen nothing; `dtype` is that of the inputs to come.

        `recent` are the sizes (width - 1, channels) of what a short convolution looks back at.
        """
        feature_dim = feature_maps.get(feature_map).feature_dim(head_dim)
        context = context_tokens(local_attention, segment_length=segment_length, sink_tokens=sink_tokens)
        places, earlier = context + segment_length, feature_dim if local_attention == "sliding" else 0

        def zeros(*sizes: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(layers, rows, kv_heads, *sizes, dtype=dtype, device=device)

        return cls(
            memory=zeros(feature_dim, value_dim, dtype=state_dtype(dtype)),
            normalizer=zeros(feature_dim, dtype=state_dtype(dtype)),
            pending_memory=zeros(feature_dim, value_dim, dtype=state_dtype(dtype)),
            pending_normalizer=zeros(feature_dim, dtype=state_dtype(dtype)),
            local_key=zeros(places, head_dim, dtype=dtype),
            local_value=zeros(places, value_dim, dtype=dtype),
            used=torch.zeros(rows, dtype=torch.int64, device=device),
            active=torch.zeros(rows, dtype=torch.bool, device=device),
            recent=torch.zeros(layers, rows, *recent, dtype=dtype, device=device),
            open_recent=torch.zeros(layers, rows, *recent, dtype=dtype, device=device),
            open_context_key=zeros(context, head_dim, dtype=dtype),
            earlier_memory=zeros(earlier, value_dim, dtype=state_dtype(dtype)),
            earlier_normalizer=zeros(earlier, dtype=state_dtype(dtype)),
            has_context=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    @property
    def segment_length(self) -> int:
        """N, the places of an open segment."""
        return self.local_key.shape[3] - self.context_tokens

    @property
    def context_tokens(self) -> int:
        """The places of what is seen outside it."""
        return self.open_context_key.shape[3]

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def load(self, row: int, states: list[MemoryState]) -> None:
        """Put a sequence into `row`: the state of each layer, of batch size 1."""
        context = self.context_tokens

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(state, name)[0] for state in states])

        for name in self._sums:
            getattr(self, name)[:, row].copy_(stacked(name))
        for name, outside in _LOCAL.items():
            places = getattr(self, name)[:, row]
            if context:
                places[:, :, :context].copy_(stacked(outside))
            _fill(places[:, :, context:], stacked(name))
        if context:
            _fill(self.open_context_key[:, row], stacked("open_context_key"))
        for name in _RECENT:
            for recent, state in zip(getattr(self, name), states, strict=True):
                kept = getattr(state, name)
                recent[row] = 0 if kept is None else kept[0]
        self.used[row] = int(states[0].open_length[0])
        self.has_context[row] = int(states[0].length[0]) >= self.segment_length

    def store(self, row: int, length: int) -> list[MemoryState]:
        """The states of the sequence in `row`, which has seen `length` tokens; copies, one a layer."""
        size, context = self.segment_length, self.context_tokens
        opened = length % size
        copies = {name: getattr(self, name)[:, row : row + 1].clone() for name in self._sums}
        for name, outside in _LOCAL.items():
            places = getattr(self, name)[:, row : row + 1]
            copies[name] = places[:, :, :, context : context + opened].clone()
            if context:
                copies[outside] = places[:, :, :, :context].clone()
        if context:
            copies["open_context_key"] = self.open_context_key[:, row : row + 1, :, :opened].clone()
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

    def committed(self) -> dict[str, Tensor]:
        """What all layers know of every row as of its last whole segment, (layers, rows, ...), by name."""
        kept = {"memory": self.memory, "normalizer": self.normalizer}
        if self.recent.numel():
            kept["recent"] = self.recent
        if context := self.context_tokens:
            for name, outside in _LOCAL.items():
                kept[outside] = getattr(self, name)[:, :, :, :context]
        if self._slides:
            kept |= {"earlier_memory": self.earlier_memory, "earlier_normalizer": self.earlier_normalizer}
        return kept

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
        self._hand_on_context(index)
        for name in ("memory", "normalizer"):
            pending, earlier = getattr(self, f"pending_{name}"), getattr(self, f"earlier_{name}")
            if self._slides:
                earlier.index_copy_(1, index, getattr(self, name).index_select(1, index))
            getattr(self, name).index_add_(1, index, pending.index_select(1, index))
            pending.index_fill_(1, index, 0)
        self.recent.index_copy_(1, index, self.open_recent.index_select(1, index))
        self.used.index_fill_(0, index, 0)
        self.has_context.index_fill_(0, index, True)

    @property
    def readable(self) -> tuple[Tensor, Tensor]:
        """M and z that the next tokens read."""
        if self._slides:
            return self.earlier_memory, self.earlier_normalizer
        return self.memory, self.normalizer

    def _hand_on_context(self, index: Tensor) -> None:
        """Let the open segments of the rows `index` become what the next ones see outside, or their sinks."""
        context = self.context_tokens
        kept = self.has_context.index_select(0, index)[:, None, None, None] & (not self._slides)
        opened = self.local_value[:, :, :, context : 2 * context]
        for places, new in ((self.local_key, self.open_context_key), (self.local_value, opened)):
            old = places[:, :, :, :context]
            handed_on = torch.where(kept, old.index_select(1, index), new.index_select(1, index))
            old.index_copy_(1, index, handed_on)

    @property
    def _slides(self) -> bool:
        return self.earlier_memory.numel() > 0

    @property
    def _sums(self) -> tuple[str, ...]:
        """Names of what is of the shape of a memory."""
        earlier = ("earlier_memory", "earlier_normalizer") if self._slides else ()
        return ("memory", "normalizer", "pending_memory", "pending_normalizer", *earlier)


_LOCAL = {"local_key": "context_key", "local_value": "context_value"}  # and what is before it in its buffer
_RECENT = ("recent", "open_recent")


def _fill(places: Tensor, tokens: Tensor) -> None:
    """Put `tokens` into the first of the places, and nothing of whoever was here before into the others."""
    places[:, :, : tokens.shape[2]].copy_(tokens)
    places[:, :, tokens.shape[2] :].zero_()


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
    context_key: Tensor | None = None,
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
        context_key: `key` as later segments see it, where the buffers have places for that.
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

    keys, values, context = buffers.local_key[layer], buffers.local_value[layer], buffers.context_tokens
    place = buffers.used[:, None, None, None]
    keys.scatter_(2, (context + place).expand_as(local_key), local_key)
    values.scatter_(2, (context + place).expand_as(value), value)
    visible = torch.arange(width, device=place.device) <= place
    if context:
        assert context_key is not None
        _keep_for_later(context_key, buffers.open_context_key[layer], place)
        outside = buffers.has_context[:, None, None, None].expand(-1, -1, -1, context)
        visible = torch.cat([outside, visible], dim=-1)
    local = local_attention(
        grouped(local_query),
        keys[:, :, : context + width],
        values[:, :, : context + width],
        scale=scale,
        softcap=softcap,
        mask=visible,
    )

    sigma = normalized(feature_maps.get(feature_map), normalization)
    features = sigma(grouped(query).to(memory.dtype))
    share = torch.sigmoid(gate.to(memory.dtype)).view(1, kv_heads, -1, 1)
    read_memory, read_normalizer = (x[layer] for x in buffers.readable)
    if empty_memory == "local":
        share = torch.where(is_empty(read_normalizer)[..., None, None], 0, share)
    from_memory = read(features, read_memory, read_normalizer, normalization)
    output = torch.lerp(local.to(memory.dtype), from_memory, share)

    key_features, new_values = sigma(key.to(memory.dtype)), value.to(memory.dtype)
    if update_rule == "delta":
        new_values = new_values - read(key_features, memory, normalizer, normalization)
    key_features = key_features * buffers.active[:, None, None, None]
    buffers.pending_memory[layer].add_(key_features.transpose(-1, -2) * new_values)
    buffers.pending_normalizer[layer].add_(key_features.squeeze(2))
    return output.reshape(rows, heads, 1, -1).to(query.dtype)


def _keep_for_later(key: Tensor, kept: Tensor, place: Tensor) -> None:
    """Put each row's `key` at its `place` among those `kept` for later segments, if it is one of them."""
    at = place.clamp(max=kept.shape[2] - 1).expand_as(key)
    kept.scatter_(2, at, torch.where(place < kept.shape[2], key, kept.gather(2, at)))
