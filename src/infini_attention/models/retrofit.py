"""retrofit(): a pre-trained decoder becomes one with memory."""

from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel

from infini_attention.models.families import FAMILIES
from infini_attention.models.loading import load_base
from infini_attention.models.memories import with_memories


def retrofit(
    model_or_path: PreTrainedModel | str | PathLike[str],
    *,
    segment_length: int,
    update_rule: str = "linear",
    feature_map: str = "elu1",
    normalization: str = "sum",
    empty_memory: str = "local",
    local_attention: str = "segment",
    sink_tokens: int = 4,
    short_convolution: int = 0,
    layers: list[int] | None = None,
    gate_init: float = -4.0,
    dtype: torch.dtype | None = None,
) -> Any:
    """Turn a pre-trained decoder into its `infini_*` type: same parameter names, and gates beside them.

    Inputs of at most one segment give the base model's logits, before any training; of at most two, where
    local attention slides.

    Args:
        model_or_path: a model in memory, or whatever `load_model` takes. A model in memory is not changed,
            but the new model shares its parameters' storage: training either moves the other.
        segment_length: N, tokens a segment.
        update_rule: "linear" or "delta".
        feature_map: a name of `infini_attention.ops.feature_maps`.
        normalization: of what memory answers: "sum", "root", "none" or "unit"; see
            `infini_attention.ops.infini_attention`.
        empty_memory: "local" or "gated"; see `infini_attention.ops.infini_attention`.
        local_attention: "segment", "sliding" or "sink"; see there. Many pre-trained models attend to a text's
            first tokens throughout, as sinks; "sliding" loses sight of them, so it wants training.
        sink_tokens: how many of the text's first tokens "sink" keeps in sight.
        short_convolution: tokens that every query and key becomes a mixture of, which begins as the token
            itself alone; 0 for none. See `ops.convolution`.
        layers: indices of the layers that get a memory; default every layer with full attention, and every
            one whose sliding window is at least `segment_length` and what is seen outside a segment.
        gate_init: initial logit of every gate; -4 gives the memory, still untrained, 1.8 % of each output.
        dtype: of the new model; default the base's. Gates are fp32 always.

    Returns:
        The model, on the base's device and in its training or evaluation mode.

    Raises:
        ValueError: a family that is not supported, a model that has memories already or is quantized, or a
            setting that cannot be right.
    """
    base = load_base(model_or_path, FAMILIES, dtype=dtype)
    settings = {
        "segment_length": segment_length,
        "update_rule": update_rule,
        "feature_map": feature_map,
        "normalization": normalization,
        "empty_memory": empty_memory,
        "local_attention": local_attention,
        "sink_tokens": sink_tokens,
        "short_convolution": short_convolution,
        "infini_layers": layers,
        "gate_init": gate_init,
    }
    return with_memories(base, settings, dtype=dtype)
