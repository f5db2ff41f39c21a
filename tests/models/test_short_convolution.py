from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from infini_attention.layers import ShortConvolution
from infini_attention.models import InfiniCache, retrofit
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.observe import observe

SEGMENT, WIDTH = 8, 3
LENGTH = 3 * SEGMENT + 5


@pytest.fixture
def model(make_base: Callable[..., Any], make_model: Callable[..., Any]) -> Any:
    """Of fresh convolutions, not the identity that a retrofit begins with."""
    model = make_model(make_base(LlamaForCausalLM), update_rule="delta", short_convolution=WIDTH)
    for module in model.modules():
        if isinstance(module, ShortConvolution):
            module.reset_parameters()
    return model


def logits(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **inputs).logits


def test_a_retrofit_begins_as_its_base(base: Any, make_tokens: Callable[..., Tensor]) -> None:
    model, tokens = retrofit(base, segment_length=SEGMENT, short_convolution=4), make_tokens(2, SEGMENT)
    assert torch.equal(logits(model, tokens), logits(base, tokens))


def test_a_retrofit_does_not_change_its_base(
    make_base: Callable[..., Any], make_tokens: Callable[..., Tensor]
) -> None:
    base = make_base(LlamaForCausalLM)
    before = logits(base, make_tokens(1, 6))
    model = retrofit(base, segment_length=SEGMENT, short_convolution=4)
    assert torch.equal(logits(base, make_tokens(1, 6)), before)
    convolution = model.model.layers[0].self_attn.short_convolution
    assert convolution.weight.shape == ((4 + 2) * 8, 4)
    assert convolution.weight.requires_grad and convolution.weight.dtype == base.dtype


def test_a_query_finds_a_key_by_what_stood_before_it(model: Any, make_tokens: Callable[..., Tensor]) -> None:
    layer, tokens = model.model.layers[0].self_attn, make_tokens(1, LENGTH)
    kept: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, a, given: kept.append(given), with_kwargs=True)
    logits(model, tokens)
    hook.remove()
    hidden, context = kept[0]["hidden_states"], kept[0]["segment_context"]
    query, key, _, _ = layer.project(hidden, None, context)
    changed = hidden.clone()
    changed[:, 2 * SEGMENT - 1] += 1  # the last token of a segment, which the next one looks back at
    for before, after in zip((query, key), layer.project(changed, None, context)[:2], strict=True):
        moved = (before != after).any(dim=-1).any(dim=1)[0].nonzero()[:, 0].tolist()
        assert moved == [*range(2 * SEGMENT - 1, 2 * SEGMENT - 1 + WIDTH)]


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [3, 10, 1, 15], [LENGTH - 1, 1]])
def test_pieces_are_the_same_computation(
    model: Any, make_tokens: Callable[..., Tensor], pieces: list[int]
) -> None:
    tokens, cache = make_tokens(2, LENGTH), InfiniCache(model.config)
    parts = [logits(model, piece, **{CACHE_ARGUMENT: cache}) for piece in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, tokens), atol=2e-5, rtol=1e-4)
    whole = InfiniCache(model.config)
    logits(model, tokens, **{CACHE_ARGUMENT: whole})
    assert whole.recent(0).shape == (2, WIDTH - 1, (4 + 2) * 8)
    torch.testing.assert_close(cache.recent(1), whole.recent(1), atol=2e-5, rtol=1e-4)


def test_a_state_keeps_what_its_open_segment_looks_back_at(
    model: Any, make_tokens: Callable[..., Tensor]
) -> None:
    tokens, whole = make_tokens(2, LENGTH), InfiniCache(model.config)
    logits(model, tokens[:, : 2 * SEGMENT], **{CACHE_ARGUMENT: whole})
    began = whole.layers[0].state
    assert torch.equal(began.recent, began.open_recent) and began.recent.any()
    for pieces in ([2 * SEGMENT + 3], [2 * SEGMENT, 3], [2 * SEGMENT + 1, 1, 1], [SEGMENT + 1, SEGMENT + 2]):
        cache = InfiniCache(model.config)
        for piece in tokens[:, : 2 * SEGMENT + 3].split(pieces, dim=1):
            logits(model, piece, **{CACHE_ARGUMENT: cache})
        state = cache.layers[0].state
        torch.testing.assert_close(state.recent, began.recent)
        assert not torch.equal(state.open_recent, began.recent)


def test_a_state_keeps_it_for_rows_that_end_segments_at_different_times(
    model: Any, make_tokens: Callable[..., Tensor]
) -> None:
    tokens, mask = make_tokens(2, SEGMENT + 4), torch.ones(2, SEGMENT + 4, dtype=torch.int64)
    mask[1, :3] = 0  # its first segment ends three tokens later
    together, alone = InfiniCache(model.config), InfiniCache(model.config)
    for cut in (SEGMENT + 1, SEGMENT + 2, SEGMENT + 4):
        seen = together.get_seq_length()
        logits(model, tokens[:, seen:cut], attention_mask=mask[:, :cut], **{CACHE_ARGUMENT: together})
        logits(model, tokens[1:, max(seen, 3) : cut], **{CACHE_ARGUMENT: alone})
        for name in ("recent", "open_recent"):
            parts = [getattr(cache.layers[1].state, name) for cache in (together, alone)]
            torch.testing.assert_close(parts[0][1:], parts[1], atol=2e-5, rtol=1e-4)


def test_rows_are_independent(model: Any, make_tokens: Callable[..., Tensor]) -> None:
    tokens = make_tokens(2, LENGTH)
    alone = logits(model, tokens[:1, 4:])
    padded = tokens.clone()
    padded[0, :4] = 0
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    together = logits(model, padded, attention_mask=mask)
    torch.testing.assert_close(together[:1, 4:], alone, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(together[1:], logits(model, tokens[1:]), atol=2e-5, rtol=1e-4)


def test_packed_documents_are_independent(model: Any, make_tokens: Callable[..., Tensor]) -> None:
    tokens, cut = make_tokens(1, LENGTH), 11
    positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])[None]
    packed = logits(model, tokens, position_ids=positions)
    alone = [logits(model, tokens[:, :cut]), logits(model, tokens[:, cut:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=2e-5, rtol=1e-4)


def test_beams_keep_what_their_rows_look_back_at(model: Any, make_tokens: Callable[..., Tensor]) -> None:
    tokens, cache = make_tokens(2, LENGTH), InfiniCache(model.config)
    logits(model, tokens[:, :-2], **{CACHE_ARGUMENT: cache})
    cache.reorder_cache(torch.tensor([1, 1]))
    after = logits(model, tokens[[1, 1], -2:], **{CACHE_ARGUMENT: cache})
    torch.testing.assert_close(after[0], logits(model, tokens)[1, -2:], atol=2e-5, rtol=1e-4)


def test_runs_of_segments_have_the_gradients_of_the_whole(
    model: Any, make_tokens: Callable[..., Tensor]
) -> None:
    tokens, gradients = make_tokens(2, LENGTH), []
    for settings in ({}, {"checkpoint_segments": 1}):
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False, **settings).loss.backward()
        gradients.append(model.model.layers[0].self_attn.short_convolution.weight.grad.clone())
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_a_saved_model_is_the_same(model: Any, make_tokens: Callable[..., Tensor], tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, make_tokens(1, LENGTH)), logits(model, make_tokens(1, LENGTH)))


def test_fresh_weights_are_drawn_around_nothing(model: Any) -> None:
    fresh = type(model)(model.config)
    weight = fresh.model.layers[1].self_attn.short_convolution.weight
    assert 0.9 * WIDTH**-0.5 < weight.abs().max() <= WIDTH**-0.5
    assert weight.mean().abs() < 0.1


@pytest.mark.parametrize("width", [-1, 1, SEGMENT + 1])
def test_a_width_that_cannot_be_is_refused(make_base: Callable[..., Any], width: int) -> None:
    with pytest.raises(ValueError, match=f"short_convolution is {width}"):
        retrofit(make_base(LlamaForCausalLM), segment_length=SEGMENT, short_convolution=width)


def test_packed_documents_are_observed_too(model: Any, make_tokens: Callable[..., Tensor]) -> None:
    tokens, positions = make_tokens(1, 4 * SEGMENT), torch.arange(2 * SEGMENT).repeat(2)[None]
    rows = tokens.view(2, 2 * SEGMENT)
    labels = tokens.clone()
    labels[:, 2 * SEGMENT] = -100
    packed = observe(model, {"input_ids": tokens, "labels": labels, "position_ids": positions})
    torch.testing.assert_close(packed.share, observe(model, {"input_ids": rows, "labels": rows}).share)
