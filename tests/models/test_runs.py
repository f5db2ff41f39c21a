import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT

RUNS = [
    {"checkpoint_segments": 1},
    {"checkpoint_segments": 2},
    {"checkpoint_segments": 100},
    {"detach_every": 100},
    {"checkpoint_segments": 2, "detach_every": 100},
]


def loss_and_gradients(model: PreTrainedModel, tokens: Tensor, **settings: object) -> list[Tensor]:
    model.zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False, **settings).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_runs_change_neither_the_loss_nor_any_gradient(model, make_tokens, settings):
    if len(model.config.infini_layers) < 2:
        pytest.skip("this family's tiny model has a layer without a memory")
    tokens = make_tokens(2, 43)
    if "detach_every" in settings and "checkpoint_segments" in settings:
        settings = {**settings, "detach_every": 6}  # more than there are
    wanted = loss_and_gradients(model.train(), tokens)
    for ours, theirs in zip(loss_and_gradients(model, tokens, **settings), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_runs_take_weights_padding_and_a_carried_cache(llama, make_tokens):
    llama.train()
    first, tokens = make_tokens(2, 11), make_tokens(2, 30, seed=3)
    weights = torch.rand(2, 5) * 3 + 1  # 3 tokens are open: the call touches 5 segments
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    for given in ({"segment_weights": weights}, {"attention_mask": mask}):
        found = []
        for settings in ({}, {"checkpoint_segments": 2}):
            cache = InfiniCache(llama.config)
            if "segment_weights" in given:
                llama(first, **{CACHE_ARGUMENT: cache})
            llama.zero_grad()
            output = llama(tokens, **given, **settings, **{CACHE_ARGUMENT: cache})
            output.logits.square().sum().backward()
            found.append([output.logits.detach(), *(p.grad.clone() for p in llama.parameters())])
            found[-1] += [cache.layers[1].state.memory.detach(), cache.layers[1].state.length]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_checkpointed_runs_keep_states_and_not_activations(llama, make_tokens):
    tokens = make_tokens(1, 64 * 8)

    def kept(**settings: int) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            llama.train()(tokens, labels=tokens, use_cache=False, loss_chunk=64, **settings)
        return total

    # The hooks of checkpoint keep inner ones from seeing what it drops: what is counted is what is kept.
    assert kept(checkpoint_segments=8) < kept() / 10


@pytest.mark.parametrize("checkpointed", [{}, {"checkpoint_segments": 1}], ids=["plain", "checkpointed"])
def test_detaching_cuts_gradients_where_it_says(llama, make_tokens, checkpointed):
    embeddings = llama.get_input_embeddings()(make_tokens(1, 40)).detach().requires_grad_()
    output = llama.train()(inputs_embeds=embeddings, use_cache=False, detach_every=2, **checkpointed)
    output.logits[:, 32:].square().sum().backward()
    reached = embeddings.grad.abs().amax(dim=-1)[0] > 0
    assert not reached[:32].any() and reached[32:].all()  # segments 0 to 1 | 2 to 3 | 4
    embeddings.grad = None
    output = llama(inputs_embeds=embeddings, use_cache=False, detach_every=2, **checkpointed)
    output.logits[:, 24:32].square().sum().backward()
    reached = embeddings.grad.abs().amax(dim=-1)[0] > 0
    assert not reached[:16].any() and reached[16:32].all()


def test_what_runs_cannot_do_is_refused(llama, make_model, make_base, make_tokens):
    tokens = make_tokens(1, 20)
    with pytest.raises(ValueError, match="checkpoint_segments is 0; give at least 1"):
        llama(tokens, checkpoint_segments=0)
    with pytest.raises(ValueError, match="detach_every is 3, which is no multiple of checkpoint_segments 2"):
        llama(tokens, checkpoint_segments=2, detach_every=3)
    with pytest.raises(ValueError, match="documents are packed"):
        positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
        llama(tokens, position_ids=positions, use_cache=False, checkpoint_segments=1)
    with pytest.raises(ValueError, match="documents are packed"):
        positions = torch.cat([torch.arange(1), torch.arange(19)])[None]  # a document of one token
        llama(tokens, position_ids=positions, use_cache=False, checkpoint_segments=1)
    with pytest.raises(ValueError, match="position_ids jump to 3"):
        llama(tokens, position_ids=3 * torch.arange(20)[None], use_cache=False, checkpoint_segments=1)
    with pytest.raises(ValueError, match="output_hidden_states=True, but runs keep no hidden states"):
        llama(tokens, output_hidden_states=True, checkpoint_segments=1)
    with pytest.raises(ValueError, match="segment_weights are set, and rows are padded"):
        mask = torch.tensor([[0] + [1] * 19])
        llama(tokens, attention_mask=mask, segment_weights=torch.ones(1, 3), checkpoint_segments=1)
    partly = make_model(make_base(LlamaForCausalLM), layers=[0])
    with pytest.raises(ValueError, match=r"layers \[1\] have no memory"):
        partly(tokens, checkpoint_segments=1)
    llama.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="layers are checkpointed already"):
        llama(tokens, use_cache=False, checkpoint_segments=1)
