"""What one layer of a baseline carries from call to call, and the cache that holds it."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from infini_attention.models.cache import InfiniCache, InfiniCacheLayer
from infini_attention.ops.local import continued


@dataclass
class RowState:
    """Tensors whose first dimension is the batch: what happens to rows happens to each of them."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self._tensors()[0])

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def select(self, rows: Tensor) -> Self:
        """The given rows, in the given order; `rows` is (n,) integer and may repeat or drop rows."""
        return self._map(lambda x: x.index_select(0, rows.to(x.device, torch.int64)))

    def detach(self) -> Self:
        """The same values, cut off from the graph that made them."""
        return self._map(Tensor.detach)

    def carried(self) -> Self:
        """What goes on to the next step of a training, whose weights are others."""
        return self.detach()

    def to(self, device: torch.device | str) -> Self:
        """The state on `device`."""
        return self._map(lambda tensor: tensor.to(device))

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
    """

    key: Tensor
    value: Tensor
    cached_key: Tensor
    cached_value: Tensor

    @classmethod
    def before(cls, key: Tensor, value: Tensor) -> Self:
        """The state before the first of these tokens."""
        nothing = {
            "key": no_tokens(key),
            "value": no_tokens(value),
            "hidden": key.new_empty(len(key), 0, 0),
        }
        return cls(**{field.name: nothing[field.name.rpartition("_")[2]] for field in fields(cls)})

    def extended(self, key: Tensor, value: Tensor) -> Self:
        """The state with more tokens in the open segment."""
        return replace(self, key=continued(self.key, key), value=continued(self.value, value))

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
