"""The control of every question: memories are emptied, and what local attention sees is not."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.evaluation.memory_reset import with_memory_reset
from infini_attention.models import InfiniCache, retrofit
from infini_attention.models.compat import CACHE_ARGUMENT


@pytest.mark.parametrize("local_attention", ["segment", "sliding", "sink"])
@torch.no_grad()
def test_nothing_is_read_after_a_reset_and_keys_in_sight_stay(local_attention: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    model = retrofit(base, segment_length=8, local_attention=local_attention)
    cache = InfiniCache(model.config)
    model(torch.randint(64, (1, 29)), use_cache=True, **{CACHE_ARGUMENT: cache})
    for layer, emptied in zip(cache.layers, with_memory_reset(cache).layers, strict=True):
        assert all(tensor.any() for tensor in layer.state.tensors().values())
        for name, tensor in emptied.state.tensors().items():
            if name.endswith(("key", "value", "length")):
                assert torch.equal(tensor, layer.state.tensors()[name])
            else:
                assert not tensor.any()
