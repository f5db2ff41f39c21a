"""The memory that goes on from one optimiser step to the next."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from infini_attention.models.cache import InfiniCache, InfiniCacheLayer
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.ops import MemoryState


class CarriedMemory:
    """The states of a batch's rows between two steps, without the graphs that made them."""

    def __init__(self) -> None:
        self._states: list[MemoryState] = []

    def cache(self, config: Any, starts: Tensor | None) -> InfiniCache:
        """A cache that goes on from the last step; rows start afresh where `starts`, (rows,) bool, says so.

        Raises ValueError where the batch does not say which rows do, or has other rows than the last one,
        and for a model that carries something else.
        """
        if not isinstance(config, InfiniConfigMixin):
            raise ValueError(
                f"carry_memory is set, and a {type(config).__name__} is of no infini_* model; leave it out"
            )
        config.check_every_layer_has_memory()
        cache = InfiniCache(config)
        if starts is None:
            raise ValueError(
                "carry_memory is set and the batch has no starts_document, (rows,) bool; use CarriedWindows, "
                "or add it to every example"
            )
        if not self._states:
            return cache
        if len(starts) != self._states[0].batch_size:
            raise ValueError(
                f"the batch has {len(starts)} rows, the memory carried to it {self._states[0].batch_size}; "
                "give batches of equal size: dataloader_drop_last=True"
            )
        for layer, state in zip(_layers(cache), self._states, strict=True):
            layer.state = state.forget(starts)
        return cache

    def keep(self, cache: InfiniCache) -> None:
        """Take over the states after a step."""
        self._states = [layer.state.detach() for layer in _layers(cache) if layer.state is not None]

    def save(self) -> list[dict[str, Any]]:
        """What `load` takes: tensors and numbers only."""
        return [asdict(state) for state in self._states]

    def load(self, saved: list[dict[str, Any]], device: torch.device) -> None:
        """Go on, on `device`, from what `save` gave."""
        self._states = [MemoryState(**fields).to(device) for fields in saved]


def _layers(cache: InfiniCache) -> list[InfiniCacheLayer]:
    return [layer for layer in cache.layers if isinstance(layer, InfiniCacheLayer)]
