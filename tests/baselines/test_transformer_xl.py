"""Transformer-XL against its equations, and against a public implementation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infini_attention.baselines.systems import system_name
from infini_attention.models.families import InfiniLlamaConfig, InfiniLlamaForCausalLM
from infini_attention.models.memory_off import SHUT

from . import naive
from .cases import SEGMENT, SIZES, make_baseline, make_tokens

LENGTH = 30  # three whole segments and a piece
WIDTH, HEADS, KV_HEADS = SIZES["head_dim"], SIZES["num_attention_heads"], SIZES["num_key_value_heads"]


def written_out(model: Any, tokens: Tensor) -> Tensor:
    """Section 3.2 of arXiv 1901.02860, with RoPE at positions in the text: h~ = [SG(h before) o h]."""
    before: dict[int, Tensor] = {}

    def attend(layer: int, start: int, inputs: Tensor, weights: dict[str, Tensor]) -> Tensor:
        kept = before.get(layer, inputs[:0])
        both = torch.cat([kept.detach(), inputs])
        before[layer] = inputs
        query = naive.heads(inputs, weights["q"], HEADS)
        key, value = (naive.heads(both, weights[name], KV_HEADS, HEADS // KV_HEADS) for name in "kv")
        outputs = naive.attention(query, key, value, start)
        return torch.stack([torch.cat(row) for row in zip(*outputs, strict=True)])

    return naive.decoder(model, tokens, attend)


def test_it_is_the_papers_equations_and_so_are_its_gradients() -> None:
    model, tokens = make_baseline("transformer_xl").double(), make_tokens(1, LENGTH)
    naive.assert_same(model, model.model(tokens).last_hidden_state[0], written_out(model, tokens[0]))


@torch.no_grad()
def test_it_is_what_a_public_implementation_computes() -> None:
    public = pytest.importorskip("x_transformers")
    model = make_baseline("transformer_xl", num_key_value_heads=HEADS, rms_norm_eps=1e-12)
    decoder = public.Decoder(
        dim=SIZES["hidden_size"],
        depth=SIZES["num_hidden_layers"],
        heads=HEADS,
        attn_dim_head=WIDTH,
        rotary_pos_emb=True,
        rotary_emb_dim=WIDTH,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_mult=SIZES["intermediate_size"] / SIZES["hidden_size"],
    )
    sizes = {"num_tokens": SIZES["vocab_size"], "max_seq_len": SEGMENT, "max_mem_len": SEGMENT}
    theirs = public.TransformerWrapper(**sizes, attn_layers=decoder).eval()
    copy_weights(model, theirs)
    tokens, cached, logits = make_tokens(2, LENGTH), None, []
    for segment in tokens.split(SEGMENT, dim=1):
        output, cached = theirs(segment, mems=cached, return_mems=True)
        logits.append(output)
    torch.testing.assert_close(model(tokens).logits, torch.cat(logits, dim=1), rtol=1e-4, atol=1e-4)


def copy_weights(model: Any, theirs: Any) -> None:
    """Give x-transformers' model the weights of ours."""
    theirs.token_emb.emb.weight.copy_(model.model.embed_tokens.weight)
    theirs.to_logits.weight.copy_(model.lm_head.weight)
    copy_norm(model.model.norm, theirs.attn_layers.final_norm)
    blocks = iter(theirs.attn_layers.layers)
    for layer in model.model.layers:
        (norm, *_), attention, _ = next(blocks)
        copy_norm(layer.input_layernorm, norm)
        attention.to_q.weight.copy_(interleaved(layer.self_attn.q_proj.weight))
        attention.to_k.weight.copy_(interleaved(layer.self_attn.k_proj.weight))
        attention.to_v.weight.copy_(layer.self_attn.v_proj.weight)
        attention.to_out.weight.copy_(layer.self_attn.o_proj.weight)
        (norm, *_), feedforward, _ = next(blocks)
        copy_norm(layer.post_attention_layernorm, norm)
        entrance, _, exit_ = feedforward.ff
        entrance.proj.weight.copy_(torch.cat([layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight]))
        entrance.proj.bias.zero_()
        exit_.weight.copy_(layer.mlp.down_proj.weight)


def copy_norm(ours: Any, theirs: Any) -> None:
    theirs.g.copy_(ours.weight - float(theirs.unit_offset))


def interleaved(weight: Tensor) -> Tensor:
    """The same projection for a rotation that turns neighbouring entries, not the two halves of a head."""
    return weight.view(HEADS, 2, WIDTH // 2, -1).transpose(1, 2).reshape(weight.shape)


def test_no_gradient_flows_into_the_segment_before() -> None:
    """The last segment's loss has none for inputs of the third, which its tokens see."""
    model = make_baseline("transformer_xl")
    embeddings = model.get_input_embeddings()(make_tokens(1, 4 * SEGMENT)).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[:, 3 * SEGMENT :].square().sum().backward()
    touched = embeddings.grad[0].abs().amax(dim=-1) > 0
    assert not touched[: 3 * SEGMENT].any() and touched[3 * SEGMENT :].all()


def test_tables_tell_whether_it_stops_them() -> None:
    assert system_name(make_baseline("transformer_xl")) == "Transformer-XL"
    not_stopped = make_baseline("transformer_xl", stop_gradient=False)
    assert system_name(not_stopped) == "Transformer-XL, gradient not stopped"


def test_gradients_can_flow_through_the_cache() -> None:
    """What they are then is what a model has that sees two segments at once, of the second one's loss."""
    model, whole = (
        make_baseline("transformer_xl", stop_gradient=False).double(),
        make_baseline("full").double(),
    )
    tokens = make_tokens(1, 2 * SEGMENT)
    whole.load_state_dict(model.state_dict())
    gradients = []
    for each in (model, whole):
        embeddings = each.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = each(inputs_embeds=embeddings).logits
        logits[:, SEGMENT:].square().sum().backward()
        gradients.append(embeddings.grad)
    ours, wanted = (gradient[:, :SEGMENT] for gradient in gradients)
    most = float(wanted.abs().amax())
    assert most > 0
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * most)  # angles are fp32


def test_it_is_a_memory_that_is_shut_beside_sliding_attention_and_stopped_gradients() -> None:
    """What an Infini-attention of that kind adds to Transformer-XL is its memory, and nothing else."""
    model, tokens = make_baseline("transformer_xl").double(), make_tokens(2, LENGTH)
    config = InfiniLlamaConfig(**SIZES, segment_length=SEGMENT, local_attention="sliding", gate_init=SHUT)
    infini = InfiniLlamaForCausalLM(config).double()
    missing, unexpected = infini.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("memory_gate.logits") for name in missing)
    logits, gradients = [], []
    for each, how in ((model, {}), (infini, {"stop_gradient": True})):
        logits.append(each(tokens, use_cache=False, **how).logits)
        logits[-1].square().sum().backward()
        gradients.append({name: x.grad for name, x in each.named_parameters() if "memory" not in name})
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)  # angles are fp32
    for name, wanted in gradients[0].items():
        most = float(wanted.abs().amax())
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-5 * most, msg=name)


@torch.no_grad()
def test_every_layer_lets_a_token_see_one_segment_further_back() -> None:
    model, tokens = make_baseline("transformer_xl"), make_tokens(1, 6 * SEGMENT)
    changed = tokens.clone()
    changed[:, :SEGMENT] = make_tokens(1, SEGMENT, seed=8)
    moved = (model(changed).logits - model(tokens).logits).abs().amax(dim=-1)[0].view(6, SEGMENT).amax(dim=1)
    layers = SIZES["num_hidden_layers"]
    assert (moved[: layers + 1] > 0).all() and (moved[layers + 1 :] == 0).all()


@torch.no_grad()
def test_only_the_distance_to_a_cached_token_counts() -> None:
    """A pattern with the period of a segment is the same from the third layer's reach on."""
    model, tokens = make_baseline("transformer_xl"), make_tokens(1, SEGMENT).repeat(1, 60)
    logits = model(tokens).logits[0].view(60, SEGMENT, -1)
    torch.testing.assert_close(logits[59], logits[4], rtol=1e-4, atol=1e-4)
