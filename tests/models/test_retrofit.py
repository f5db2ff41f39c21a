from itertools import combinations

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from infini_attention.models import FAMILIES, retrofit
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.families import InfiniLlamaConfig, InfiniLlamaForCausalLM, gemma3


@pytest.mark.parametrize("length", [1, 5, 8])
@torch.no_grad()
def test_logits_equal_the_bases_within_one_segment(base, model, make_tokens, length):
    tokens = make_tokens(2, length)
    if getattr(base.config, "attn_logit_softcapping", None) is None:
        assert torch.equal(model(tokens).logits, base(tokens).logits)
    else:  # SDPA cannot cap scores, and some releases of transformers leave the cap out rather than say so
        base.set_attn_implementation("eager")
        torch.testing.assert_close(model(tokens).logits, base(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_equal_an_eager_bases_within_one_segment(base, make_model, make_tokens):
    base.set_attn_implementation("eager")
    tokens = make_tokens(2, 8)
    torch.testing.assert_close(make_model(base)(tokens).logits, base(tokens).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_logits_equal_the_bases_within_two_segments_where_attention_slides(base, make_model, make_tokens):
    base.set_attn_implementation("eager")
    model, tokens = make_model(base, local_attention="sliding"), make_tokens(2, 16)
    torch.testing.assert_close(model(tokens).logits, base(tokens).logits, rtol=1e-4, atol=1e-5)


def test_logits_differ_from_the_bases_beyond_one_segment(base, model, make_tokens):
    end = 16 if model.config.local_attention == "sliding" else 8
    tokens = make_tokens(2, end + 1)
    assert not torch.allclose(model(tokens).logits[:, end], base(tokens).logits[:, end], atol=1e-3)


def test_only_gates_are_new_and_all_else_shares_the_bases_memory(base):
    model = retrofit(base, segment_length=8)
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    new = {f"model.layers.{layer}.self_attn.memory_gate.logits" for layer in range(2)}
    assert set(ours) - set(theirs) == new
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    assert all(torch.equal(ours[name], torch.full((4,), -4.0)) for name in new)
    assert not any(parameter.is_meta for parameter in [*ours.values(), *model.buffers()])
    ours, theirs = dict(model.named_buffers()), dict(base.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_base_is_not_changed(base):
    kind, names = type(base), list(base.state_dict())
    retrofit(base, segment_length=8)
    assert type(base) is kind
    assert list(base.state_dict()) == names
    assert not base.config.model_type.startswith("infini_")


def test_the_config_is_the_bases_with_the_settings(base):
    model = retrofit(
        base, segment_length=8, update_rule="delta", feature_map="exp", layers=[1], gate_init=-2.0
    )
    ours, theirs = model.config.to_dict(), base.config.to_dict()
    changed = {
        "architectures": [type(model).__name__],
        "empty_memory": "local",
        "local_attention": "segment",
        "sink_tokens": 4,
        "feature_map": "exp",
        "gate_init": -2.0,
        "infini_layers": [1],
        "normalization": "sum",
        "model_type": f"infini_{base.config.model_type.removesuffix('_text')}",
        "segment_length": 8,
        "short_convolution": 0,
        "update_rule": "delta",
    }
    assert ours == {**theirs, **changed}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied_and_untied_ones_untied(make_base, tied):
    model = retrofit(make_base(LlamaForCausalLM, tie_word_embeddings=tied), segment_length=8)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_dtype_converts_everything_but_the_gates(make_base):
    base = make_base(LlamaForCausalLM)
    model = retrofit(base, segment_length=8, dtype=torch.bfloat16)
    kinds = {name.endswith("memory_gate.logits"): p.dtype for name, p in model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert base.dtype == torch.float32


@torch.no_grad()
def test_the_generation_config_the_mode_and_the_name_are_carried_over(make_base):
    base = make_base(LlamaForCausalLM).train()
    base.generation_config.temperature = 0.123
    base.name_or_path = "smollm2"
    model = retrofit(base, segment_length=8)
    assert model.training
    assert model.generation_config.temperature == 0.123
    assert model.name_or_path == "smollm2"


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@torch.no_grad()
def test_the_update_rule_and_feature_map_of_the_config_are_used(
    make_base, make_model, make_tokens, update_rule
):
    base, tokens = make_base(LlamaForCausalLM), make_tokens(1, 30)
    logits = make_model(base, update_rule=update_rule)(tokens).logits
    other_rule = "delta" if update_rule == "linear" else "linear"
    assert not torch.allclose(logits, make_model(base, update_rule=other_rule)(tokens).logits, atol=1e-4)
    other_map = make_model(base, update_rule=update_rule, feature_map="exp")(tokens).logits
    assert not torch.allclose(logits, other_map, atol=1e-4)


@torch.no_grad()
def test_the_normalization_of_the_config_is_used(make_base, make_model, make_tokens):
    base, tokens = make_base(LlamaForCausalLM), make_tokens(1, 30)
    names = ("sum", "root", "none", "unit")
    logits = [make_model(base, normalization=name)(tokens).logits for name in names]
    for one, other in combinations(logits, 2):
        assert torch.equal(one[:, :8], other[:, :8])
        assert not torch.allclose(one[:, 8:], other[:, 8:], atol=1e-3)


@torch.no_grad()
def test_keys_go_to_memory_unrotated(llama, make_tokens):
    """The same token twice, at different places in its segment, leaves the same mark in memory."""
    kept = []
    for place in (1, 5):
        tokens = torch.full((1, 8), 3)
        tokens[0, place] = 9
        cache = llama(tokens, use_cache=True)[CACHE_ARGUMENT]
        kept.append(cache.layers[0].state.memory)
    torch.testing.assert_close(kept[0], kept[1])


@torch.no_grad()
def test_gates_are_called_as_modules_so_that_wrappers_around_them_work(model, make_tokens):
    called = []
    for layer in model.model.layers:
        gate = layer.self_attn.memory_gate
        gate.register_forward_hook(lambda module, args, output: called.append(module))
    model(make_tokens(1, 3))
    assert called == [layer.self_attn.memory_gate for layer in model.model.layers]


def test_a_family_that_is_not_supported_is_refused_with_the_list_of_those_that_are():
    bert = BertLMHeadModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(
        ValueError, match=r"BertLMHeadModel is not supported.*LlamaForCausalLM.*GraniteForCausalLM"
    ):
        retrofit(bert, segment_length=8)


def test_a_model_that_has_memories_already_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="has memories already"):
        retrofit(llama, segment_length=8)
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has memories already"):
        retrofit(tmp_path, segment_length=8)


@torch.no_grad()
def test_a_folder_is_retrofitted_like_the_model_saved_in_it(base, make_tokens, tmp_path):
    base.save_pretrained(tmp_path)
    tokens = make_tokens(1, 30)
    logits = [retrofit(model, segment_length=8)(tokens).logits for model in (base, tmp_path)]
    assert torch.equal(*logits)


@torch.no_grad()
def test_models_from_scratch_are_the_same_classes(base, make_tokens):
    model_class = FAMILIES[type(base)]
    config = model_class.config_class(**{**base.config.to_diff_dict(), "segment_length": 8})
    model = model_class(config).eval()
    assert model(make_tokens(1, 30)).logits.isfinite().all()
    gates = [p for name, p in model.named_parameters() if "memory_gate" in name]
    assert len(gates) == 2 and all(torch.equal(gate, torch.zeros(4)) for gate in gates)
    assert model.model.layers[0].self_attn.q_proj.weight.std() > 0.1  # initializer_range, not torch's default


def test_the_default_config_describes_a_whole_model():
    config = InfiniLlamaConfig(num_hidden_layers=3)
    assert (config.segment_length, config.infini_layers, config.gate_init) == (2048, [0, 1, 2], 0.0)
    with torch.device("meta"):
        assert InfiniLlamaForCausalLM(config).num_parameters() > 1e8


@torch.no_grad()
def test_a_base_with_another_attention_implementation_gets_the_default(make_base, make_tokens):
    base = make_base(LlamaForCausalLM)
    expected = base(make_tokens(1, 8)).logits
    base.config._attn_implementation = "flash_attention_2"
    model = retrofit(base, segment_length=8, layers=[0])
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(make_tokens(1, 8)).logits, expected)


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention"])
def test_attention_implementations_that_know_no_memory_are_refused(llama, kind):
    with pytest.raises((ValueError, ImportError), match=r"InfiniLlama\w* does not support"):
        type(llama)._from_config(llama.config, attn_implementation=kind)


def test_a_quantized_base_is_refused(make_base):
    base = make_base(LlamaForCausalLM)
    base.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantized weights"):
        retrofit(base, segment_length=8)


@torch.no_grad()
def test_gemma3_leaves_scores_uncapped_as_its_base_does(make_base, make_model, make_tokens):
    base = make_base(gemma3.Gemma3ForCausalLM, attn_logit_softcapping=2.0)
    tokens = make_tokens(1, 8)
    assert torch.equal(make_model(base)(tokens).logits, base(tokens).logits)
