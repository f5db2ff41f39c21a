"""Tiny models of every system, and tokens for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from infini_attention.baselines import BASELINES

SEGMENT = 8
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN = {
    "memorizing": {"memory_size": 20, "neighbors": 3},
    "recurrent_memory": {"memory_tokens": 3},
    "sliding_window": {"window": 11, "sinks": 2},
}


def make_baseline(name: str, **overrides: Any) -> Any:
    """A tiny model of this system, in evaluation mode; gates and learned scales differ from head to head."""
    torch.manual_seed(0)
    model_class = BASELINES[name][LlamaForCausalLM]
    fields = SIZES | {"segment_length": SEGMENT} | OWN.get(name, {}) | overrides
    model = model_class(model_class.config_class(**fields)).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("memory_gate.logits", "lookup_scale.factors")):
            torch.nn.init.normal_(parameter, mean=1.0)
    return model


def make_tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
