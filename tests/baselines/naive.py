"""A Llama decoder written out, segment by segment, for attention that a test writes out query by query.

It shares weights with the model under test and nothing else: no cache, no mask, no attention of the package.
Positions count from a text's start; in the package they do not, and only distances may matter.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Attend = Callable[[int, int, Tensor, dict[str, Tensor]], Tensor]
"""From layer, segment's start, inputs of the segment (tokens, width) and weights to heads' outputs."""


def decoder(model: Any, tokens: Tensor, attend: Attend) -> Tensor:
    """Last hidden states (length, hidden_size) of one row; each segment passes all layers before the next."""
    decoder, size = model.model, model.config.segment_length
    outputs = []
    for start in range(0, len(tokens), size):
        hidden = decoder.embed_tokens.weight[tokens[start : start + size]]
        for number, layer in enumerate(decoder.layers):
            inputs = norm(hidden, layer.input_layernorm)
            attention = layer.self_attn
            weights = {name: getattr(attention, f"{name}_proj").weight for name in "qkvo"}
            hidden = hidden + attend(number, start, inputs, weights) @ weights["o"].T
            inputs, mlp = norm(hidden, layer.post_attention_layernorm), layer.mlp
            gate = torch.nn.functional.silu(inputs @ mlp.gate_proj.weight.T)
            hidden = hidden + (gate * (inputs @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        outputs.append(norm(hidden, decoder.norm))
    return torch.cat(outputs)


def norm(x: Tensor, module: Any) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight


def heads(x: Tensor, weight: Tensor, count: int, group: int = 1) -> Tensor:
    """(heads, tokens, head_dim), each of `count` heads `group` times."""
    return (x @ weight.T).unflatten(-1, (count, -1)).transpose(0, 1).repeat_interleave(group, dim=0)


def rotated(x: Tensor, positions: range, theta: float = 10_000.0) -> Tensor:
    """(heads, tokens, head_dim) turned by RoPE: entries i and i + d / 2 by position * theta^(-2i / d)."""
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.tensor(list(positions), dtype=x.dtype)[:, None] * speeds
    first, second = x.split(half, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, dim=-1)


def attention(query: Tensor, key: Tensor, value: Tensor, start: int) -> list[list[Tensor]]:
    """By head and query what softmax attention gives; queries are the last tokens, the first at `start`."""
    kept = key.shape[1] - query.shape[1]
    query = rotated(query, range(start, start + query.shape[1]))
    key = rotated(key, range(start - kept, start + query.shape[1]))
    return [
        [
            softmax_mean(keys[: kept + i + 1] @ each / math.sqrt(len(each)), values[: kept + i + 1])
            for i, each in enumerate(queries)
        ]
        for queries, keys, values in zip(query, key, value, strict=True)
    ]


def softmax_mean(scores: Tensor, values: Tensor) -> Tensor:
    """The mean of values (tokens, dim), weighed by the softmax of scores (tokens,)."""
    return torch.softmax(scores, dim=0) @ values


def assert_same(model: Any, found: Tensor, expected: Tensor) -> None:
    """Two ways to the same last hidden states, and to the same gradients of all the decoder's parameters."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    pull, learned = torch.randn(expected.shape, dtype=expected.dtype), list(model.model.parameters())
    gradients = [torch.autograd.grad((x * pull).sum(), learned) for x in (found, expected)]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
