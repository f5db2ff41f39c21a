"""The control of every question: the memory is emptied before it, and attention has to do without."""

from dataclasses import replace
from typing import Any

import torch

from infini_attention.models import InfiniCache
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.ops import MemoryState


def with_memory_reset(cache: InfiniCache) -> InfiniCache:
    """A cache with empty memories, which leaves this one as it is.

    What local attention sees stays, and with it what those tokens had read from the memory.
    """
    return cache.map_states(_emptied)


def check_has_memory(model: Any) -> None:
    """Raise ValueError for a model without a memory to reset."""
    if not isinstance(model.config, InfiniConfigMixin):
        raise ValueError(
            f"{model.name_or_path} is of type {model.config.model_type}, which has no memory to reset; give "
            "a model with memories"
        )


def _emptied(state: MemoryState) -> MemoryState:
    """The state with nothing in memory, and nothing on its way there; keys that attention sees stay."""
    sums: dict[str, Any] = {
        name: torch.zeros_like(x)
        for name, x in state.tensors().items()
        if name.endswith(("memory", "normalizer"))
    }
    return replace(state, **sums)
