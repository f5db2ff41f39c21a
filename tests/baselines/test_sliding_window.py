"""A sliding window against transformers with a mask, and attention sinks against the paper's cache."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from infini_attention import retrofit
from infini_attention.baselines import with_window
from infini_attention.baselines.sliding_window import window_mask
from infini_attention.baselines.systems import system_name
from infini_attention.models.compat import CACHE_ARGUMENT

from . import naive
from .cases import SIZES, make_baseline, make_tokens

WINDOW, LENGTH = 6, 32  # five windows and a piece
HEADS, KV_HEADS = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # in fp64, beside rotations that transformers makes in fp32


def make_base(**fields: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaForCausalLM.config_class(**SIZES | fields)).eval()


def masked(base: Any, tokens: Tensor, window: int) -> Tensor:
    """Logits of transformers' Llama at positions in the text, with the band written into its mask."""
    places = torch.arange(tokens.shape[1])
    back = places[:, None] - places
    band = (back >= 0) & (back < window)
    return base(tokens, attention_mask=band[None, None], use_cache=False).logits


def from_the_cache(model: Any, tokens: Tensor, window: int, sinks: int) -> Tensor:
    """Section 3.2 of arXiv 2309.17453, a token at a time: what is cached, and positions in the cache.

    Keys are cached before rotation. A full cache drops the oldest token that is no sink; the new one is the
    last in it. Returns last hidden states, (length, hidden_size).
    """
    caches: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def attend(layer: int, start: int, inputs: Tensor, weights: dict[str, Tensor]) -> Tensor:
        outputs, cache = [], caches.setdefault(layer, [])
        for token in inputs.split(1):
            key, value = (naive.heads(token, weights[x], KV_HEADS, HEADS // KV_HEADS) for x in "kv")
            if len(cache) == window:
                del cache[sinks]
            cache.append((key, value))
            keys, values = (torch.cat(each, dim=1) for each in zip(*cache, strict=True))
            last = len(cache) - 1
            query = naive.rotated(naive.heads(token, weights["q"], HEADS), range(last, last + 1))
            scores = naive.rotated(keys, range(last + 1)) @ query.transpose(1, 2) / math.sqrt(keys.shape[2])
            each = zip(scores.squeeze(2), values, strict=True)
            outputs.append(torch.cat([naive.softmax_mean(*pair) for pair in each]))
        return torch.stack(outputs)

    return naive.decoder(model, tokens, attend)


def pieces_of(model: Any, tokens: Tensor, size: int) -> tuple[Tensor, list[int]]:
    """Logits of `tokens` fed so many at a time, and the cache's size after each."""
    cache, logits, sizes = model.model.cache_class(model.config), [], []
    for piece in tokens.split(size, dim=1):
        logits.append(model(piece, **{CACHE_ARGUMENT: cache}).logits)
        sizes.append(cache.nbytes)
    return torch.cat(logits, dim=1), sizes


@pytest.mark.parametrize("window", [1, 2, WINDOW, LENGTH - 1, LENGTH, LENGTH + 1])
@torch.no_grad()
def test_without_sinks_it_is_the_base_with_a_band_in_its_mask(window: int) -> None:
    base, tokens = make_base().double(), make_tokens(2, LENGTH)
    model = with_window(base, window=window)
    torch.testing.assert_close(model(tokens).logits, masked(base, tokens, window), **CLOSE)


def test_gradients_are_those_of_the_base_with_a_band_in_its_mask() -> None:
    base, tokens = make_base().double(), make_tokens(2, LENGTH)
    model = with_window(base, window=WINDOW)
    pull = torch.randn(2, LENGTH, SIZES["vocab_size"], dtype=torch.float64)
    (model.train()(tokens).logits * pull).sum().backward()
    (masked(base, tokens, WINDOW) * pull).sum().backward()
    for ours, theirs in zip(model.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "sinks"), [(WINDOW, 0), (WINDOW, 2), (WINDOW, 5), (2, 1), (40, 4)])
def test_with_sinks_it_is_the_papers_cache_and_so_are_its_gradients(window: int, sinks: int) -> None:
    model = make_baseline("sliding_window", window=window, sinks=sinks, segment_length=LENGTH).double()
    tokens = make_tokens(1, LENGTH)
    expected = from_the_cache(model, tokens[0], window, sinks)
    naive.assert_same(model, model.model(tokens).last_hidden_state[0], expected)


@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_a_text_of_one_window_is_the_bases_own_bit_for_bit(sinks: int) -> None:
    base, tokens = make_base(), make_tokens(2, WINDOW)
    assert torch.equal(with_window(base, window=WINDOW, sinks=sinks)(tokens).logits, base(tokens).logits)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("size", [1, 4, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
@torch.no_grad()
def test_pieces_of_any_size_are_one_text_and_leave_a_cache_of_one_size(sinks: int, size: int) -> None:
    model = with_window(make_base().double(), window=WINDOW, sinks=sinks)
    tokens = make_tokens(2, LENGTH)
    logits, sizes = pieces_of(model, tokens, size)
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, **CLOSE)
    number = (
        2 * 2 * KV_HEADS * SIZES["head_dim"] * SIZES["num_hidden_layers"] * 8
    )  # bytes of a token, two rows
    read = [min(size * (piece + 1), LENGTH) for piece in range(len(sizes))]
    assert sizes == [number * min(tokens_read, WINDOW - 1) for tokens_read in read]
    assert sizes[-1] // 16 == model.config.memory_floats(LENGTH)


@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_the_cache_keeps_nothing_alive_but_itself(sinks: int) -> None:
    model = with_window(make_base(), window=WINDOW, sinks=sinks)
    cache = model(make_tokens(1, LENGTH), use_cache=True)[CACHE_ARGUMENT]
    for layer in cache.layers:
        for tensor in (layer.state.cached_key, layer.state.cached_value):
            assert tensor.shape[2] == WINDOW - 1
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
def test_how_many_tokens_a_text_has_had_changes_no_bit(sinks: int) -> None:
    """Positions in a text of 10M tokens would be 0.5 apart in single precision, angles as far off."""
    model, more = with_window(make_base(), window=WINDOW, sinks=sinks), make_tokens(1, 20, seed=7)
    logits = []
    for tokens in (0, 10**7):
        cache = model(make_tokens(1, LENGTH), use_cache=True)[CACHE_ARGUMENT]
        for layer in cache.layers:
            layer.seen += tokens
        logits.append(model(more, **{CACHE_ARGUMENT: cache}).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(("sinks", "seen"), [(0, []), (2, [0, 1])])
@torch.no_grad()
def test_one_layer_sees_the_sinks_and_the_latest_tokens_alone(sinks: int, seen: list[int]) -> None:
    model = make_baseline("sliding_window", window=WINDOW, sinks=sinks, num_hidden_layers=1)
    tokens = make_tokens(1, LENGTH)
    last = model(tokens).logits[0, -1]
    for place in range(LENGTH):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % SIZES["vocab_size"]
        same = torch.allclose(model(changed).logits[0, -1], last, rtol=0, atol=1e-6)
        assert same != (place in seen or place >= LENGTH - (WINDOW - sinks))


def test_no_mask_is_larger_than_a_window_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, *args: Any, **settings: Any) -> Tensor:
        shapes.append((query.shape[2], key.shape[2]))
        return original(query, key, *args, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with_window(make_base(), window=WINDOW, sinks=2)(make_tokens(1, LENGTH))
    assert len(shapes) == -(-LENGTH // WINDOW) * SIZES["num_hidden_layers"]
    assert max(new for new, _ in shapes) == WINDOW and max(seen for _, seen in shapes) == 2 * WINDOW - 1


def test_the_mask_is_the_one_drawn() -> None:
    cpu = torch.device("cpu")
    drawn = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]]).bool()
    assert torch.equal(window_mask(3, 6, 4, 1, cpu), drawn)
    assert window_mask(4, 4, 4, 1, cpu) is None
    assert torch.equal(window_mask(6, 6, 4, 1, cpu)[3:], drawn)
    assert torch.equal(window_mask(1, 4, 4, 1, cpu), torch.ones(1, 4).bool())


@torch.no_grad()
def test_a_base_shares_its_weights_and_stays_as_it_is(tmp_path: Path) -> None:
    base, tokens = make_base(tie_word_embeddings=True).train(), make_tokens(1, LENGTH)
    logits, names = base(tokens).logits, [name for name, _ in base.named_parameters()]
    model = with_window(base, window=WINDOW, sinks=2)
    assert [name for name, _ in model.named_parameters()] == names and model.training
    for ours, theirs in zip(model.parameters(), base.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert torch.equal(base(tokens).logits, logits)
    assert with_window(base, window=WINDOW, dtype=torch.bfloat16).dtype == torch.bfloat16
    base.save_pretrained(tmp_path)
    again = with_window(tmp_path, window=WINDOW, sinks=2)
    assert not again.training and again.name_or_path == str(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_a_saved_one_comes_back_with_its_window(tmp_path: Path) -> None:
    model, tokens = with_window(make_base(), window=WINDOW, sinks=2), make_tokens(1, LENGTH)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert (again.config.window, again.config.sinks, again.config.segment_length) == (WINDOW, 2, WINDOW)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_tables_call_it_by_its_window() -> None:
    base = make_base()
    assert system_name(with_window(base, window=2048)) == "sliding window of 2,048"
    assert system_name(with_window(base, window=2048, sinks=4)) == "attention sinks, 4 of 2,048"


def test_bases_that_cannot_have_a_window_are_refused() -> None:
    base = make_base(max_position_embeddings=64)
    assert with_window(base, window=64).config.window == 64
    with pytest.raises(ValueError, match=r"window is 65, more than .* max_position_embeddings, 64; give"):
        with_window(base, window=65)
    with pytest.raises(ValueError, match="InfiniLlamaForCausalLM has memories already"):
        with_window(retrofit(base, segment_length=8), window=8)
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for other in (qwen, make_baseline("transformer_xl"), with_window(base, window=8)):
        name = type(other).__name__
        with pytest.raises(ValueError, match=f"{name} is not supported; give one of LlamaForCausalLM"):
            with_window(other, window=8)
