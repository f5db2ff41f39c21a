import copy
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, DynamicCache, LlamaConfig

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.families import gemma3, mistral

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def feed(model, tokens, lengths, cache=None, **kwargs):
    """Logits of `tokens` fed in pieces, and the cache after them."""
    cache = InfiniCache(model.config) if cache is None else cache
    logits = [
        model(part, **{CACHE_ARGUMENT: cache}, **kwargs).logits for part in tokens.split(lengths, dim=1)
    ]
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("lengths", [[1] * 30, [3, 8, 1, 13, 5], [7, 23]], ids=["one by one", "mixed", "two"])
@torch.no_grad()
def test_any_chunking_equals_one_pass(model, make_tokens, lengths):
    tokens = make_tokens(2, 30)
    logits, cache = feed(model, tokens, lengths)
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, **TOLERANCE)
    assert cache.get_seq_length() == 30


@pytest.mark.parametrize("layers", [[0], [1]])
@torch.no_grad()
def test_any_chunking_equals_one_pass_beside_ordinary_layers(base, make_model, make_tokens, layers):
    model, tokens = make_model(base, layers=layers), make_tokens(2, 30)
    expected = model(tokens, use_cache=False).logits
    for lengths in ([1] * 30, [3, 8, 1, 13, 5]):
        torch.testing.assert_close(feed(model, tokens, lengths)[0], expected, **TOLERANCE)


@torch.no_grad()
def test_any_chunking_equals_one_pass_with_short_sliding_windows(make_base, make_model, make_tokens):
    model = make_model(make_base(gemma3.Gemma3ForCausalLM, sliding_window=4))
    assert model.config.infini_layers == [1]
    tokens = make_tokens(2, 30)
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(feed(model, tokens, [3, 8, 1, 13, 5])[0], expected, **TOLERANCE)


@torch.no_grad()
def test_the_cache_is_made_when_wanted_and_none_is_given(llama, make_tokens):
    assert isinstance(llama(make_tokens(1, 9), use_cache=True)[CACHE_ARGUMENT], InfiniCache)
    assert CACHE_ARGUMENT not in llama(make_tokens(1, 9), use_cache=False)


@torch.no_grad()
def test_the_cache_does_not_grow_with_length(model, make_tokens):
    sizes = []
    cache = InfiniCache(model.config)
    assert cache.nbytes == 0
    for seed in range(6):
        feed(model, make_tokens(1, 24, seed=seed), [24], cache)
        sizes.append(cache.nbytes)
    assert all(before == after for before, after in pairwise(sizes))


@torch.no_grad()
def test_no_mask_is_built_for_layers_with_a_memory(base, model, make_tokens):
    base.set_attn_implementation("eager")
    seen = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"].numel()), with_kwargs=True
        )
    feed(model, make_tokens(2, 30), [20, 10])
    assert seen == [0] * 4


@torch.no_grad()
def test_no_mask_of_full_attention_is_built_when_only_sliding_layers_are_ordinary(
    make_base, make_model, make_tokens
):
    model = make_model(make_base(gemma3.Gemma3ForCausalLM, sliding_window=4))
    masks = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: masks.update({index: kwargs["attention_mask"]}),
            with_kwargs=True,
        )
    feed(model, make_tokens(1, 30), [20, 10])
    assert masks[0].shape == (1, 1, 10, 13)  # three tokens of the window before the ten new ones
    assert masks[1] is None


@torch.no_grad()
def test_ordinary_layers_compute_what_the_base_computes_beyond_a_segment(base, make_model, make_tokens):
    model, tokens = make_model(base, layers=[1]), make_tokens(2, 30)
    outputs = []
    for each in (base, model):
        each.model.layers[0].register_forward_hook(lambda module, args, output: outputs.append(output))
        each(tokens, use_cache=False)
    assert torch.equal(*outputs)


@torch.no_grad()
def test_rows_can_be_selected_repeated_and_reordered(base, make_model, make_tokens):
    model = make_model(base, layers=[1])  # ordinary layers must follow as well
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
def test_a_reset_cache_is_a_new_one(model, make_tokens):
    tokens = make_tokens(2, 20)
    first, cache = feed(model, tokens, [20])
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert torch.equal(feed(model, tokens, [20], cache)[0], first)


@torch.no_grad()
def test_a_deep_copy_goes_its_own_way(llama, make_tokens):
    cache = feed(llama, make_tokens(1, 20), [20])[1]
    branch = copy.deepcopy(cache)
    expected = feed(llama, make_tokens(1, 5, seed=3), [5], copy.deepcopy(cache))[0]
    feed(llama, make_tokens(1, 9, seed=4), [9], branch)
    assert torch.equal(feed(llama, make_tokens(1, 5, seed=3), [5], cache)[0], expected)


@torch.no_grad()
def test_a_cache_cannot_be_cropped(llama, make_tokens):
    cache = feed(llama, make_tokens(1, 20), [20])[1]
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"crop\(\) cannot take tokens back.*deepcopy"):
        cache.crop(-1)


@torch.no_grad()
def test_other_caches_are_refused(llama, make_tokens):
    for cache in (DynamicCache(), DynamicCache(config=llama.config)):
        with pytest.raises(ValueError, match=r"DynamicCache.*pass InfiniCache\(model.config\)"):
            llama(make_tokens(1, 5), **{CACHE_ARGUMENT: cache})


@torch.no_grad()
def test_the_cache_of_a_model_with_other_layers_is_refused(llama, make_base, make_model, make_tokens):
    other = make_model(make_base(mistral.MistralForCausalLM), layers=[1])
    with pytest.raises(ValueError, match=r"memories in layers \[1\], the model in \[0, 1\]"):
        llama(make_tokens(1, 5), **{CACHE_ARGUMENT: InfiniCache(other.config)})


def test_a_cache_needs_the_config_of_a_model_with_memory():
    with pytest.raises(ValueError, match=r"given a LlamaConfig; give the config of an infini_\* model"):
        InfiniCache(LlamaConfig())
    assert len(InfiniCache(AutoConfig.for_model("infini_llama", num_hidden_layers=3))) == 3


def test_a_layer_with_memory_hands_out_no_keys(llama):
    with pytest.raises(ValueError, match="takes a state"):
        InfiniCache(llama.config).update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
