"""A fingerprint changes with anything that would make a state wrong, and with nothing else."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers.integrations.peft
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from infini_attention.streaming import fingerprint as module
from infini_attention.streaming.fingerprint import Fingerprint, fingerprint

MakeModel = Callable[..., LlamaForCausalLM]


def make_tokenizer(words: str = "a b c d", **settings: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words.split())}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a", **settings)


def weights(model: nn.Module) -> str:
    """The weights' hash, computed anew."""
    module._WEIGHTS.clear()
    return module._weights(model)


class Holder(nn.Module):
    """One parameter, to look at its bits."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x, requires_grad=False)


# --- what it says ----------------------------------------------------------------------------------------


def test_it_says_what_the_config_says(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"local_attention": "sink", "sink_tokens": 3}
    found = fingerprint(make_model(feature_map="relu2", normalization="root", **settings), tokenizer)
    expected = {
        "model_type": "infini_llama",
        "adapter": "none",
        "segment_length": 8,
        "update_rule": "linear",
        "feature_map": "relu2",
        "normalization": "root",
        "empty_memory": "local",
        "local_attention": "sink",
        "sink_tokens": 3,
        "dtype": "float32",
    }
    assert {name: getattr(found, name) for name in expected} == expected
    assert len(found.weights) == len(found.tokenizer) == 64


def test_models_made_alike_have_the_same(make_model: MakeModel) -> None:
    assert fingerprint(make_model(), make_tokenizer()) == fingerprint(make_model(), make_tokenizer())


def test_differences_are_in_words() -> None:
    settings = 512, "linear", "elu1", "sum", "local", "segment", 0
    one = Fingerprint("llama", "a" * 64, "none", "b" * 64, *settings, "bfloat16")
    assert one.differences(one) == []
    other = replace(one, weights="c" * 64, segment_length=2048, adapter="law,news")
    assert one.differences(other) == [
        "weights is aaaaaaaaaaaa in the file and cccccccccccc here",
        "adapter is none in the file and law,news here",
        "segment_length is 512 in the file and 2048 here",
    ]


# --- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_bit_of_any_place_counts(dtype: torch.dtype) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x = torch.randn(9, dtype=torch.float64).to(dtype)
    before = weights(Holder(x))
    for place in (0, 3, 8):  # the last one is a word by itself, filled up with zeros
        for bit in range(dtype.itemsize * 8):
            changed = x.clone()
            changed.view(bits)[place] ^= (1 << bit) - (1 << (bit + 1) if bit == dtype.itemsize * 8 - 1 else 0)
            assert weights(Holder(changed)) != before


def test_places_beyond_the_first_block_count() -> None:
    x = torch.zeros(4 * module.BLOCK * 2 + 5, dtype=torch.bfloat16)
    before = weights(Holder(x))
    found = {before}
    for place in [0, 1, 4, 4 * module.BLOCK - 1, 4 * module.BLOCK, len(x) - 5, len(x) - 1]:
        changed = x.clone()
        changed[place] = 1
        found.add(weights(Holder(changed)))
    assert len(found) == 8


def test_order_shape_and_dtype_count() -> None:
    x = torch.randn(6)
    found = [weights(Holder(y)) for y in (x, x.flip(0), x.view(2, 3), x.view(3, 2), x.view(torch.int32))]
    assert len(set(found)) == 5


def test_how_a_weight_lies_in_memory_does_not_count() -> None:
    x = torch.randn(5, 7).bfloat16()
    strided = torch.randn(7, 5).bfloat16().t()
    shifted = torch.zeros(36).bfloat16()[1:].view(5, 7)
    for y in (strided, shifted):
        y.copy_(x)
    assert weights(Holder(strided)) == weights(Holder(shifted)) == weights(Holder(x))


def test_weights_may_be_empty_scalar_or_bool() -> None:
    found = [weights(Holder(torch.zeros(0))), weights(Holder(torch.tensor(1.0)))]
    found += [weights(Holder(torch.tensor([True, flag]))) for flag in (False, True)]
    assert len(set(found)) == 4


def test_only_buffers_that_are_saved_count() -> None:
    def build(kept: float, unsaved: float) -> nn.Module:
        model = nn.Module()
        model.register_buffer("kept", torch.tensor(kept))
        model.register_buffer("unsaved", torch.tensor(unsaved), persistent=False)
        return model

    assert weights(build(1.0, 1.0)) == weights(build(1.0, 2.0)) != weights(build(2.0, 1.0))


def test_tied_weights_are_the_same_as_equal_ones(make_model: MakeModel) -> None:
    model = make_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = weights(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert weights(model) == tied


def test_dtype_is_seen(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    narrow = fingerprint(make_model().to(torch.bfloat16), tokenizer)
    wide = fingerprint(make_model(), tokenizer)
    assert (narrow.dtype, wide.dtype) == ("bfloat16", "float32")
    assert narrow.weights != wide.weights


def test_weights_without_data_are_refused(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="on the meta device and has no data; load the model's weights"):
        fingerprint(make_model().to("meta"), tokenizer)


# --- what is remembered ----------------------------------------------------------------------------------


def test_weights_are_hashed_once_until_one_changes(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    hash_of = module._hash_of
    monkeypatch.setattr(module, "_hash_of", lambda tensors: (calls.append(1), hash_of(tensors))[1])
    model = make_model()
    first = fingerprint(model, tokenizer)
    assert fingerprint(model, tokenizer) == first
    assert len(calls) == 1
    gate = model.model.layers[1].self_attn.memory_gate.logits
    with torch.no_grad():
        gate.add_(1)
    second = fingerprint(model, tokenizer)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    third = fingerprint(model, tokenizer)
    assert len({first.weights, second.weights, third.weights}) == len(calls) == 3
    assert replace(second, weights=first.weights) == first


def test_weights_whose_changes_torch_does_not_count_are_hashed_every_time() -> None:
    with torch.inference_mode():
        model = Holder(torch.randn(3))
        assert model.x.is_inference()
        before = module._weights(model)
        assert module._weights(model) == before
        model.x.add_(1)
        assert module._weights(model) != before


def test_models_are_not_kept_alive(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    module._WEIGHTS.clear()
    fingerprint(make_model(), tokenizer)
    gc.collect()
    assert len(module._WEIGHTS) == 0


# --- adapters --------------------------------------------------------------------------------------------


def test_active_adapters_of_peft_are_named(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast) -> None:
    peft = pytest.importorskip("peft")
    plain = fingerprint(make_model(), tokenizer)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(make_model(), config, adapter_name="law")
    found = fingerprint(wrapped, tokenizer)
    assert found.adapter == "law"
    assert found.weights != plain.weights
    assert found.differences(plain)[1] == "adapter is law in the file and none here"
    wrapped.add_adapter("news", config)
    wrapped.set_adapter("news")
    assert fingerprint(wrapped, tokenizer).adapter == "news"
    with wrapped.disable_adapter():
        assert fingerprint(wrapped, tokenizer).adapter == "none"


def test_active_adapters_of_transformers_are_named(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda min_version: None)
    model = make_model()
    for name in ("law", "news"):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=name)
    assert fingerprint(model, tokenizer).adapter == "news"
    model.set_adapter(["law", "news"])
    assert fingerprint(model, tokenizer).adapter == "law,news"
    model.disable_adapters()
    assert fingerprint(model, tokenizer).adapter == "none"


# --- tokenizers ------------------------------------------------------------------------------------------


def test_another_tokenizer_is_seen(make_model: MakeModel) -> None:
    model = make_model()
    lower = make_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = {
        fingerprint(model, each).tokenizer for each in (make_tokenizer(), make_tokenizer("a b d c"), lower)
    }
    assert len(found) == 3


def test_added_tokens_are_seen(make_model: MakeModel) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    before = fingerprint(model, tokenizer).tokenizer
    tokenizer.add_tokens(["e"])
    assert fingerprint(model, tokenizer).tokenizer != before


def test_how_a_tokenizer_was_last_called_does_not_count(make_model: MakeModel) -> None:
    model, called = make_model(), make_tokenizer(pad_token="b")
    called(["a b", "c"], truncation=True, max_length=1, padding="max_length")
    assert called.backend_tokenizer.truncation is not None
    found = fingerprint(model, called)
    assert found == fingerprint(model, make_tokenizer(pad_token="b"))


class Slow:
    """A tokenizer without a fast backend."""

    def __init__(self, **vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def __len__(self) -> int:
        return len(self.vocabulary)


def test_a_tokenizer_without_a_fast_backend_is_known_by_its_vocabulary() -> None:
    found = [module._tokenizer(each) for each in (Slow(a=1, b=2), Slow(b=2, a=1), Slow(a=2, b=1))]
    assert found[0] == found[1] != found[2]
