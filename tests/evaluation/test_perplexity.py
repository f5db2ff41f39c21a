"""A stream's loss is that of the whole text at once, and its sums add up."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from infini_attention.data.texts import TokenBlock
from infini_attention.evaluation import perplexity
from infini_attention.evaluation.perplexity import Loss, StreamedPerplexity, Stretch
from infini_attention.layers import MemoryGate
from infini_attention.models import memory_off, retrofit

SEGMENT = 8
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
BASES = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "Gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
}


def make_model(family: str = "Llama") -> Any:
    """A model whose memories weigh something, differently in every head."""
    torch.manual_seed(0)
    model = retrofit(BASES[family]().eval(), segment_length=SEGMENT)
    for module in model.modules():
        if isinstance(module, MemoryGate):
            torch.nn.init.normal_(module.logits)
    return model


def make_tokens(count: int) -> TokenBlock:
    """Random tokens of 1 to 4 bytes, a word in about every third."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SIZES["vocab_size"], (count,), generator=generator)
    sizes = torch.randint(1, 5, (count,), generator=generator)
    return TokenBlock(ids, sizes, (torch.rand(count, generator=generator) < 0.3).long())


def read(model: Any, chunks: Iterable[TokenBlock]) -> StreamedPerplexity:
    measured = StreamedPerplexity(model)
    for chunk in chunks:
        measured.feed(chunk)
    return measured


@torch.no_grad()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Of tokens 1, 2, ... from the model's own forward, all at once."""
    return F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")


@pytest.mark.parametrize("family", BASES)
def test_the_loss_is_that_of_the_whole_text_at_once(family: str) -> None:
    model, tokens = make_model(family), make_tokens(61)
    total = read(model, tokens.split(16)).total
    assert total.on.nats == pytest.approx(losses(model, tokens.ids).sum().item(), rel=1e-5)
    with memory_off(model):
        assert total.off.nats == pytest.approx(losses(model, tokens.ids).sum().item(), rel=1e-5)
    assert abs(total.on.nats - total.off.nats) > 0.01


@pytest.mark.parametrize("chunk_length", [1, 5, 8, 24, 1000])
def test_chunks_change_nothing(chunk_length: int) -> None:
    model, tokens = make_model(), make_tokens(61)
    measured, expected = read(model, tokens.split(chunk_length)), read(model, [tokens])
    for one, other in zip(measured.by_position, expected.by_position, strict=True):
        for mode in ("on", "off"):
            one_loss, other_loss = getattr(one, mode), getattr(other, mode)
            assert one_loss.nats == pytest.approx(other_loss.nats, rel=1e-4)
            assert one_loss.tokens == other_loss.tokens


def test_with_the_memory_off_each_segment_sees_only_itself() -> None:
    model, tokens = make_model(), make_tokens(40)
    segments = tokens.ids.view(-1, SEGMENT)
    with torch.no_grad(), memory_off(model):
        logits = model(segments).logits.flatten(0, 1)
    alone = F.cross_entropy(logits[:-1], tokens.ids[1:], reduction="sum").item()
    assert read(model, tokens.split(12)).total.off.nats == pytest.approx(alone, rel=1e-5)


def test_the_first_segment_is_the_same_on_and_off() -> None:
    first, second = read(make_model(), make_tokens(2 * SEGMENT).split(4)).by_position
    # The last token of the first segment predicts the first of the second, so that one has no memory either.
    assert first.on == first.off
    assert second.on.nats != second.off.nats


def test_positions_are_the_first_segment_the_second_and_doubles() -> None:
    measured = read(make_model(), make_tokens(61).split(20))
    assert [(each.start, each.end) for each in measured.by_position] == [(0, 8), (8, 16), (16, 32), (32, 61)]


def test_the_first_token_is_not_predicted_but_its_words_and_bytes_count() -> None:
    tokens = make_tokens(30)
    total = read(make_model(), tokens.split(7)).total
    assert total.on.tokens == 29
    assert total.on.words == int(tokens.words.sum())
    assert total.on.bytes == int(tokens.bytes.sum())


@pytest.mark.parametrize("points", [256, 4])
def test_stretches_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, points: int) -> None:
    monkeypatch.setattr(perplexity, "CURVE_POINTS", points)
    measured = read(make_model(), make_tokens(61).split(5))
    for stretches in (measured.by_position, measured.curve):
        assert len(stretches) <= points
        assert [each.start for each in stretches[1:]] == [each.end for each in stretches[:-1]]
        assert stretches[-1].end == 61
        for mode in ("on", "off"):
            parts, whole = [getattr(each, mode) for each in stretches], getattr(measured.total, mode)
            assert sum(part.nats for part in parts) == pytest.approx(whole.nats)
            for count in ("tokens", "words", "bytes"):
                assert sum(getattr(part, count) for part in parts) == getattr(whole, count)


def test_tiles_of_logits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model("Gemma2"), make_tokens(50)
    expected = read(model, [tokens]).total
    monkeypatch.setattr(perplexity, "TILE_TOKENS", 7)
    monkeypatch.setattr(perplexity, "TILE_VOCABULARY", 33)
    assert read(model, [tokens]).total.on.nats == pytest.approx(expected.on.nats, rel=1e-6)


def test_what_is_carried_does_not_grow() -> None:
    measured = StreamedPerplexity(make_model())
    sizes = set()
    for chunk in make_tokens(20 * SEGMENT).split(SEGMENT):
        measured.feed(chunk)
        sizes.add(measured.state_bytes)
    assert len(sizes) == 1


def test_reading_leaves_the_gates_as_they_were() -> None:
    model = make_model()
    before = [gate.clone() for name, gate in model.named_parameters() if "gate.logits" in name]
    read(model, [make_tokens(20)])
    after = [gate for name, gate in model.named_parameters() if "gate.logits" in name]
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))


def test_figures_follow_from_the_sums() -> None:
    loss = Loss(nats=20.0, tokens=10, words=4, bytes=40)
    assert loss.token_perplexity == pytest.approx(math.exp(2))
    assert loss.word_perplexity == pytest.approx(math.exp(5))
    assert loss.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert Stretch(0, 10, on=loss, off=loss).to_dict()["off"]["word_perplexity"] == loss.word_perplexity


def test_figures_of_hopeless_or_empty_stretches_are_inf_or_nan() -> None:
    assert Loss(nats=5000.0, tokens=10, words=1, bytes=1).word_perplexity == math.inf
    assert math.isnan(Loss(nats=0.0, tokens=0, words=0, bytes=0).bits_per_byte)
    assert math.isnan(Loss(nats=0.0, tokens=0, words=0, bytes=0).token_perplexity)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        StreamedPerplexity(make_model().train())
