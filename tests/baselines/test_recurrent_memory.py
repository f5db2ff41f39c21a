"""RMT against its equations: memory tokens around every segment, gradients through all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaModel

from infini_attention.baselines.recurrent_memory import memory_mask
from infini_attention.models.compat import CACHE_ARGUMENT

from .cases import OWN, SEGMENT, SIZES, make_baseline, make_tokens

LENGTH = 30  # three whole segments and a piece
COUNT = OWN["recurrent_memory"]["memory_tokens"]


def written_out(model: Any, embeddings: Tensor) -> Tensor:
    """Section 3.2 of arXiv 2207.06881 around transformers' own decoder, one call a segment, no cache."""
    plain = LlamaModel(LlamaModel.config_class(**SIZES)).to(embeddings.dtype)
    for name, parameter in model.model.named_parameters():
        if name != "first_memory.vectors":
            plain.get_submodule(name.rpartition(".")[0]).weight = parameter
    memory = model.model.first_memory.vectors.expand(len(embeddings), -1, -1)
    outputs = []
    for tokens in embeddings.split(SEGMENT, dim=1):
        whole = torch.cat([memory, tokens, memory], dim=1)
        mask = torch.zeros(1, 1, whole.shape[1], whole.shape[1], dtype=torch.bool)
        for i in range(whole.shape[1]):
            for j in range(whole.shape[1]):
                both_read, writes = max(i, j) < COUNT, i >= COUNT + tokens.shape[1]
                mask[..., i, j] = j <= i or both_read or writes
        hidden = plain(inputs_embeds=whole, attention_mask=mask, use_cache=False).last_hidden_state
        outputs.append(hidden[:, COUNT:-COUNT])
        memory = hidden[:, -COUNT:]
    return torch.cat(outputs, dim=1)


def test_it_is_the_papers_equations_and_so_are_its_gradients() -> None:
    model = make_baseline("recurrent_memory").double()
    embeddings = model.get_input_embeddings()(make_tokens(2, LENGTH)).detach().requires_grad_()
    learned = [embeddings, *model.model.parameters()]
    del learned[1]  # the embedding's own weights, which are not used
    found = model.model(inputs_embeds=embeddings).last_hidden_state
    expected = written_out(model, embeddings)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    pull = torch.randn(expected.shape, dtype=torch.float64)
    for ours, wanted in zip(
        torch.autograd.grad((found * pull).sum(), learned),
        torch.autograd.grad((expected * pull).sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_the_last_segments_gradient_reaches_the_first() -> None:
    model = make_baseline("recurrent_memory")
    embeddings = model.get_input_embeddings()(make_tokens(1, 4 * SEGMENT)).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, 3 * SEGMENT :].square().sum().backward()
    assert (embeddings.grad[0].abs().amax(dim=-1) > 0).all()
    assert (model.model.first_memory.vectors.grad.abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize(
    "arguments", [{"detach_every": 2}, {"detach_every": 2, "checkpoint_segments": 1}], ids=str
)
def test_gradients_end_where_they_are_cut(arguments: dict[str, int]) -> None:
    model = make_baseline("recurrent_memory")
    embeddings = model.get_input_embeddings()(make_tokens(1, 4 * SEGMENT)).detach().requires_grad_()
    model(inputs_embeds=embeddings, **arguments).logits[:, 3 * SEGMENT :].square().sum().backward()
    touched = embeddings.grad[0].abs().amax(dim=-1) > 0
    assert not touched[: 2 * SEGMENT].any() and touched[2 * SEGMENT :].all()


@torch.no_grad()
def test_the_memory_alone_goes_on_between_segments() -> None:
    """After a whole segment the cache holds the vectors it wrote, whatever came before, and nothing else."""
    model, tokens = make_baseline("recurrent_memory"), make_tokens(2, 5 * SEGMENT)
    cache = model(tokens, use_cache=True)[CACHE_ARGUMENT]
    assert cache.written.state.vectors.shape == (2, COUNT, SIZES["hidden_size"])
    assert cache.nbytes == cache.written.state.vectors.nbytes
    fresh = model.model.cache_class(model.config)
    fresh.written.advance(cache.written.state, 0)
    more = make_tokens(2, 11, seed=6)
    continued, started = (model(more, **{CACHE_ARGUMENT: each}).logits for each in (cache, fresh))
    torch.testing.assert_close(continued, started)


def test_a_detached_cache_is_cut_off() -> None:
    model = make_baseline("recurrent_memory")
    cache = model(make_tokens(1, 11), use_cache=True)[CACHE_ARGUMENT]
    states = [layer.state for layer in cache.layers]
    assert all(state._tensors()[0].requires_grad for state in states)
    assert not any(x.requires_grad for layer in cache.detach().layers for x in layer.state._tensors())
    assert [layer.state for layer in cache.layers] == states


def test_memory_sees_itself_tokens_see_what_is_read_and_what_is_written_sees_all() -> None:
    rows = ["1100000", "1100000", "1110000", "1111000", "1111100", "1111111", "1111111"]
    expected = torch.tensor([[int(digit) for digit in row] for row in rows], dtype=torch.bool)
    cpu = torch.device("cpu")
    assert torch.equal(memory_mask(7, 7, 2, 2, cpu), expected)
    assert torch.equal(memory_mask(3, 7, 0, 2, cpu), expected[4:])
    assert torch.equal(memory_mask(4, 4, 2, 0, cpu), expected[:4, :4])
    assert memory_mask(2, 5, 0, 0, cpu) is None  # each sees all up to itself


def test_the_first_memory_is_drawn_like_an_embedding() -> None:
    vectors = make_baseline("recurrent_memory", memory_tokens=500).model.first_memory.vectors
    assert vectors.std().item() == pytest.approx(SIZES["initializer_range"], rel=0.1)
