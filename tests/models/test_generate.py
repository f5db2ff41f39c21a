import pytest
import torch

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.families import gemma3

NEW = 14  # from 13 tokens across two cuts


def generate(model, tokens, **kwargs):
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens, **{"attention_mask": torch.ones_like(tokens), **settings, **kwargs})


def stepwise(model, tokens):
    """Greedy decoding with one uncached forward a token."""
    for _ in range(NEW):
        following = model(tokens, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


def left_padded(rows):
    width = max(len(row) for row in rows)
    tokens = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return tokens, mask


@torch.no_grad()
def test_greedy_decoding_equals_the_argmax_of_uncached_forwards(model, make_tokens):
    tokens = make_tokens(2, 13)
    assert torch.equal(generate(model, tokens), stepwise(model, tokens))


@pytest.mark.parametrize("layers", [[0], [1]])
@torch.no_grad()
def test_greedy_decoding_is_right_beside_ordinary_layers(base, make_model, make_tokens, layers):
    model, tokens = make_model(base, layers=layers), make_tokens(2, 13)
    assert torch.equal(generate(model, tokens), stepwise(model, tokens))


@torch.no_grad()
def test_a_left_padded_batch_generates_what_each_row_does_alone(model, make_tokens):
    rows = [make_tokens(length, seed=length) for length in (5, 19, 12)]
    tokens, mask = left_padded(rows)
    together = generate(model, tokens, attention_mask=mask)
    for row, output in zip(rows, together, strict=True):
        assert torch.equal(output[-len(row) - NEW :], generate(model, row[None])[0])


@torch.no_grad()
def test_a_left_padded_batch_is_right_beside_ordinary_layers(base, make_model, make_tokens):
    model = make_model(base, layers=[1])
    rows = [make_tokens(length, seed=length) for length in (5, 14)]
    tokens, mask = left_padded(rows)
    together = generate(model, tokens, attention_mask=mask, max_new_tokens=2)  # inside the window of 16
    for row, output in zip(rows, together, strict=True):
        assert torch.equal(output[-len(row) - 2 :], generate(model, row[None], max_new_tokens=2)[0])


@torch.no_grad()
def test_beam_search_keeps_each_beams_own_memory(base, make_model, make_tokens):
    tokens = make_tokens(2, 13)
    for layers in (None, [1]):
        model = make_model(base, layers=layers)
        cached, uncached = (generate(model, tokens, num_beams=3, use_cache=use) for use in (True, False))
        assert torch.equal(cached, uncached)


@torch.no_grad()
def test_sampling_several_sequences_draws_the_same_with_and_without_a_cache(model, make_tokens):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(
            generate(model, make_tokens(1, 13), do_sample=True, num_return_sequences=3, use_cache=use_cache)
        )
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("prefill_chunk_size", [1, 5, 8])
@torch.no_grad()
def test_prefilling_in_chunks_changes_nothing(model, make_tokens, prefill_chunk_size):
    tokens = make_tokens(2, 29)
    chunked = generate(model, tokens, prefill_chunk_size=prefill_chunk_size)
    assert torch.equal(chunked, generate(model, tokens))


@torch.no_grad()
def test_prefilling_a_left_padded_batch_in_chunks_changes_nothing(llama, make_tokens):
    tokens, mask = left_padded([make_tokens(5, seed=5), make_tokens(29, seed=29)])
    chunked = generate(llama, tokens, attention_mask=mask, prefill_chunk_size=6)
    assert torch.equal(chunked, generate(llama, tokens, attention_mask=mask))


@torch.no_grad()
def test_several_turns_with_a_kept_cache_equal_one_pass(base, make_model, make_tokens):
    for layers in (None, [0]):
        model = make_model(base, layers=layers)
        cache, tokens = InfiniCache(model.config), make_tokens(1, 0)
        for turn in range(3):
            tokens = torch.cat([tokens, make_tokens(1, 11, seed=turn)], dim=1)
            alone = generate(model, tokens, max_new_tokens=5)
            tokens = generate(model, tokens, max_new_tokens=5, **{CACHE_ARGUMENT: cache})
            assert torch.equal(tokens, alone)
        assert cache.get_seq_length() == tokens.shape[1] - 1


@torch.no_grad()
def test_short_sliding_windows_generate_right(make_base, make_model, make_tokens):
    model = make_model(make_base(gemma3.Gemma3ForCausalLM, sliding_window=4))
    tokens = make_tokens(2, 13)
    assert torch.equal(generate(model, tokens), stepwise(model, tokens))


@torch.no_grad()
def test_generating_from_embeddings_equals_generating_from_tokens(llama, make_tokens):
    tokens = make_tokens(1, 13)
    embeddings = llama.get_input_embeddings()(tokens)
    from_embeddings = llama.generate(
        inputs_embeds=embeddings, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(from_embeddings, generate(llama, tokens)[:, 13:])


@pytest.mark.parametrize("cache_implementation", ["static", "offloaded", "quantized", "offloaded_static"])
def test_caches_of_other_kinds_are_refused(llama, make_tokens, cache_implementation):
    with pytest.raises(ValueError, match=rf"cache_implementation is '{cache_implementation}'.*leave"):
        generate(llama, make_tokens(1, 5), cache_implementation=cache_implementation)


def test_decoding_that_would_take_tokens_back_is_refused(llama, make_tokens):
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(llama, make_tokens(1, 5), prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(llama, make_tokens(1, 5), assistant_model=llama)
