"""What one layer of a baseline carries from call to call, and the cache that holds it."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from infini_attention.models.cache import InfiniCache, InfiniCacheLayer
from infini_attention.ops.flags import flags
from infini_attention.ops.local import continued
from infini_attention.ops.state import chosen, without_rows


@dataclass
class RowState:
    """Tensors whose first dimension is the batch: what happens to rows happens to each of them.

    Those that count or mark are on the CPU, as they decide what is computed.
    """

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self._tensors()[0])

    @property
    def nbytes(self) -> int:
        """Size in bytes of what is remembered."""
        return sum(tensor.nbytes for tensor in self._tensors() if tensor.is_floating_point())

    def select(self, rows: Tensor) -> Self:
        """The given rows, in the given order; `rows` is (n,) integer and may repeat or drop rows."""
        return self._map(lambda x: chosen(x, rows))

    def detach(self) -> Self:
        """The same values, cut off from the graph that made them."""
        return self._map(Tensor.detach)

    def carried(self) -> Self:
        """What goes on to the next step of a training, whose weights are others."""
        return self.detach()

    def forget(self, rows: Tensor) -> Self:
        """The state in which the given rows start afresh; `rows` is (batch,) bool, True = forget."""
        if not bool(rows.any()):
            return self
        return self._map(lambda x: without_rows(x, flags(rows.tolist(), x.device)))

    def to(self, device: torch.device | str) -> Self:
        """The state on `device`."""
        return self._map(lambda tensor: tensor.to(device) if tensor.is_floating_point() else tensor)

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*map(function, self._tensors()))


@dataclass
class SegmentState(RowState):
    """Keys and values of one layer, each (batch, kv_heads, tokens, head_dim), keys not rotated.

    Attributes:
        key: of the open segment.
        value: of the open segment.
        cached_key: of the whole segment before it; no tokens where none is kept.
        cached_value: likewise.
        length: each row's tokens so far, (batch,) int64 on the CPU: of what is kept, a row sees so many.
    """

    key: Tensor
    value: Tensor
    cached_key: Tensor
    cached_value: Tensor
    length: Tensor

    @classmethod
    def before(cls, key: Tensor, value: Tensor) -> Self:
        """The state before the first of these tokens."""
        nothing = {
            "key": no_tokens(key),
            "value": no_tokens(value),
            "hidden": key.new_empty(len(key), 0, 0),
            "length": torch.zeros(len(key), dtype=torch.int64, device="cpu"),
        }
        return cls(**{field.name: nothing[field.name.rpartition("_")[2]] for field in fields(cls)})

    def extended(self, key: Tensor, value: Tensor) -> Self:
        """The state with more tokens in the open segment."""
        keys, values = continued(self.key, key), continued(self.value, value)
        return replace(self, key=keys, value=values, length=self.length + key.shape[2])

    def forget(self, rows: Tensor) -> Self:
        """The state in which the given rows see nothing of what is kept; ValueError in an open segment."""
        if self.key.shape[2] and bool(rows.any()):
            raise ValueError(
                f"{int(rows.sum())} of {len(rows)} rows start afresh {self.key.shape[2]} tokens after a "
                "segment's start, and baselines start them at a segment's alone; give whole segments"
            )
        return replace(self, length=self.length.masked_fill(rows, 0))

    def forgotten(self) -> Self:
        """The state without the open segment and the one before it."""
        key, value = no_tokens(self.key), no_tokens(self.value)
        return replace(self, key=key, value=value, cached_key=key, cached_value=value)


class SegmentCacheLayer(InfiniCacheLayer):
    """One layer's RowState, and how many tokens it has been given."""

    state: Any


class SegmentCache(InfiniCache):
    """What a baseline carries from call to call; an InfiniCache with SegmentStates in its layers.

    Args:
        config: the model's config.
    """

    def __init__(self, config: Any) -> None:
        DynamicCache.__init__(self, config=config)
        self.layers = [SegmentCacheLayer() for _ in range(config.num_hidden_layers)]


def no_tokens(x: Tensor) -> Tensor:
    """Like keys or values, (batch, kv_heads, 0, head_dim); no view, which would keep all of `x` alive."""
    return x.new_empty(x.shape[0], x.shape[1], 0, x.shape[3])
