import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from infini_attention.models import load_model, load_tokenizer, retrofit


def gates(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("memory_gate.logits")}


def fields(config):
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def drop_gates(folder):
    path = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "memory_gate" not in name}
    save_file(kept, path, metadata={"format": "pt"})


@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(model, make_tokens, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert fields(again.config) == fields(model.config)
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = make_tokens(2, 30)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_every_setting_of_the_memory_is_saved(make_base, make_model, make_tokens, tmp_path):
    settings = {"feature_map": "relu2", "normalization": "unit", "empty_memory": "gated"}
    settings |= {"local_attention": "sink", "sink_tokens": 2}
    model, tokens = make_model(make_base(LlamaForCausalLM), **settings), make_tokens(2, 30)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in settings} == settings
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_the_decoder_alone_loads_with_its_gates(model, tmp_path):
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is type(model.model)
    assert all(torch.equal(gate, gates(model.model)[name]) for name, gate in gates(decoder).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_that_a_checkpoint_lacks_start_at_gate_init(base, tmp_path, dtype):
    retrofit(base, segment_length=8, gate_init=-3.0).save_pretrained(tmp_path)
    drop_gates(tmp_path)
    for auto_class in (AutoModelForCausalLM, AutoModel):
        loaded = gates(auto_class.from_pretrained(tmp_path, dtype=dtype))
        assert len(loaded) == 2
        assert all(torch.equal(gate, torch.full((4,), -3.0)) for gate in loaded.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_stay_fp32_in_narrower_models(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    expected = gates(model)
    for narrow in (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), model.to(dtype)):
        assert narrow.lm_head.weight.dtype == dtype
        assert narrow.model.layers[0].mlp.gate_proj.weight.dtype == dtype
        for name, gate in gates(narrow).items():
            assert gate.dtype == torch.float32
            assert torch.equal(gate, expected[name])


@torch.no_grad()
def test_a_model_in_bfloat16_computes_in_bfloat16(model, make_tokens, tmp_path):
    tokens = make_tokens(2, 30)
    logits = model(tokens).logits
    model.save_pretrained(tmp_path)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(tokens).logits
    assert narrow.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(narrow.float(), logits, dim=-1).mean() > 0.98


def test_new_models_of_a_config_have_fp32_gates(llama):
    model = AutoModelForCausalLM.from_config(llama.config, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {gate.dtype for gate in gates(model).values()} == {torch.float32}


def test_the_config_alone_comes_back(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    assert fields(AutoConfig.from_pretrained(tmp_path)) == fields(model.config)


@torch.no_grad()
def test_a_folder_with_memory_is_loaded_as_it_is(llama, make_tokens, tmp_path):
    llama.save_pretrained(tmp_path)
    tokens = make_tokens(1, 30)
    assert torch.equal(load_model(tmp_path)(tokens).logits, llama(tokens).logits)
    assert load_model(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_without_memory_is_loaded_as_its_base(make_base, tmp_path):
    make_base(LlamaForCausalLM).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is LlamaForCausalLM


def test_the_tokenizer_loads_from_a_folder_with_memory(llama, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    llama.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    for load in (AutoTokenizer.from_pretrained, load_tokenizer):
        assert load(tmp_path)("a b a").input_ids == [1, 2, 1]
