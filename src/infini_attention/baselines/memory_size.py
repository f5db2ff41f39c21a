"""How much context memory a system holds, in numbers, and how much less than a Memorizing Transformer."""

import math
from typing import Any

from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.models.config import InfiniConfigMixin, head_dim_of
from infini_attention.ops import feature_maps

MEMORIZED = 65_536  # pairs a head in the Memorizing Transformer that others are compared with


def memory_floats(config: Any, length: int) -> int:
    """Numbers that a model holds of a text of `length` tokens, beside those of its open segment.

    They are those of the paper's Table 1 (arXiv 2404.07143), a row's, in all layers. Only full attention's
    grow for ever; for the others any length of `MEMORIZED` and a segment more gives the most.

    Raises:
        ValueError: the config of a model that is neither an `infini_*` one nor a baseline.
    """
    if isinstance(config, InfiniConfigMixin):
        return _infini_floats(config, length)
    if isinstance(config, BaselineConfigMixin):
        return config.memory_floats(length)
    raise ValueError(
        f"{type(config).__name__} is no config of an infini_* model or a baseline; give one of these"
    )


def compression(config: Any, length: int) -> float:
    """How many times less that is than a Memorizing Transformer's of the same sizes, full: Table 2's column.

    That one has 65,536 pairs a head in one layer and the segment before in every layer; a system that holds
    nothing gives infinity. Raises ValueError as `memory_floats` does.
    """
    own = memory_floats(config, length)
    tokens = MEMORIZED + config.num_hidden_layers * config.segment_length
    memorizing = 2 * head_dim_of(config) * config.num_key_value_heads * tokens
    return memorizing / own if own else math.inf


def _infini_floats(config: Any, length: int) -> int:
    """d_key (d_value + 1) H a layer with a memory, d_key being features; keys and values in the others.

    And what local attention sees outside a segment: sinks, or a segment, beside which M and z stand once
    without it and once with it.
    """
    width = head_dim_of(config)
    state = feature_maps.get(config.feature_map).feature_dim(width) * (width + 1)
    state *= 2 if config.local_attention == "sliding" else 1
    state += 2 * width * config.context_tokens
    ordinary = set(range(config.num_hidden_layers)) - set(config.infini_layers)
    tokens = sum(min(length, config._window(layer) or length) for layer in ordinary)
    return config.num_key_value_heads * (len(config.infini_layers) * state + 2 * width * tokens)
