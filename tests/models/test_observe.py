from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.memory_off import memory_off
from infini_attention.models.observe import Observation, gate_logits, observe, token_shares
from infini_attention.ops import infini_attention

SEGMENT = 8
LENGTH = 5 * SEGMENT + 3


def set_gates(model: Any, logit: float) -> None:
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.memory_gate.logits, logit)


def assert_same(one: Observation, other: Observation) -> None:
    for name, figure in vars(one).items():
        torch.testing.assert_close(figure, getattr(other, name), rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def inputs(make_tokens: Callable[..., Tensor]) -> dict[str, Tensor]:
    tokens = make_tokens(2, LENGTH)
    return {"input_ids": tokens, "labels": tokens}


def test_gate_logits_are_those_of_every_layer_with_a_memory(
    make_base: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    base = make_base(LlamaForCausalLM, num_hidden_layers=3)
    model = make_model(base, layers=[0, 2]).bfloat16()
    expected = [model.model.layers[layer].self_attn.memory_gate.logits for layer in (0, 2)]
    torch.testing.assert_close(gate_logits(model), torch.stack(expected), rtol=0, atol=0)
    assert not gate_logits(model).requires_grad


def test_an_adapters_copy_of_a_gate_is_the_one_that_counts(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["memory_gate"])
    adapted = peft.get_peft_model(llama, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.fill_(3.0)
    assert torch.equal(gate_logits(adapted), torch.full((2, 4), 3.0))


def test_a_model_without_memories_is_refused(make_base: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no memories; give an infini"):
        observe(make_base(LlamaForCausalLM), {})


@pytest.mark.parametrize("empty_memory", ["local", "gated"])
@pytest.mark.parametrize(("logit", "share"), [(-1e4, 0.0), (1e4, 1.0)])
def test_shut_gates_give_the_memory_no_share_and_open_ones_all(
    make_base: Callable[..., Any],
    make_model: Callable[..., Any],
    inputs: dict[str, Tensor],
    logit: float,
    share: float,
    empty_memory: str,
) -> None:
    model = make_model(make_base(LlamaForCausalLM), empty_memory=empty_memory)
    set_gates(model, logit)
    assert torch.equal(observe(model, inputs).share, torch.full((2, 4), share))


@pytest.mark.parametrize("length", [SEGMENT - 1, SEGMENT])
def test_what_nobody_could_read_has_no_share(llama: Any, inputs: dict[str, Tensor], length: int) -> None:
    seen = observe(llama, {name: x[:, :length] for name, x in inputs.items()})
    assert torch.equal(seen.share, torch.zeros(2, 4))
    assert seen.loss == seen.loss_memory_off
    assert seen.memory_gain == 0
    written = length >= SEGMENT
    for figure in (seen.memory_norm, seen.normalizer, seen.saturation):
        assert figure.shape == (2, 2)
        assert bool((figure > 0).all()) == bool(figure.any()) == written


@pytest.mark.parametrize("memory", [{}, {"update_rule": "delta"}, {"normalization": "unit"}], ids=str)
def test_figures_are_those_of_the_reference(
    make_base: Callable[..., Any],
    make_model: Callable[..., Any],
    inputs: dict[str, Tensor],
    memory: dict[str, str],
) -> None:
    model = make_model(make_base(LlamaForCausalLM, num_hidden_layers=1), **memory)
    attention = model.model.layers[0].self_attn
    kept: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda _, a, given: kept.append(given), with_kwargs=True)
    seen = observe(model, inputs)
    hook.remove()

    query, key, value = attention._project(kept[0]["hidden_states"])
    rotation = kept[0]["segment_context"].rotations["full_attention"]
    local_query, local_key = attention._rotate(query, key, rotation)
    settings = {"segment_length": SEGMENT, **memory, "backend": "reference"}
    settings |= {"local_query": local_query, "local_key": local_key, "empty_memory": "gated"}
    dot, _ = infini_attention(query, key, value, torch.full((4,), -1e4), **settings)
    mem, state = infini_attention(query, key, value, torch.full((4,), 1e4), **settings)
    gates = gate_logits(model)[0].sigmoid()
    memory_part = gates * mem[:, :, SEGMENT:].square().sum(dim=(0, 2, 3)).sqrt()
    local_part = (1 - gates) * dot[:, :, SEGMENT:].square().sum(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(seen.gates[0], gates)
    torch.testing.assert_close(seen.share[0], memory_part / (memory_part + local_part))
    torch.testing.assert_close(seen.memory_norm[0], state.memory.square().sum(dim=(2, 3)).sqrt().mean(dim=0))
    torch.testing.assert_close(seen.normalizer[0], state.normalizer.amax(dim=2).mean(dim=0))

    written = slice(0, 5 * SEGMENT)
    read = state.read(key, normalization=memory.get("normalization", "sum"))
    answers, values = read[:, :, written], value[:, :, written]
    pairs = torch.stack([(x - x.mean(dim=2, keepdim=True)).flatten(2) for x in (answers, values)], dim=2)
    for head in range(2):
        recalled = [torch.corrcoef(pairs[row, head])[0, 1].item() for row in range(2)]
        assert seen.saturation[0, head].item() == pytest.approx(1 - sum(recalled) / 2, abs=1e-5)


def shares_of(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    """(layers, batch, length, heads) of one forward pass."""
    seen: dict[int, Tensor] = {}
    with torch.no_grad(), token_shares(model, seen.__setitem__):
        model(tokens, **inputs)
    model(tokens[:, :1])
    return torch.stack([seen[layer] for layer in range(2)])


def test_a_token_has_a_share_from_the_second_segment_on(
    llama: Any, make_tokens: Callable[..., Tensor]
) -> None:
    shares = shares_of(llama, make_tokens(2, LENGTH))
    assert shares.shape == (2, 2, LENGTH, 4)
    assert not shares[:, :, :SEGMENT].any()
    assert bool(((shares > 0) & (shares < 1))[:, :, SEGMENT:].all())


def test_a_tokens_share_does_not_depend_on_what_stands_beside_it(
    llama: Any, make_tokens: Callable[..., Tensor]
) -> None:
    tokens, first = make_tokens(2, LENGTH), 2 * SEGMENT + 5
    whole = shares_of(llama, tokens)
    torch.testing.assert_close(shares_of(llama, tokens[1:])[:, 0], whole[:, 1])
    padded = torch.nn.functional.pad(tokens, (3, 0))
    shares = shares_of(llama, padded, attention_mask=(padded != 0).long())
    assert not shares[:, :, :3].any()
    torch.testing.assert_close(shares[:, :, 3:], whole)
    cache = InfiniCache(llama.config)
    parts = [
        shares_of(llama, part, **{CACHE_ARGUMENT: cache}) for part in tokens.tensor_split([first], dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)


def test_a_memory_fills_up(llama: Any, make_tokens: Callable[..., Tensor]) -> None:
    tokens = make_tokens(1, 64 * SEGMENT)
    little, much = (
        observe(llama, {"input_ids": tokens[:, :n], "labels": tokens[:, :n]}).saturation[0].mean()
        for n in (SEGMENT, 64 * SEGMENT)
    )
    assert 0 < little < much - 0.2
    assert much < 1


def test_losses_are_those_of_the_model_with_memory_and_without(model: Any, inputs: dict[str, Tensor]) -> None:
    seen = observe(model, inputs)
    with torch.no_grad():
        assert seen.loss == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
        with memory_off(model):
            assert seen.loss_memory_off == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    assert seen.loss != seen.loss_memory_off
    assert seen.memory_gain == seen.loss_memory_off - seen.loss


def test_labels_may_stand_where_they_are_predicted(llama: Any, inputs: dict[str, Tensor]) -> None:
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    seen = observe(llama, {"input_ids": inputs["input_ids"], "shift_labels": shifted})
    assert_same(seen, observe(llama, inputs))


def test_the_model_stays_as_it_was(llama: Any, inputs: dict[str, Tensor]) -> None:
    llama.train()
    llama.model.layers[1].eval()
    modes = [module.training for module in llama.modules()]
    weights = {name: x.clone() for name, x in llama.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    observe(llama, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in llama.modules()] == modes
    assert all(torch.equal(x, weights[name]) for name, x in llama.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in llama.parameters())


def test_no_hook_stays_where_a_call_fails(llama: Any, inputs: dict[str, Tensor]) -> None:
    llama.train()
    with pytest.raises(ValueError, match="give labels"):
        observe(llama, {"input_ids": inputs["input_ids"]})
    assert llama.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


def test_training_afterwards_is_as_if_nobody_had_looked(llama: Any, inputs: dict[str, Tensor]) -> None:
    gradients = []
    for look in (False, True):
        llama.zero_grad()
        if look:
            observe(llama, inputs)
        llama.train()(**inputs).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in llama.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_cache_is_gone_on_from_and_not_moved(llama: Any, make_tokens: Callable[..., Tensor]) -> None:
    tokens, first = make_tokens(2, 6 * SEGMENT + 3), 2 * SEGMENT + 5
    cache = InfiniCache(llama.config)
    with torch.no_grad():
        llama(tokens[:, :first], **{CACHE_ARGUMENT: cache})
    rest = {"input_ids": tokens[:, first:], "labels": tokens[:, first:]}
    seen = observe(llama, rest | {CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == first
    labels = tokens.clone()
    labels[:, : first + 1] = -100
    whole = observe(llama, {"input_ids": tokens, "labels": labels})
    torch.testing.assert_close(seen.memory_norm, whole.memory_norm)
    torch.testing.assert_close(seen.normalizer, whole.normalizer)
    assert seen.loss == pytest.approx(whole.loss, rel=1e-5)


def test_of_a_cache_the_new_tokens_alone_are_looked_at(
    llama: Any, make_tokens: Callable[..., Tensor]
) -> None:
    tokens = make_tokens(1, 3 * SEGMENT)
    cache = InfiniCache(llama.config)
    with torch.no_grad():
        llama(tokens[:, :SEGMENT], **{CACHE_ARGUMENT: cache})
    few = tokens[:, SEGMENT : SEGMENT + 3]
    seen = observe(llama, {"input_ids": few, "labels": few, CACHE_ARGUMENT: cache})
    assert bool((seen.share > 0).all())  # there is something to read from the first token on
    assert not seen.saturation.any()  # none of them is in memory yet


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(llama: Any, make_tokens: Callable[..., Tensor], side: str) -> None:
    tokens = make_tokens(1, LENGTH)
    pad = (5, 0) if side == "left" else (0, 5)
    padded = {
        "input_ids": torch.nn.functional.pad(tokens, pad, value=0),
        "labels": torch.nn.functional.pad(tokens, pad, value=-100),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(tokens), pad, value=0),
    }
    if side == "left":
        padded["labels"][:, 5] = -100  # else the last pad would have to predict it
    assert_same(observe(llama, padded), observe(llama, {"input_ids": tokens, "labels": tokens}))


def test_packed_documents_are_as_rows_and_short_ones_do_not_count(
    llama: Any, make_tokens: Callable[..., Tensor]
) -> None:
    tokens = make_tokens(1, 2 * LENGTH + 5)
    documents = tokens[0, : 2 * LENGTH].view(2, LENGTH)
    starts = torch.cat([torch.arange(LENGTH), torch.arange(LENGTH), torch.arange(5)])[None]
    labels = tokens.clone()
    labels[:, [LENGTH, *range(2 * LENGTH, 2 * LENGTH + 5)]] = -100
    packed = {"input_ids": tokens, "labels": labels, "position_ids": starts}
    assert_same(observe(llama, packed), observe(llama, {"input_ids": documents, "labels": documents}))


def test_a_step_taken_in_runs_of_segments_is_seen_whole(llama: Any, inputs: dict[str, Tensor]) -> None:
    whole = observe(llama, inputs)
    assert_same(observe(llama, inputs | {"checkpoint_segments": 2, "detach_every": 2}), whole)


def test_a_repeated_segment_weighs_in_the_memory(llama: Any, inputs: dict[str, Tensor]) -> None:
    weights = torch.ones(2, 6)
    weights[:, 0] = 100.0
    once, often = observe(llama, inputs), observe(llama, inputs | {"segment_weights": weights})
    assert bool((often.memory_norm > 5 * once.memory_norm).all())


def test_half_precision_is_seen_in_fp32(llama: Any, inputs: dict[str, Tensor]) -> None:
    full, half = observe(llama, inputs), observe(llama.bfloat16(), inputs)
    for name in ("gates", "share", "memory_norm", "normalizer", "saturation"):
        assert getattr(half, name).dtype == torch.float32
        torch.testing.assert_close(getattr(half, name), getattr(full, name), rtol=0.1, atol=0.02)
