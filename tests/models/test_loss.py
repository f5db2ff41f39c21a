from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from infini_attention.models.loss import IGNORED, Teaching, logits_of


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_chunked_loss_and_its_gradients_are_those_of_the_whole(model, make_tokens, chunk):
    tokens = make_tokens(2, 30)
    labels = tokens.clone()
    labels[0, :9] = IGNORED
    found = []
    for settings in ({}, {"loss_chunk": chunk}):
        model.zero_grad()
        loss = model(tokens, labels=labels, use_cache=False, **settings).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_labels_that_ask_for_little_give_the_same_loss_and_gradients(model, make_tokens):
    tokens, wanted = make_tokens(2, 30), make_tokens(2, 30)
    wanted[torch.rand(2, 30) < 0.8] = IGNORED
    wanted[:, -1] = IGNORED  # labels, moved to the left, cannot ask for it
    found = []
    for labels in ({"shift_labels": wanted}, {"labels": wanted.roll(1, dims=1)}):
        model.zero_grad()
        loss = model(tokens, **labels, use_cache=False, loss_chunk=8).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, others in zip(*found, strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-6)


def test_a_steps_whole_count_divides_the_loss(llama, make_tokens):
    tokens = make_tokens(2, 30)
    settings = {"labels": tokens, "use_cache": False, "num_items_in_batch": 100}
    whole, chunked = llama(tokens, **settings).loss, llama(tokens, loss_chunk=8, **settings).loss
    torch.testing.assert_close(whole, chunked)


def test_labels_of_another_shape_are_refused(llama, make_tokens):
    with pytest.raises(ValueError, match=r"labels are \(2, 24\), and there are \(2, 30\) tokens"):
        llama(make_tokens(2, 30), labels=make_tokens(2, 24), use_cache=False, loss_chunk=8)


def test_logits_are_those_of_forward(model, make_tokens):
    output = model(make_tokens(1, 20), output_hidden_states=True)
    torch.testing.assert_close(model.logits_of(output.hidden_states[-1]), output.logits)


def test_segment_weights_reach_every_layer(llama, make_tokens):
    tokens = make_tokens(2, 24)
    plain = llama(tokens).logits
    torch.testing.assert_close(llama(tokens, segment_weights=torch.ones(2, 3)).logits, plain)
    weights = torch.ones(2, 3)
    weights[1, 0] = 5.0
    weighted = llama(tokens, segment_weights=weights).logits
    torch.testing.assert_close(weighted[0], plain[0])
    torch.testing.assert_close(weighted[1, :16], plain[1, :16])  # one segment in memory is a mean of itself
    assert not torch.allclose(weighted[1, 16:], plain[1, 16:])


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_a_teacher_adds_its_divergence_over_the_first_tokens(model, base, make_tokens, name):
    teacher = deepcopy(base)
    torch.nn.init.normal_(teacher.lm_head.weight)
    tokens, wanted = make_tokens(2, 30), make_tokens(2, 30, seed=5)
    wanted[0, 3:7] = IGNORED
    with torch.no_grad():
        hidden = teacher.model(tokens[:, :20]).last_hidden_state
        taught = teacher(tokens[:, :20]).logits.log_softmax(dim=-1)
    labels = {name: wanted if name == "shift_labels" else F.pad(wanted, (1, 0), value=IGNORED)[:, :-1]}
    if name == "labels":
        wanted = F.pad(wanted[:, :-1], (0, 1), value=IGNORED)
    ours = model(tokens, use_cache=False).logits.log_softmax(dim=-1)
    asked = wanted != IGNORED
    lost = (taught.exp() * (taught - ours[:, :20])).sum(dim=-1)[asked[:, :20]].sum()
    expected = F.cross_entropy(ours[asked], wanted[asked]) + 0.5 * lost / asked.sum()
    teaching = Teaching(hidden, lambda x: logits_of(teacher, x), weight=0.5)
    found = model(tokens, **labels, use_cache=False, loss_chunk=7, teaching=teaching).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_mistakes_are_named(llama, make_tokens):
    with pytest.raises(ValueError, match="there are no labels"):
        llama(make_tokens(1, 9), loss_chunk=4)
    with pytest.raises(ValueError, match="loss_chunk is 0"):
        llama(make_tokens(1, 9), labels=make_tokens(1, 9), loss_chunk=0)
    with pytest.raises(ValueError, match="segment_weights has shape"):
        llama(make_tokens(1, 9), segment_weights=torch.ones(1, 5))
    teaching = Teaching(torch.zeros(1, 9, 32), logits_of, weight=1.0)
    with pytest.raises(ValueError, match="teaching is given without loss_chunk"):
        llama(make_tokens(1, 9), labels=make_tokens(1, 9), teaching=teaching)
