"""MemoryState: all that one layer carries from call to call, and how it is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_attention.ops import feature_maps
from infini_attention.ops.flags import flags
from infini_attention.ops.local import context_tokens
from infini_attention.ops.normalization import normalized, read


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The memory's precision for inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_empty(normalizer: Tensor) -> Tensor:
    """(...,) bool: True where the memory whose `normalizer` is (..., feature_dim) holds nothing yet."""
    return (normalizer == 0).all(dim=-1)


def without_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x`, (batch, ...), with zeros in the given rows, (batch,) bool on its device."""
    return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), torch.zeros_like(x), x)


def chosen(x: Tensor, rows: Tensor) -> Tensor:
    """The given rows of `x`, (n,) integer on any device; the host waits for none that it sends."""
    return x.index_select(0, rows.to(x.device, torch.int64, non_blocking=rows.device.type == "cpu"))


OPEN = ("local_key", "local_value", "open_context_key")  # right-padded to the longest open segment


@dataclass
class MemoryState:
    """What one layer knows of the tokens so far: fixed size, whatever their number.

    Tensors are fp32 (fp64 where the inputs are), except keys and values of local attention and what a
    short convolution looks back at, which keep the inputs' dtype. Rows are the batch's sequences, or the
    documents of a packed batch.

    Attributes:
        memory: M of the last whole segment, (batch, kv_heads, feature_dim, value_dim).
        normalizer: z of the last whole segment, (batch, kv_heads, feature_dim).
        pending_memory: what the open segment will add to `memory`, same shape.
        pending_normalizer: what the open segment will add to `normalizer`, same shape.
        local_key: the open segment's keys as local attention sees them,
            (batch, kv_heads, open, head_dim), right-padded to the row with the longest open segment.
        local_value: its values, (batch, kv_heads, open, value_dim).
        length: each row's real tokens so far, (batch,) int64 on the CPU, since it decides where cuts fall.
        segment_length: N, the number of tokens in a segment.
        recent: the tokens just before the open segment's first, which a short convolution before the
            attention looks back at, (batch, width - 1, channels) in the inputs' dtype; None without one. The
            attention itself hands it on as it is, and `open_recent` too.
        open_recent: the same just before the next token.
        context_key: keys outside the open segment that its tokens see too, as they see them, (batch,
            kv_heads, context, head_dim): of the whole segment before ("sliding"), or of the row's first
            tokens ("sink"); zeros as long as no segment is whole. None, as all that follow, where local
            attention is of the segment alone.
        context_value: their values, (batch, kv_heads, context, value_dim).
        open_context_key: the open segment's keys as later segments will see them, as many as a context takes.
        earlier_memory: M without the segment that is the context ("sliding" alone), which is what is read;
            `memory` has it, and is read one segment later.
        earlier_normalizer: z likewise.
    """

    memory: Tensor
    normalizer: Tensor
    pending_memory: Tensor
    pending_normalizer: Tensor
    local_key: Tensor
    local_value: Tensor
    length: Tensor
    segment_length: int
    recent: Tensor | None = None
    open_recent: Tensor | None = None
    context_key: Tensor | None = None
    context_value: Tensor | None = None
    open_context_key: Tensor | None = None
    earlier_memory: Tensor | None = None
    earlier_normalizer: Tensor | None = None

    @classmethod
    def empty(
        cls,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        segment_length: int,
        feature_map: str = "elu1",
        local_attention: str = "segment",
        sink_tokens: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "MemoryState":
        """The state before the first token; `dtype` is that of the inputs to come."""
        feature_dim = feature_maps.get(feature_map).feature_dim(head_dim)
        context = context_tokens(local_attention, segment_length=segment_length, sink_tokens=sink_tokens)

        def zeros(*sizes: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch_size, kv_heads, *sizes, dtype=dtype, device=device)

        outside: dict[str, Tensor] = {}
        if context:
            outside["context_key"] = zeros(context, head_dim, dtype=dtype)
            outside["context_value"] = zeros(context, value_dim, dtype=dtype)
            outside["open_context_key"] = zeros(0, head_dim, dtype=dtype)
        if local_attention == "sliding":
            outside["earlier_memory"] = zeros(feature_dim, value_dim, dtype=state_dtype(dtype))
            outside["earlier_normalizer"] = zeros(feature_dim, dtype=state_dtype(dtype))
        return cls(
            memory=zeros(feature_dim, value_dim, dtype=state_dtype(dtype)),
            normalizer=zeros(feature_dim, dtype=state_dtype(dtype)),
            pending_memory=zeros(feature_dim, value_dim, dtype=state_dtype(dtype)),
            pending_normalizer=zeros(feature_dim, dtype=state_dtype(dtype)),
            local_key=zeros(0, head_dim, dtype=dtype),
            local_value=zeros(0, value_dim, dtype=dtype),
            length=torch.zeros(batch_size, dtype=torch.int64, device="cpu"),
            segment_length=segment_length,
            **outside,
        )

    @classmethod
    def before(
        cls,
        key: Tensor,
        value: Tensor,
        *,
        segment_length: int,
        feature_map: str,
        local_attention: str = "segment",
        sink_tokens: int = 4,
        rows: int | None = None,
    ) -> "MemoryState":
        """The state before the first of these keys and values, (batch, kv_heads, length, dim).

        `rows` are the documents of a packed batch; default the batch's own rows.
        """
        return cls.empty(
            key.shape[0] if rows is None else rows,
            key.shape[1],
            key.shape[-1],
            value.shape[-1],
            segment_length=segment_length,
            feature_map=feature_map,
            local_attention=local_attention,
            sink_tokens=sink_tokens,
            dtype=value.dtype,
            device=value.device,
        )

    @classmethod
    def cat(cls, states: Sequence["MemoryState"]) -> "MemoryState":
        """The rows of all `states`, in order; ValueError if they are not of one model."""
        lengths = sorted({state.segment_length for state in states})
        if len(lengths) != 1:
            raise ValueError(f"cannot join states with segment_length {lengths}; use states of one model")
        if len({(*state.tensors(),) for state in states}) != 1:
            raise ValueError(
                "cannot join states of which some are of a short convolution or another local attention; use "
                "states of one model"
            )
        columns: dict[str, Any] = {}
        for name in states[0].tensors():
            parts = [getattr(state, name) for state in states]
            if name in OPEN:
                width = max(part.shape[2] for part in parts)
                parts = [F.pad(part, (0, 0, 0, width - part.shape[2])) for part in parts]
            columns[name] = torch.cat(parts)
        return cls(**columns, segment_length=lengths[0])

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.memory.shape[0]

    @property
    def open_length(self) -> Tensor:
        """(batch,) int64 on the CPU: tokens of each row's open segment, not yet in `memory`."""
        return self.length % self.segment_length

    @property
    def context_tokens(self) -> int:
        """Places of the context; 0 where local attention is of the segment alone."""
        return 0 if self.context_key is None else self.context_key.shape[2]

    @property
    def local_attention(self) -> str:
        """What the state is of: "segment", "sliding" or "sink"."""
        if self.context_key is None:
            return "segment"
        return "sink" if self.earlier_memory is None else "sliding"

    @property
    def readable(self) -> tuple[Tensor, Tensor]:
        """M and z that the next token reads, of all segments outside its local attention."""
        if self.earlier_memory is None or self.earlier_normalizer is None:
            return self.memory, self.normalizer
        return self.earlier_memory, self.earlier_normalizer

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, without those that are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def read(self, query: Tensor, *, feature_map: str = "elu1", normalization: str = "sum") -> Tensor:
        """What `memory` answers to un-rotated queries, by equation (7); see `ops.normalization`.

        `query` is (batch, heads, length, head_dim), `heads` a multiple of the state's kv_heads.
        Returns (batch, heads, length, value_dim) in the state's dtype; zero where memory is empty.
        """
        batch, heads, length, _ = query.shape
        sigma = normalized(feature_maps.get(feature_map), normalization)
        features = sigma(query.to(self.memory.dtype))
        grouped = features.reshape(batch, self.memory.shape[1], -1, features.shape[-1])
        return read(grouped, self.memory, self.normalizer, normalization).reshape(batch, heads, length, -1)

    def after_whole_segments(
        self, memory: Tensor, normalizer: Tensor, segments: Sequence[int]
    ) -> "MemoryState":
        """This state with new sums, after so many whole `segments` of each row; no segment is open."""
        length = self.length + torch.tensor(segments) * self.segment_length
        return replace(self, memory=memory, normalizer=normalizer, length=length)

    def select(self, rows: Tensor) -> "MemoryState":
        """The given rows, in the given order; `rows` is (n,) integer and may repeat or drop rows."""
        return self._map(lambda x: chosen(x, rows))._trimmed()

    def forget(self, rows: Tensor) -> "MemoryState":
        """The state in which the given rows start afresh; `rows` is (batch,) bool, True = forget."""
        if not bool(rows.any()):
            return self
        there, length = flags(rows.tolist(), self.memory.device), without_rows(self.length, rows.cpu())
        return self._map(lambda x: without_rows(x, there), length=length)._trimmed()

    def recounted(self) -> "MemoryState":
        """The state after the fewest tokens of which the next ones know no more: what comes is the same.

        Those of the open segment; and one whole segment, if any was, where its end says what tokens see
        outside their own: whether the memory is empty is read in the memory itself.
        """
        size, context = self.segment_length, self.context_tokens > 0
        return replace(self, length=self.length % size + size * (self.length >= size) * context)

    def detach(self) -> "MemoryState":
        """The same values, cut off from the graph that made them."""
        return self._map(Tensor.detach)

    def clone(self) -> "MemoryState":
        """A copy that shares no memory with this state; gradients flow through."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> "MemoryState":
        """The state on `device`; dtypes do not change and `length` stays on the CPU."""
        return self._map(lambda tensor: tensor.to(device), length=self.length)

    def with_open(self, function: Callable[[Tensor], Tensor]) -> "MemoryState":
        """The state with `function` of each tensor of the open segment's keys and values."""
        changes: dict[str, Any] = {name: function(x) for name, x in self.tensors().items() if name in OPEN}
        return replace(self, **changes)

    def _trimmed(self) -> "MemoryState":
        """The state with no more places for the open segment than the longest row needs."""
        longest = max(self.open_length.tolist(), default=0)
        return self.with_open(lambda x: x[:, :, :longest])

    def _map(self, function: Callable[[Tensor], Tensor], **kept: Tensor) -> "MemoryState":
        tensors = {name: function(x) for name, x in self.tensors().items() if name not in kept}
        changes: dict[str, Any] = tensors | kept
        return replace(self, **changes)
