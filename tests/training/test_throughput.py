from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from infini_attention.models import retrofit
from infini_attention.training import throughput
from infini_attention.training.throughput import Throughput, flops_per_token, peak_flops

SEGMENT = 16
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
# Of one layer: queries and outputs 32 x 32, keys and values 32 x 16, three matrices 32 x 48.
MATRICES = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
HEAD = 64 * 32  # an embedding's lookup counts nothing, the head does, tied or not
BF16 = SimpleNamespace(device=torch.device("cuda"), bf16=True, fp16=False)


def llama(*, tied: bool = False, **settings: Any) -> Any:
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=tied, **SIZES)
    return retrofit(LlamaForCausalLM(config), segment_length=SEGMENT, **settings)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("update_rule", "states"), [("linear", 2), ("delta", 3)])
def test_operations_of_a_small_model_are_those_counted_by_hand(
    tied: bool, update_rule: str, states: int
) -> None:
    attention = 2 * 4 * 2 * 8 * (SEGMENT + states * 8)  # layers, heads, 2 d (N + 2 d) or 2 d (N + 3 d)
    expected = 6 * (2 * MATRICES + HEAD) + 3 * attention
    model = llama(tied=tied, update_rule=update_rule)
    assert flops_per_token(model, 100 * SEGMENT) == expected
    assert flops_per_token(model, SEGMENT) == expected


def test_a_sequence_within_one_segment_costs_its_length() -> None:
    expected = 6 * (2 * MATRICES + HEAD) + 3 * 2 * 4 * 2 * 8 * (5 + 2 * 8)
    assert flops_per_token(llama(), 5) == expected


@pytest.mark.parametrize(("local_attention", "outside"), [("sliding", SEGMENT), ("sink", 4)])
def test_what_is_seen_outside_a_segment_costs_all_but_the_first_segment(
    local_attention: str, outside: int
) -> None:
    plain, ours = (flops_per_token(llama(local_attention=name), 100) for name in ("segment", local_attention))
    tokens_seen = (100 - SEGMENT) * outside / 100  # a token
    assert ours - plain == pytest.approx(3 * 2 * 4 * 4 * 8 * tokens_seen)


def test_a_wider_feature_map_costs_its_width() -> None:
    narrow, wide = (flops_per_token(llama(feature_map=name), 64) for name in ("elu1", "dpfp"))
    assert wide - narrow == 3 * 2 * 4 * 2 * 8 * 2 * 8


def test_a_layer_without_memory_costs_the_whole_length() -> None:
    attention = 4 * 2 * 8 * (SEGMENT + 2 * 8) + 4 * 2 * 8 * 1000
    assert flops_per_token(llama(layers=[1]), 1000) == 6 * (2 * MATRICES + HEAD) + 3 * attention


def test_a_sliding_window_costs_what_its_tokens_see() -> None:
    config = Gemma3TextConfig(
        vocab_size=64,
        num_hidden_layers=2,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        **SIZES,
    )
    model = retrofit(Gemma3ForCausalLM(config), segment_length=SEGMENT)
    assert model.config.infini_layers == [1]
    pairs = sum(min(token + 1, 4) for token in range(100)) - 4 / 2  # a diagonal counts half, as in L^2 / 2
    with_window = 4 * 4 * 8 * pairs / 100
    expected = 6 * (2 * MATRICES + HEAD) + 3 * (4 * 2 * 8 * (SEGMENT + 2 * 8) + with_window)
    assert flops_per_token(model, 100) == pytest.approx(expected, rel=1e-3)


def test_frozen_matrices_have_no_gradient_to_pay_for() -> None:
    model = llama()
    whole = flops_per_token(model, 64)
    model.lm_head.requires_grad_(False)
    assert whole - flops_per_token(model, 64) == 2 * HEAD


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some Card", None),
    ],
)
def test_a_peak_is_known_of_whole_cards_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, card: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert peak_flops("cuda", torch.bfloat16) == peak
    assert peak_flops("cuda:1", torch.float16) == peak
    assert peak_flops("cuda", torch.float32) is None
    assert peak_flops("cpu", torch.bfloat16) is None


def test_figures_are_of_the_batches_since_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    clock = iter([10.0, 14.0, 20.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    model = llama()
    counted = Throughput(model, BF16)
    assert counted.figures() == {}
    counted.count(torch.Size([3, 64]))  # starts the clock
    counted.count(torch.Size([2, 64]))
    counted.count(torch.Size([1, 8]))
    operations = 128 * flops_per_token(model, 64) + 8 * flops_per_token(model, 8)
    assert counted.figures() == pytest.approx({"tokens_per_second": 136 / 4, "mfu": operations / 4 / 989e12})
    assert counted.figures() == {}
    counted.count(torch.Size([1, 60]))
    assert counted.figures()["tokens_per_second"] == 60 / 6


def test_no_part_of_an_unknown_peak_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Throughput(llama(), SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False))
    counted.count(torch.Size([1, 8]))
    counted.count(torch.Size([1, 8]))
    assert list(counted.figures()) == ["tokens_per_second"]


def test_the_precision_is_the_models_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    args = SimpleNamespace(device=torch.device("cuda"), bf16=False, fp16=False)
    found = []
    for model in (llama(), llama().bfloat16()):
        counted = Throughput(model, args)
        counted.count(torch.Size([1, 8]))
        counted.count(torch.Size([1, 8]))
        found.append("mfu" in counted.figures())
    assert found == [False, True]
