import pytest
import torch
from transformers import LlamaForCausalLM

from infini_attention.models import InfiniCache, memory_off, retrofit
from infini_attention.models.compat import CACHE_ARGUMENT


def gradients(model, tokens, **kwargs):
    model.zero_grad()
    model(tokens, labels=tokens, **kwargs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_reach_every_parameter_and_every_gate(model, make_tokens):
    found = gradients(model.train(), make_tokens(2, 30))
    assert all(gradient.isfinite().all() for gradient in found.values())
    gates = [gradient for name, gradient in found.items() if "memory_gate" in name]
    assert len(gates) == 2 and all((gate != 0).all() for gate in gates)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_with_gradient_checkpointing(model, make_tokens, reentrant):
    tokens = make_tokens(2, 30)
    plain = gradients(model.train(), tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


def test_the_write_side_is_trained(llama, make_tokens):
    """The loss of the third segment has a gradient in the first segment's inputs."""
    embeddings = llama.get_input_embeddings()(make_tokens(1, 24)).detach().requires_grad_()
    llama(inputs_embeds=embeddings).logits[:, 16:].square().sum().backward()
    assert (embeddings.grad[:, :8].abs().amax(dim=-1) > 0).all()


def test_a_cache_and_gradient_checkpointing_are_refused_together(llama, make_tokens):
    llama.train().gradient_checkpointing_enable()
    assert CACHE_ARGUMENT not in llama(make_tokens(1, 9))
    with pytest.raises(ValueError, match=r"gradient checkpointing .*call model.eval\(\)"):
        llama(make_tokens(1, 9), **{CACHE_ARGUMENT: InfiniCache(llama.config)})
    llama.eval()
    llama(make_tokens(1, 9), **{CACHE_ARGUMENT: InfiniCache(llama.config)})


def test_attention_dropout_is_refused_in_training_only(make_base, make_model, make_tokens):
    model = make_model(make_base(LlamaForCausalLM, attention_dropout=0.1))
    model(make_tokens(1, 9))
    with pytest.raises(ValueError, match=r"attention_dropout is 0.1.*model.config.attention_dropout = 0.0"):
        model.train()(make_tokens(1, 9))
    model.config.attention_dropout = 0.0
    model(make_tokens(1, 9))


def test_a_model_in_fp32_trains_under_autocast(model, make_tokens):
    tokens = make_tokens(2, 30)
    plain = gradients(model.train(), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model, tokens)
    for name, gradient in mixed.items():
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.9


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_training_lowers_the_loss_and_moves_the_gates(make_base, make_tokens, update_rule):
    model = retrofit(
        make_base(LlamaForCausalLM), segment_length=8, update_rule=update_rule, gate_init=0.0
    ).train()
    gates = [p for name, p in model.named_parameters() if "memory_gate" in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens, losses = make_tokens(1, 40), []
    for _ in range(5):
        losses.append(model(tokens, labels=tokens).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all((gate != 0).all() for gate in gates)


def test_adapters_train_the_gates_beside_them_and_come_back(
    llama, make_base, make_model, make_tokens, tmp_path
):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["memory_gate"], r=2)
    adapted = peft.get_peft_model(llama, config)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    assert sum("memory_gate" in name for name in trained) == 2
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    tokens = make_tokens(1, 40)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert all((trained[name] != before[name]).all() for name in trained if "memory_gate" in name)

    adapted.eval().save_pretrained(tmp_path)
    fresh = make_model(make_base(LlamaForCausalLM))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, adapted(input_ids=tokens).logits)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, again(input_ids=tokens).logits)


@torch.no_grad()
def test_memory_off_leaves_local_attention_alone_and_reopens_the_gates(base, make_model, make_tokens):
    model, tokens = make_model(base), make_tokens(1, 30)
    before = model(tokens).logits
    with memory_off(model):
        local = model(tokens, use_cache=False).logits
        changed = tokens.clone()
        changed[:, 7] = 3 + (tokens[:, 7] - 2) % 61  # in the first segment, which the last one cannot see
        assert torch.equal(model(changed).logits[:, 24:], local[:, 24:])
        separate = [model(part).logits for part in tokens.split(8, dim=1)]
        torch.testing.assert_close(local, torch.cat(separate, dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(local, before, atol=1e-3)
    assert torch.equal(model(tokens).logits, before)


def test_memory_off_reopens_the_gates_after_an_error(llama):
    gate = llama.model.layers[0].self_attn.memory_gate.logits
    before = gate.detach().clone()
    with pytest.raises(RuntimeError, match="on the way"), memory_off(llama):
        raise RuntimeError("on the way")
    assert torch.equal(gate, before)
