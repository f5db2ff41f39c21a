"""What holds for every baseline: the arguments, the cache and the folders of `infini_*` models."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from infini_attention.baselines import BASELINES
from infini_attention.models import InfiniCache, load_model
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.loss import IGNORED

from .cases import OWN, SEGMENT, SIZES, make_baseline, make_tokens

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LENGTH = 45  # five whole segments and a piece; more than the memorizing one's memory holds


def feed(model: Any, tokens: Tensor, lengths: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of `tokens` fed in pieces, and the cache after them."""
    cache = model.model.cache_class(model.config) if cache is None else cache
    logits = [model(part, **{CACHE_ARGUMENT: cache}).logits for part in tokens.split(lengths, dim=1)]
    return torch.cat(logits, dim=1), cache


def gradients(model: Any, tokens: Tensor, **arguments: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False, **arguments).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_parameters_are_the_familys_and_those_of_the_system(model: Any) -> None:
    plain = {name for name, _ in LlamaForCausalLM(LlamaForCausalLM.config_class(**SIZES)).named_parameters()}
    own = {name for name, _ in model.named_parameters()} - plain
    assert own == {
        "MemorizingLlamaForCausalLM": {
            "model.layers.1.self_attn.memory_gate.logits",
            "model.layers.1.self_attn.lookup_scale.factors",
        },
        "RecurrentMemoryLlamaForCausalLM": {"model.first_memory.vectors"},
    }.get(type(model).__name__, set())
    assert plain <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", BASELINES)
@given(data=st.data())
@settings(max_examples=8)
@torch.no_grad()
def test_any_chunking_equals_one_call(name: str, data: st.DataObject) -> None:
    model, tokens = make_baseline(name), make_tokens(2, LENGTH)
    lengths: list[int] = []
    while sum(lengths) < LENGTH:
        lengths.append(data.draw(st.integers(1, LENGTH - sum(lengths))))
    logits, cache = feed(model, tokens, lengths)
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, **TOLERANCE)
    assert cache.get_seq_length() == LENGTH


@torch.no_grad()
def test_one_by_one_equals_one_call(model: Any) -> None:
    tokens = make_tokens(2, LENGTH)
    logits, _ = feed(model, tokens, [1] * LENGTH)
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, **TOLERANCE)


@torch.no_grad()
def test_rows_know_nothing_of_each_other(model: Any) -> None:
    tokens = make_tokens(3, LENGTH)
    together = model(tokens).logits
    for row, logits in zip(tokens, together, strict=True):
        torch.testing.assert_close(model(row[None]).logits[0], logits, **TOLERANCE)


@torch.no_grad()
def test_no_token_sees_a_later_one(model: Any) -> None:
    tokens = make_tokens(1, LENGTH)
    changed = tokens.clone()
    changed[:, 20:] = make_tokens(1, LENGTH - 20, seed=9)
    torch.testing.assert_close(model(changed).logits[:, :20], model(tokens).logits[:, :20], **TOLERANCE)


@pytest.mark.parametrize("name", ["full", "sliding_window", "transformer_xl", "memorizing"])
@torch.no_grad()
def test_the_first_segment_is_plain_causal_attention(name: str) -> None:
    model, tokens = make_baseline(name), make_tokens(2, SEGMENT)
    plain = LlamaForCausalLM(LlamaForCausalLM.config_class(**SIZES)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


@torch.no_grad()
def test_the_cache_stops_growing(segmented: Any) -> None:
    cache = segmented.model.cache_class(segmented.config)
    assert cache.nbytes == 0
    sizes = []
    for seed in range(9):
        feed(segmented, make_tokens(1, SEGMENT - 3, seed=seed), [SEGMENT - 3], cache)
        feed(segmented, make_tokens(1, 3, seed=seed), [3], cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes[3:])) == 1


@torch.no_grad()
def test_the_cache_is_made_when_wanted_and_none_is_given(model: Any) -> None:
    made = model(make_tokens(1, 9), use_cache=True)[CACHE_ARGUMENT]
    assert type(made) is model.model.cache_class and isinstance(made, InfiniCache)
    assert CACHE_ARGUMENT not in model(make_tokens(1, 9), use_cache=False)


@torch.no_grad()
def test_rows_of_the_cache_can_be_selected_repeated_and_reordered(model: Any) -> None:
    tokens, more = make_tokens(3, 20), make_tokens(3, 5, seed=7)
    rows = torch.tensor([2, 0, 0])
    changes = {
        "reorder_cache": (rows, rows),
        "batch_select_indices": (rows, rows),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
    }
    for method, (argument, selected) in changes.items():
        cache = feed(model, tokens, [20])[1]
        getattr(cache, method)(argument)
        continued = feed(model, more[selected], [5], cache)[0]
        whole = torch.cat([tokens, more], dim=1)[selected]
        torch.testing.assert_close(continued, model(whole, use_cache=False).logits[:, 20:], **TOLERANCE)


@torch.no_grad()
def test_copies_of_the_cache_go_their_own_way(model: Any) -> None:
    tokens, more = make_tokens(1, 20), make_tokens(1, 5, seed=3)
    cache = feed(model, tokens, [20])[1]
    expected = feed(model, more, [5], copy.deepcopy(cache))[0]
    for branch in (cache.copy(), copy.deepcopy(cache), cache.copy().to("cpu")):
        feed(model, make_tokens(1, 9, seed=4), [9], branch)
    assert torch.equal(feed(model, more, [5], cache)[0], expected)


@torch.no_grad()
def test_a_reset_cache_is_a_new_one(segmented: Any) -> None:
    tokens = make_tokens(2, 20)
    first, cache = feed(segmented, tokens, [20])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert torch.equal(feed(segmented, tokens, [20], cache)[0], first)


@torch.no_grad()
def test_tokens_cannot_be_taken_back(segmented: Any) -> None:
    cache = feed(segmented, make_tokens(1, 20), [20])[1]
    with pytest.raises(ValueError, match=r"crop\(\) cannot take tokens back"):
        cache.crop(-1)


@torch.no_grad()
def test_generating_equals_the_argmax_of_uncached_forwards(model: Any) -> None:
    tokens = make_tokens(2, 13)
    chosen = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), **chosen)
    for _ in range(14):
        following = model(tokens, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    assert torch.equal(generated, tokens)


def test_losses_without_logits_are_those_of_the_logits(model: Any) -> None:
    tokens, wanted = make_tokens(2, LENGTH), make_tokens(2, LENGTH, seed=5)
    wanted[:, ::3] = wanted[:, -1] = IGNORED
    found = []
    for arguments in ({"labels": wanted.roll(1, dims=1)}, {"shift_labels": wanted, "loss_chunk": 7}):
        model.zero_grad()
        loss = model(tokens, use_cache=False, **arguments).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, others in zip(*found, strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-6)


def test_gradients_reach_every_parameter(model: Any) -> None:
    found = gradients(model.train(), make_tokens(2, LENGTH))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_are_the_same_where_segments_are_checkpointed(segmented: Any, count: int) -> None:
    tokens = make_tokens(2, LENGTH)
    plain = gradients(segmented.train(), tokens)
    for name, gradient in gradients(segmented, tokens, checkpoint_segments=count, loss_chunk=16).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


def test_a_model_in_fp32_trains_under_autocast(model: Any) -> None:
    tokens = make_tokens(2, LENGTH)
    plain = gradients(model.train(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model, tokens)
    for name, gradient in mixed.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.8


@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(model: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    tokens = make_tokens(2, LENGTH)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(again) is type(model)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    own = {"segment_length": SEGMENT, **OWN.get(model.config.model_type.removesuffix("_llama"), {})}
    saved = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(saved, name) for name in own} == own
    decoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(decoder(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


@torch.no_grad()
def test_a_model_in_bfloat16_computes_in_bfloat16(model: Any, tmp_path: Any) -> None:
    tokens = make_tokens(2, LENGTH)
    logits = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    narrow = loaded(tokens).logits
    assert narrow.dtype == torch.bfloat16
    assert torch.cosine_similarity(narrow.float(), logits, dim=-1).mean() > 0.95
    gates = [p for name, p in loaded.named_parameters() if name.endswith("memory_gate.logits")]
    assert all(gate.dtype == torch.float32 for gate in gates)


def test_what_it_cannot_do_is_refused_in_words(segmented: Any) -> None:
    tokens = make_tokens(2, 20)
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": padded}, "attention_mask marks padding.*give rows without"),
        ({"attention_mask": padded[:, 1:]}, r"attention_mask is \(2, 19\)"),
        ({"position_ids": torch.arange(20)[None] % 12}, "documents are packed.*one document a row"),
        ({"segment_weights": torch.ones(2, 3)}, "segment_weights is set.*leave it out"),
        ({"stop_gradient": True}, "stop_gradient is set.*leave it out"),
        ({"context_group": "group"}, "context_group is set"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"checkpoint_segments": 0}, "checkpoint_segments is 0"),
        ({CACHE_ARGUMENT: DynamicCache()}, "the cache is a DynamicCache; pass"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            segmented(tokens, **arguments)
    with pytest.raises(ValueError, match=r"does not support \w+ checkpointing"):
        segmented.gradient_checkpointing_enable()
    segmented.config.attention_dropout = 0.1
    segmented(tokens)
    with pytest.raises(ValueError, match=r"attention_dropout is 0.1.*= 0.0 to train"):
        segmented.train()(tokens)


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    [
        ("sliding_window", "window", 0, "window is 0; give a whole number of at least 1"),
        ("memorizing", "stop_gradient", False, "stop_gradient is False, and no gradient flows into this"),
        ("sliding_window", "sinks", -1, "sinks is -1, and window 11; give from 0 to 10 sinks"),
        ("sliding_window", "sinks", 11, "sinks is 11, and window 11; give from 0 to 10 sinks"),
        ("sliding_window", "window", 4096, "window is 4096, more than .* max_position_embeddings, 2048"),
        ("transformer_xl", "segment_length", 0, "segment_length is 0; give a whole number of at least 1"),
        ("memorizing", "memory_size", 0, "memory_size is 0"),
        ("memorizing", "neighbors", -1, "neighbors is -1"),
        ("memorizing", "memory_layer", 3, "memory_layer is 3; give one from 0 to 2"),
        ("memorizing", "gate_init", float("nan"), "gate_init is nan"),
        ("linear_attention", "feature_map", "relu", "feature_map 'relu' is not registered; choose one of"),
        (
            "linear_attention",
            "short_convolution",
            1,
            "short_convolution is 1; give 0 for none",
        ),
        ("recurrent_memory", "memory_tokens", 0, "memory_tokens is 0"),
    ],
)
def test_fields_that_cannot_be_right_are_named(name: str, field: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_baseline(name, **{field: value})
