"""Memorizing Transformers against their equations: an exact lookup, a gate, no gradient into the memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infini_attention.baselines import memorizing
from infini_attention.baselines.memorizing import lookup
from infini_attention.models import memory_off
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.training.parameters import parameter_groups

from . import naive
from .cases import OWN, SEGMENT, SIZES, make_baseline, make_tokens

LENGTH = 45  # five whole segments and a piece; the memory holds 20 tokens
WIDTH, HEADS, KV_HEADS = SIZES["head_dim"], SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
GROUP = HEADS // KV_HEADS


def written_out(model: Any, tokens: Tensor) -> Tensor:
    """Section 3.1 of arXiv 2203.08913, query by query, sorting all that the memory holds."""
    config = model.config
    before: dict[int, Tensor] = {}
    memory: list[Tensor] = []  # the inputs of earlier tokens to the layer with the memory

    def attend(layer: int, start: int, inputs: Tensor, weights: dict[str, Tensor]) -> Tensor:
        kept = before.get(layer, inputs[:0]) if config.local_cache else inputs[:0]
        both = torch.cat([kept.detach(), inputs])
        before[layer] = inputs
        query = naive.heads(inputs, weights["q"], HEADS)
        key, value = (naive.heads(both, weights[name], KV_HEADS, GROUP) for name in "kv")
        outputs = naive.attention(query, key, value, start)
        if layer == config.memory_layer:
            if memory:
                stored = torch.stack(memory[-config.memory_size :])
                outputs = [
                    [with_memory(head, query[head, i], stored, weights, local) for i, local in enumerate(row)]
                    for head, row in enumerate(outputs)
                ]
            memory.extend(inputs)
        return torch.stack([torch.cat(row) for row in zip(*outputs, strict=True)])

    def with_memory(
        head: int, query: Tensor, stored: Tensor, weights: dict[str, Tensor], local: Tensor
    ) -> Tensor:
        keys, values = (naive.heads(stored, weights[name], KV_HEADS, GROUP)[head].detach() for name in "kv")
        query, keys = query / query.norm(), keys / keys.norm(dim=-1, keepdim=True)
        similar = [(query @ key).item() for key in keys]
        nearest = sorted(range(len(keys)), key=similar.__getitem__)[-config.neighbors :]
        attention = model.model.layers[config.memory_layer].self_attn
        scores = attention.lookup_scale.factors[head] * keys[nearest] @ query
        gate = attention.memory_gate.logits[head].double().sigmoid()
        return gate * naive.softmax_mean(scores, values[nearest]) + (1 - gate) * local

    return naive.decoder(model, tokens, attend)


@pytest.mark.parametrize(
    "settings", [{}, {"local_cache": False}, {"memory_layer": 2, "neighbors": 99}], ids=str
)
def test_it_is_the_papers_equations_and_so_are_its_gradients(settings: dict[str, Any]) -> None:
    model, tokens = make_baseline("memorizing", **settings).double(), make_tokens(1, LENGTH)
    naive.assert_same(model, model.model(tokens).last_hidden_state[0], written_out(model, tokens[0]))


@torch.no_grad()
def test_a_shut_gate_leaves_the_local_context_alone() -> None:
    tokens = make_tokens(1, LENGTH)
    found = []
    for local_cache in (True, False):
        model = make_baseline("memorizing", local_cache=local_cache)
        with memory_off(model):
            found.append(model(tokens).logits)
    others = [make_baseline(name) for name in ("transformer_xl", "full")]
    for other in others:
        other.load_state_dict(model.state_dict(), strict=False)
    cached, segment = others
    alone = torch.cat([segment(part).logits for part in tokens.split(SEGMENT, dim=1)], dim=1)
    torch.testing.assert_close(found[0], cached(tokens).logits)
    torch.testing.assert_close(found[1], alone, rtol=1e-4, atol=1e-4)


def test_no_gradient_flows_into_the_memory_but_the_query_and_the_gate_learn() -> None:
    model = make_baseline("memorizing", local_cache=False)
    embeddings = model.get_input_embeddings()(make_tokens(1, 3 * SEGMENT)).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, 2 * SEGMENT :].square().sum().backward()
    touched = embeddings.grad[0].abs().amax(dim=-1) > 0
    assert not touched[: 2 * SEGMENT].any() and touched[2 * SEGMENT :].all()
    attention = model.model.layers[1].self_attn
    assert attention.memory_gate.logits.grad.all() and attention.lookup_scale.factors.grad.all()


@torch.no_grad()
def test_the_oldest_pairs_are_dropped() -> None:
    """A token that is beyond the memory and all caches changes nothing any more."""
    model, tokens = make_baseline("memorizing", memory_layer=0), make_tokens(1, 9 * SEGMENT)
    changed = tokens.clone()
    changed[:, 0] = 3 + (tokens[:, 0] - 2) % 61
    moved = (model(changed).logits - model(tokens).logits).abs().amax(dim=-1)[0].view(9, SEGMENT).amax(dim=1)
    # The memory's 20 tokens reach into the third segment before, and two more layers two further.
    assert moved[3] > 0 and (moved[6:] == 0).all()
    cache = model(tokens, use_cache=True)[CACHE_ARGUMENT]
    assert cache.layers[0].state.memory_key.shape[2] == OWN["memorizing"]["memory_size"]


def test_the_layer_with_the_memory_is_the_ninth_of_twelve() -> None:
    layers = {12: 8, 24: 17, 4: 2, 3: 1, 2: 0, 1: 0}
    for count, layer in layers.items():
        config = make_baseline("memorizing", num_hidden_layers=count).config
        assert config.memory_layer == layer
    assert make_baseline("memorizing", memory_layer=2).config.memory_layer == 2


def by_sorting(query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """What a lookup of four neighbours is to find."""
    keys, values = (x.repeat_interleave(GROUP, dim=1) for x in (key, value))
    scores = torch.nn.functional.normalize(query, dim=-1) @ keys.transpose(-1, -2)
    least = scores.sort(dim=-1, descending=True).values[..., :4][..., -1:]
    shut = (scores * scale[:, None, None]).masked_fill(scores < least, -torch.inf)
    return shut.softmax(dim=-1) @ values


@pytest.mark.parametrize("at_once", [1, 150, 10**9])
def test_the_lookup_is_exact_whatever_is_compared_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(memorizing, "SCORES_AT_ONCE", at_once)
    torch.manual_seed(0)
    query = torch.randn(2, HEADS, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    key = torch.nn.functional.normalize(torch.randn(2, KV_HEADS, 17, WIDTH, dtype=torch.float64), dim=-1)
    value = torch.randn(2, KV_HEADS, 17, 6, dtype=torch.float64)
    scale = torch.rand(HEADS, dtype=torch.float64, requires_grad=True)

    expected = by_sorting(query, key, value, scale)
    found = lookup(query, key, value, scale, neighbors=4)
    torch.testing.assert_close(found, expected)
    for ours, wanted in zip(
        torch.autograd.grad(found.square().sum(), (query, scale)),
        torch.autograd.grad(expected.square().sum(), (query, scale)),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("pairs", [17, 300])
def test_a_row_looks_up_its_latest_pairs_alone(pairs: int) -> None:
    torch.manual_seed(0)
    latest = torch.tensor([pairs, pairs // 2, 3, 1, 0])
    query = torch.randn(5, HEADS, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    key = torch.nn.functional.normalize(torch.randn(5, KV_HEADS, pairs, WIDTH, dtype=torch.float64), dim=-1)
    value = torch.randn(5, KV_HEADS, pairs, 6, dtype=torch.float64)
    scale = torch.rand(HEADS, dtype=torch.float64)
    found = lookup(query, key, value, scale, neighbors=4, latest=latest)
    for row, count in enumerate([pairs, pairs // 2, 3, 1, 1]):
        own = (x[row : row + 1, :, -count:] for x in (key, value))
        expected = by_sorting(query[row : row + 1], *own, scale)
        torch.testing.assert_close(found[row : row + 1], expected)
        gradients = [
            torch.autograd.grad(each.square().sum(), query, retain_graph=True)[0][row]
            for each in (found[row], expected)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pairs", [5, 96, 97, 128, 1000])
def test_the_largest_of_the_best_blocks_are_the_largest_of_all(pairs: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 7, pairs)
    scores[0, :, -3:] += 9  # the last block is filled up, unless pairs are 96 or 128
    scores[1, 0] = 1.0  # all alike
    places = memorizing.largest(scores, 3)
    assert (places >= 0).all() and (places < pairs).all()
    assert all(len(row.unique()) == 3 for row in places.flatten(0, 1))
    found = scores.gather(-1, places).sort(dim=-1).values
    assert torch.equal(found, scores.sort(dim=-1).values[..., -3:])


def test_the_lookup_keeps_no_scores_for_the_backward_pass() -> None:
    query, key, value = (torch.randn(1, 1, n, 8, requires_grad=n == 64) for n in (64, 4096, 4096))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        lookup(query, key, value, torch.ones(1), neighbors=4)
    assert max(kept) <= 4096 * 8  # the keys themselves; scores would be 64 x 4096


@torch.no_grad()
def test_near_keys_are_told_apart_under_autocast() -> None:
    key = torch.nn.functional.normalize(torch.tensor([[1.0, 0.010], [1.0, 0.011], [1.0, 0.012]]), dim=-1)
    value = torch.eye(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = lookup(
            torch.tensor([[[[1.0, 0.5]]]]), key[None, None], value[None, None], torch.ones(1), neighbors=1
        )
    assert torch.equal(found[0, 0, 0], value[2])


def test_the_scale_of_the_lookup_learns_at_the_rate_of_the_gates() -> None:
    rates = {"learning_rate": 1e-3, "weight_decay": 0.1, "gate_learning_rate": 1e-2}
    groups = {group["name"]: group for group in parameter_groups(make_baseline("memorizing"), **rates)}
    assert len(groups["gates"]["params"]) == 2  # the gates and the factors of one layer
    assert (groups["gates"]["lr"], groups["gates"]["weight_decay"]) == (1e-2, 0.0)
