import pytest
import torch
from transformers import LlamaForCausalLM

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
LENGTHS = [21, 5, 8, 16]


def padded(rows, side):
    """Rows of different lengths as one batch, and its attention mask."""
    width = max(len(row) for row in rows) + 2
    tokens, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for index, row in enumerate(rows):
        place = {"left": slice(width - len(row), width), "right": slice(0, len(row))}[side]
        tokens[index, place], mask[index, place] = row, 1
    return tokens, mask


def documents(make_tokens):
    return [make_tokens(length, seed=length) for length in LENGTHS]


def restarting_positions():
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_equals_its_unpadded_self(model, make_tokens, side):
    rows = documents(make_tokens)
    tokens, mask = padded(rows, side)
    logits = model(tokens, attention_mask=mask).logits
    for row, output, real in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(output[real], model(row[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_equals_its_unpadded_self_beside_ordinary_layers(base, make_model, make_tokens, side):
    model = make_model(base, layers=[1])
    rows = documents(make_tokens)
    tokens, mask = padded(rows, side)
    logits = model(tokens, attention_mask=mask).logits
    for row, output, real in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(output[real], model(row[None]).logits[0], **TOLERANCE)


@torch.no_grad()
def test_padding_anywhere_in_a_stream_of_chunks_is_not_there(llama, make_tokens):
    tokens = make_tokens(3, 40)
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    cache, logits = InfiniCache(llama.config), []
    for first, last in ((0, 7), (7, 25), (25, 40)):
        output = llama(tokens[:, first:last], attention_mask=mask[:, :last].long(), **{CACHE_ARGUMENT: cache})
        logits.append(output.logits)
    for row, output, real in zip(tokens, torch.cat(logits, dim=1), mask, strict=True):
        torch.testing.assert_close(output[real], llama(row[real][None]).logits[0], **TOLERANCE)


@torch.no_grad()
def test_padding_does_not_change_the_loss(llama, make_tokens):
    rows = [make_tokens(21), make_tokens(21, seed=5)]
    tokens, mask = padded(rows, "right")
    labels = tokens.masked_fill(mask == 0, -100)
    plain = torch.stack(rows)
    torch.testing.assert_close(
        llama(tokens, attention_mask=mask, labels=labels).loss, llama(plain, labels=plain).loss
    )


@pytest.mark.parametrize("layers", [None, [0], [1]], ids=["all layers", "first", "last"])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens_q"])
@torch.no_grad()
def test_packed_documents_equal_separate_ones(base, make_model, make_tokens, told_by, layers):
    model, rows = make_model(base, layers=layers), documents(make_tokens)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    told = {"position_ids": restarting_positions()} if told_by == "position_ids" else {told_by: bounds}
    output = model(torch.cat(rows)[None], **told)
    assert CACHE_ARGUMENT not in output
    for row, logits in zip(rows, output.logits[0].split(LENGTHS), strict=True):
        torch.testing.assert_close(logits, model(row[None]).logits[0], **TOLERANCE)


@torch.no_grad()
def test_positions_that_count_on_are_welcome(model, make_tokens):
    tokens = make_tokens(2, 20)
    assert torch.equal(model(tokens, position_ids=torch.arange(20)[None]).logits, model(tokens).logits)


@torch.no_grad()
def test_embeddings_serve_as_input(model, make_tokens):
    tokens = make_tokens(2, 20)
    embeddings = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(tokens).logits)


@torch.no_grad()
def test_packed_documents_that_cannot_be_are_refused(llama, make_tokens):
    tokens, positions = make_tokens(1, sum(LENGTHS)), restarting_positions()
    for reason in (
        {"attention_mask": torch.ones_like(tokens)},
        {"use_cache": True},
        {CACHE_ARGUMENT: InfiniCache(llama.config)},
    ):
        with pytest.raises(
            ValueError, match="as a batch of one, without attention_mask, cache and use_cache=True"
        ):
            llama(tokens, position_ids=positions, **reason)
    with pytest.raises(ValueError, match="as a batch of one"):
        llama(tokens.expand(2, -1), position_ids=positions)


@torch.no_grad()
def test_positions_that_jump_are_refused(llama, make_tokens):
    with pytest.raises(ValueError, match=r"position_ids jump to 7.*count on by 1"):
        llama(make_tokens(1, 4), position_ids=torch.tensor([[0, 1, 7, 8]]))


@torch.no_grad()
def test_attention_masks_of_other_shapes_are_refused(llama, make_tokens):
    tokens = make_tokens(2, 8)
    for mask in (torch.ones(2, 1, 8, 8), torch.ones(2, 7), {"full_attention": None}):
        with pytest.raises(ValueError, match=r"attention_mask is .*give .* = \(2, 8\)"):
            llama(tokens, attention_mask=mask)
    cache = llama(tokens, use_cache=True)[CACHE_ARGUMENT]
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 8\).* = \(2, 16\)"):
        llama(tokens, attention_mask=torch.ones(2, 8), **{CACHE_ARGUMENT: cache})


def test_a_sequence_over_several_processes_takes_segments_alone(make_base, make_model, make_tokens):
    model = make_model(make_base(LlamaForCausalLM), local_attention="sliding")
    with pytest.raises(ValueError, match="'sliding' tokens see keys that another process holds; use data"):
        model(make_tokens(1, 16), context_group=object())


def test_inputs_are_tokens_or_embeddings(llama, make_tokens):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        llama()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        llama(make_tokens(1, 2), inputs_embeds=torch.zeros(1, 2, 32))


def test_attention_weights_are_refused(make_base, make_model, make_tokens):
    base = make_base(LlamaForCausalLM)
    base.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions=True"):
        make_model(base)(make_tokens(1, 5), output_attentions=True)


@torch.no_grad()
def test_hidden_states_are_returned_when_asked_for(model, make_tokens):
    hidden_states = model(make_tokens(2, 20), output_hidden_states=True).hidden_states
    assert [tuple(each.shape) for each in hidden_states] == [(2, 20, 32)] * 3


def test_attention_that_is_not_causal_is_refused(llama, make_tokens):
    with pytest.raises(ValueError, match="is_causal=False"):
        llama(make_tokens(1, 5), is_causal=False)


def test_sequences_split_over_processes_are_refused(llama, make_tokens, monkeypatch):
    state = pytest.importorskip("accelerate.state")
    parallelism = type("Parallelism", (), {"cp_enabled": True, "sp_enabled": False})()
    monkeypatch.setitem(state.AcceleratorState._shared_state, "parallelism_config", parallelism)
    with pytest.raises(ValueError, match="splits sequences over processes"):
        llama(make_tokens(1, 5))
