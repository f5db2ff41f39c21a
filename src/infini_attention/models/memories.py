"""Memories for a pre-trained model in memory: its infini type around its tensors, and gates beside them."""

from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel

from infini_attention.layers import MemoryGate, ShortConvolution
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.families import FAMILIES
from infini_attention.models.sharing import share_weights

OWN = "memory_gate.logits", "short_convolution.weight"  # how names of parameters end that no base has


def with_memories(
    base: PreTrainedModel, settings: dict[str, Any], *, dtype: torch.dtype | None = None
) -> Any:
    """What `retrofit` returns; `base` is one of `FAMILIES`, `settings` fields of `InfiniConfigMixin`."""
    model = share_weights(base, FAMILIES[type(base)], settings, dtype=dtype, own=OWN)
    _add_memories(model)
    return model.train(base.training)


def memory_settings(config: InfiniConfigMixin) -> dict[str, Any]:
    """The fields of a config that `with_memories` takes."""
    return {field.name: getattr(config, field.name) for field in fields(InfiniConfigMixin)}


def _add_memories(model: Any) -> None:
    """Give every layer with a memory its gate, and its short convolution where there is one."""
    for layer in model.config.infini_layers:
        attention = model.model.layers[layer].self_attn
        gate = MemoryGate(model.config.num_attention_heads, init=model.config.gate_init)
        like = attention.q_proj.weight
        attention.memory_gate = gate.to(like.device)
        if model.config.short_convolution:
            convolution = ShortConvolution(*attention.short_convolution.weight.shape).become_identity()
            attention.short_convolution = convolution.to(like.device, like.dtype)
