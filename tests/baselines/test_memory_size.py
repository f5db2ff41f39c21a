"""Sizes of memories are those of the paper's tables, and those that caches have."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention import InfiniLlamaConfig, InfiniLlamaForCausalLM
from infini_attention.baselines import BASELINES, compression, memory_floats
from infini_attention.models.compat import CACHE_ARGUMENT

from .cases import SEGMENT, SIZES, make_baseline, make_tokens

LENGTH = 100_000
PAPER = {  # 12 layers, 8 heads of 128, N = 2048: section 3.1 of arXiv 2404.07143
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "segment_length": 2048,
}


def config(name: str, **fields: Any) -> Any:
    return BASELINES[name][LlamaForCausalLM].config_class(**PAPER | fields)


def test_sizes_follow_the_formulas_of_table_1() -> None:
    d_key = d_value = 128
    H, l, N, S, p, d_model = 8, 12, 2048, 32, 100, 1024  # noqa: E741
    sizes = {
        "transformer_xl": (d_key + d_value) * H * N * l,
        "memorizing": (d_key + d_value) * H * N * S,
        "recurrent_memory": d_model * p * l * 2,
        "linear_attention": d_key * (d_value + 1) * H * l,
        "full": (d_key + d_value) * H * LENGTH * l,
    }
    settings = {"memorizing": {"local_cache": False, "memory_size": N * S}}
    for name, size in sizes.items():
        assert memory_floats(config(name, **settings.get(name, {})), LENGTH) == size
    assert memory_floats(InfiniLlamaConfig(**PAPER), LENGTH) == d_key * (d_value + 1) * H * l == 1_585_152


def test_what_is_seen_outside_a_segment_is_held_too() -> None:
    plain, sink, sliding = (
        memory_floats(InfiniLlamaConfig(**PAPER, local_attention=name), LENGTH)
        for name in ("segment", "sink", "sliding")
    )
    assert sink - plain == (128 + 128) * 8 * 12 * 4
    assert sliding - plain == (128 + 128) * 8 * 12 * 2048 + plain  # M and z with the segment and without it


def test_sizes_and_ratios_are_those_printed_in_table_2() -> None:
    # The paper's 65K are 65,000 pairs, beside the caches of all layers; its ratios are of rounded sizes.
    memorizing = memory_floats(config("memorizing", memory_size=65_000), LENGTH)
    millions = {
        "transformer_xl": memory_floats(config("transformer_xl"), LENGTH) / 1e6,
        "recurrent_memory": memory_floats(config("recurrent_memory"), LENGTH) / 1e6,
        "infini": memory_floats(InfiniLlamaConfig(**PAPER), LENGTH) / 1e6,
    }
    assert round(memorizing / 1e6) == 183
    assert {name: round(size, 1) for name, size in millions.items()} == {
        "transformer_xl": 50.3,
        "recurrent_memory": 2.5,
        "infini": 1.6,
    }
    ratios = {name: 183 / round(size, 1) for name, size in millions.items()}
    assert round(ratios["recurrent_memory"]) == 73 and round(ratios["infini"]) == 114
    assert round(183 / 50, 1) == 3.7


def test_compression_is_against_a_full_memorizing_transformer() -> None:
    assert compression(config("memorizing"), LENGTH) == 1
    assert compression(config("transformer_xl"), LENGTH) == pytest.approx(3.67, abs=0.01)
    assert compression(config("recurrent_memory"), LENGTH) == pytest.approx(75.1, abs=0.1)
    assert compression(InfiniLlamaConfig(**PAPER), LENGTH) == pytest.approx(116.4, abs=0.1)
    assert compression(config("full"), LENGTH) < 0.1
    assert compression(config("transformer_xl"), 100) == math.inf


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("length", [5, SEGMENT, 2 * SEGMENT, 45])
@torch.no_grad()
def test_sizes_are_those_of_the_caches(name: str, length: int) -> None:
    model = make_baseline(name)
    cache = model(make_tokens(1, length), use_cache=True)[CACHE_ARGUMENT]
    per_token = 2 * SIZES["num_key_value_heads"] * SIZES["head_dim"] * SIZES["num_hidden_layers"]
    open_tokens = 0 if name in ("full", "sliding_window", "linear_attention") else length % SEGMENT
    held = cache.nbytes // 4 - per_token * open_tokens
    if name == "recurrent_memory":
        vectors = model.config.memory_tokens * SIZES["hidden_size"]
        reads = memory_floats(model.config, length) if open_tokens else 0  # between segments vectors are all
        assert held == reads + (vectors if length >= SEGMENT else 0)
    else:
        assert held == memory_floats(model.config, length)


@torch.no_grad()
def test_layers_without_memory_of_our_own_models_count() -> None:
    fields = SIZES | {"segment_length": SEGMENT, "infini_layers": [1]}
    model = InfiniLlamaForCausalLM(InfiniLlamaConfig(**fields)).eval()
    cache = model(make_tokens(1, 2 * SEGMENT), use_cache=True)[CACHE_ARGUMENT]
    state = cache.layers[1].state
    ordinary = sum(
        x.numel() for layer in (0, 2) for x in (cache.layers[layer].keys, cache.layers[layer].values)
    )
    held = state.memory.numel() + state.normalizer.numel() + ordinary
    assert memory_floats(model.config, 2 * SEGMENT) == held


def test_other_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="LlamaConfig is no config of an infini"):
        memory_floats(LlamaConfig(), 8)


@pytest.mark.parametrize("name", BASELINES)
def test_keys_that_a_token_sees_are_counted(name: str) -> None:
    model, length = make_baseline(name), 45
    for layer in range(3):
        seen = 0.0
        for token in range(length):
            start = token // SEGMENT * SEGMENT
            stored = min(start, 20) if layer == 1 else 0
            seen += {
                "full": token + 0.5,
                "sliding_window": min(token, 10) + 0.5,
                "transformer_xl": token - start + 0.5 + (SEGMENT if start else 0),
                "linear_attention": length / 2 + SIZES["head_dim"],  # one chunk, and a key for each feature
                "recurrent_memory": token - start + 0.5 + 3,
                "memorizing": token - start + 0.5 + (SEGMENT if start else 0) + stored / 2 + min(stored, 3),
            }[name]
        assert model.config.keys_seen(layer, length) == pytest.approx(seen / length)
