"""Linear attention against the paper's equations, a token at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infini_attention.baselines import linear_attention as module
from infini_attention.baselines.linear_attention import linear_attention
from infini_attention.baselines.systems import system_name
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.ops import feature_maps

from . import naive
from .cases import SIZES, make_baseline, make_tokens

HEADS, KV_HEADS = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
LENGTH = 30


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """(tokens, channels) as mixtures of each token and those before it."""
    return torch.stack(
        [
            sum(weight[:, back] * x[token - back] for back in range(min(weight.shape[1], token + 1)))
            for token in range(len(x))
        ]
    )


def written_out(model: Any, tokens: Tensor) -> Tensor:
    """Equations (10) to (12) of arXiv 2006.16236, a token at a time."""
    sigma = feature_maps.get(model.config.feature_map)

    def attend(layer: int, start: int, inputs: Tensor, weights: dict[str, Tensor]) -> Tensor:
        both = torch.cat([inputs @ weights["q"].T, inputs @ weights["k"].T], dim=-1)
        if model.config.short_convolution:
            both = convolved(both, model.model.layers[layer].self_attn.short_convolution.weight)
        query, key = both.split([len(weights["q"]), len(weights["k"])], dim=-1)
        query, key = (x.unflatten(-1, (-1, SIZES["head_dim"])).transpose(0, 1) for x in (query, key))
        key = key.repeat_interleave(HEADS // KV_HEADS, dim=0)
        value = naive.heads(inputs, weights["v"], KV_HEADS, HEADS // KV_HEADS)
        outputs = []
        for queries, keys, values in zip(sigma(query), sigma(key), value, strict=True):
            memory, normalizer, answers = 0.0, 0.0, []
            for q, k, v in zip(queries, keys, values, strict=True):
                memory, normalizer = memory + torch.outer(k, v), normalizer + k
                answers.append(q @ memory / (q @ normalizer))
            outputs.append(torch.stack(answers))
        return torch.cat(outputs, dim=-1)

    return naive.decoder(model, tokens, attend)


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("fields", [{}, {"feature_map": "exp", "short_convolution": 3}], ids=str)
def test_it_is_the_papers_equations_and_so_are_its_gradients(
    fields: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = make_baseline("linear_attention", segment_length=LENGTH, **fields).double()
    tokens = make_tokens(1, LENGTH)
    naive.assert_same(model, model.model(tokens).last_hidden_state[0], written_out(model, tokens[0]))


def test_gradients_of_everything_that_goes_in_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 3)
    shapes = (1, 4, 7, 5), (1, 2, 7, 5), (1, 2, 7, 3), (1, 2, 5, 4)
    inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(linear_attention, inputs)


@torch.no_grad()
def test_where_nothing_is_found_it_answers_zero() -> None:
    query, key, value = torch.zeros(1, 1, 5, 4), torch.rand(1, 1, 5, 4), torch.rand(1, 1, 5, 4)
    output, sums = linear_attention(query, key, value, torch.zeros(1, 1, 4, 5))
    assert (output == 0).all()
    torch.testing.assert_close(sums[0, 0, :, -1], key[0, 0].sum(dim=0))


@pytest.mark.parametrize("size", [1, 5, 11, LENGTH])
@torch.no_grad()
def test_a_text_in_pieces_is_one_text_with_a_short_convolution_too(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(module, "PIECE", 13)
    model = make_baseline("linear_attention", short_convolution=4, feature_map="dpfp").double()
    tokens, cache = make_tokens(2, LENGTH), model.model.cache_class(model.config)
    logits, sizes = [], set()
    for piece in tokens.split(size, dim=1):
        logits.append(model(piece, **{CACHE_ARGUMENT: cache}).logits)
        sizes.add(cache.nbytes)
    monkeypatch.setattr(module, "PIECE", LENGTH)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens, use_cache=False).logits)
    recent = 3 * (HEADS + KV_HEADS) * SIZES["head_dim"] * SIZES["num_hidden_layers"]
    assert sizes == {2 * 8 * (model.config.memory_floats(LENGTH) + recent)}


@torch.no_grad()
def test_sums_are_fp32_in_a_narrow_model_and_under_autocast() -> None:
    model = make_baseline("linear_attention")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(make_tokens(1, LENGTH), use_cache=True)[CACHE_ARGUMENT]
    narrow = model.to(torch.bfloat16)(make_tokens(1, LENGTH), use_cache=True)[CACHE_ARGUMENT]
    assert {layer.state.sums.dtype for cache in (mixed, narrow) for layer in cache.layers} == {torch.float32}


def test_it_is_named_by_what_it_is() -> None:
    names = [
        system_name(make_baseline("linear_attention", **fields))
        for fields in ({}, {"feature_map": "exp", "short_convolution": 4})
    ]
    assert names == ["linear attention", "linear attention, exp, convolution of 4"]
