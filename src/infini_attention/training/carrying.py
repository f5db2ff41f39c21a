"""What goes on from one optimiser step to the next: a memory, or whatever else a system carries."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from infini_attention.baselines.linear_attention import LinearAttentionState
from infini_attention.baselines.memorizing import MemorizingState
from infini_attention.baselines.recurrent_memory import MemoryVectors
from infini_attention.baselines.state import SegmentState
from infini_attention.baselines.transformer_xl import TransformerXLState
from infini_attention.models.cache import InfiniCache, InfiniCacheLayer
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.ops import MemoryState

STATES: dict[str, type[Any]] = {
    each.__name__: each
    for each in (
        MemoryState,
        SegmentState,
        TransformerXLState,
        MemorizingState,
        MemoryVectors,
        LinearAttentionState,
    )
}


class CarriedMemory:
    """The states of a batch's rows between two steps, without the graphs that made them."""

    def __init__(self) -> None:
        # Of each layer, if it has anything yet, and how many tokens its cache had seen.
        self._carried: list[tuple[Any, int]] = []

    def cache(self, model: Any, starts: Tensor | None) -> InfiniCache:
        """A cache that goes on from the last step; rows start afresh where `starts`, (rows,) bool, says so.

        Raises ValueError where the batch does not say which rows do, or has other rows than the last one; for
        a model that carries all keys; and for a baseline some of whose rows start and others do not.
        """
        cache = _empty_cache(model)
        if starts is None:
            raise ValueError(
                "carry_memory is set and the batch has no starts_document, (rows,) bool; use CarriedWindows "
                "or SplitWindows, or add it to every example"
            )
        starts = starts.cpu()
        if not self._carried:
            return cache
        rows = next(state for state, _ in self._carried if state is not None).batch_size
        if len(starts) != rows:
            raise ValueError(
                f"the batch has {len(starts)} rows, the memory carried to it {rows}; "
                "give batches of equal size: dataloader_drop_last=True"
            )
        if bool(starts.all()):
            return cache
        layers: list[Any] = cache.layers
        for layer, (state, seen) in zip(layers, self._carried, strict=True):
            layer.state, layer.seen = _without(state, starts), seen
        return cache

    def keep(self, cache: InfiniCache) -> None:
        """Take over the states after a step."""
        layers: list[Any] = cache.layers
        self._carried = [_kept(layer.state, layer.seen) for layer in layers]

    def save(self) -> list[tuple[str, dict[str, Any], int]]:
        """What `load` takes: tensors, numbers and names only."""
        return [
            ("", {}, seen) if state is None else (type(state).__name__, asdict(state), seen)
            for state, seen in self._carried
        ]

    def load(self, saved: list[tuple[str, dict[str, Any], int]], device: torch.device) -> None:
        """Go on, on `device`, from what `save` gave."""
        self._carried = [
            (STATES[name](**fields).to(device) if name else None, seen) for name, fields, seen in saved
        ]


def _empty_cache(model: Any) -> InfiniCache:
    config: Any = model.config
    if isinstance(config, InfiniConfigMixin):
        config.check_every_layer_has_memory()
    # Of the decoder, which adapters wrap.
    make = next((each.cache_class for each in model.modules() if hasattr(each, "cache_class")), None)
    cache: InfiniCache | None = None if make is None else make(config)
    if cache is None or not cache.layers or not isinstance(cache.layers[0], InfiniCacheLayer):
        raise ValueError(
            f"carry_memory is set, and a {type(config).__name__} has nothing of fixed size to carry; "
            "leave it out"
        )
    return cache


def _kept(state: Any, seen: int) -> tuple[Any, int]:
    """A state and its cache's count of tokens; a memory has its own, and masks are of one batch alone."""
    if state is None:
        return None, seen
    if isinstance(state, MemoryState):
        return state.detach().recounted(), 0
    return state.carried(), seen


def _without(state: Any, starts: Tensor) -> Any:
    """The state without what it has of rows that start afresh, (rows,) bool."""
    if state is None or not bool(starts.any()):
        return state
    if not isinstance(state, MemoryState):
        raise ValueError(
            f"{int(starts.sum())} of {len(starts)} rows start afresh, and those of baselines do so together; "
            "set data.carried_length"
        )
    return state.forget(starts)
