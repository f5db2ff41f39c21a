from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from infini_attention.models import FAMILIES, load_model, load_tokenizer, loading, retrofit
from infini_attention.models.adapters import add_adapter, is_adapter, load_adapter, merged, save_config

pytest.importorskip("peft")
SEGMENT = 8


@pytest.fixture
def base_folder(base: PreTrainedModel, tmp_path: Path) -> Path:
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def llama_folder(make_base, tmp_path):
    """One family, for what does not depend on the family."""
    make_base(next(iter(FAMILIES))).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def adapted(folder: Path, **settings: object) -> PreTrainedModel:
    """An adapter of a base with memories; what it has learnt is random."""
    model = retrofit(folder, segment_length=SEGMENT, gate_init=0.0, dtype=torch.float32, **settings)
    found = add_adapter(model, rank=2, alpha=4.0)
    torch.manual_seed(3)
    for parameter in found.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_config(model, folder)
    return folder


def test_a_saved_adapter_loads_as_the_model_it_was(base_folder, make_tokens, tmp_path):
    model, tokens = adapted(base_folder, update_rule="delta"), make_tokens(2, 30)
    wanted = model(tokens).logits
    folder = save(model, tmp_path / "adapter")
    loaded = load_model(folder)
    torch.testing.assert_close(loaded(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    assert (loaded.config.segment_length, loaded.config.update_rule) == (SEGMENT, "delta")
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert loaded.name_or_path == str(folder)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    without = retrofit(base_folder, segment_length=SEGMENT, gate_init=0.0, update_rule="delta")
    assert not torch.allclose(without(tokens).logits, wanted, atol=0.05)


def test_the_tokenizer_of_an_adapter_is_its_bases_where_none_lies_beside_it(
    llama_folder, tmp_path, monkeypatch
):
    folder = save(adapted(llama_folder), tmp_path / "adapter")
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda place: place)
    assert load_tokenizer(folder) == str(llama_folder)
    (folder / "tokenizer_config.json").touch()
    assert load_tokenizer(folder) == str(folder)


def test_gates_and_convolutions_are_in_an_adapter_and_weights_are_not(llama_folder, tmp_path):
    folder = save(adapted(llama_folder, short_convolution=3), tmp_path / "adapter")
    loaded, base = load_model(folder), load_model(llama_folder)
    attention = loaded.model.layers[1].self_attn
    assert not torch.allclose(attention.memory_gate.logits, torch.zeros(4))
    assert attention.short_convolution.weight[:, :-1].abs().max() > 0.1  # no identity any more
    small = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert small < base.num_parameters() * 4 / 2


def test_gates_stay_fp32_in_bf16(llama_folder, tmp_path):
    loaded = load_model(save(adapted(llama_folder), tmp_path / "adapter"), dtype=torch.bfloat16)
    assert loaded.dtype == loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.model.layers[0].self_attn.memory_gate.logits.dtype == torch.float32


def test_an_adapter_can_be_trained_on_and_its_base_stays(llama_folder, make_tokens, tmp_path):
    folder, tokens = save(adapted(llama_folder), tmp_path / "adapter"), make_tokens(2, 24)
    again = load_adapter(folder, load_model)
    before = again(tokens).logits
    learning = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert learning and all("lora_" in name or "memory_gate" in name for name in learning)
    optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.5)
    again(tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    assert not torch.allclose(again(tokens).logits, before, atol=1e-3)
    kept = load_model(llama_folder).state_dict()
    frozen = {n: p for n, p in again.named_parameters() if n.endswith("base_layer.weight")}
    for name, parameter in frozen.items():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, kept[own])


def test_a_base_that_has_memories_is_taken_as_it_is(llama_folder, make_tokens, tmp_path):
    retrofit(llama_folder, segment_length=SEGMENT, gate_init=0.3).save_pretrained(tmp_path / "whole")
    model, tokens = add_adapter(load_model(tmp_path / "whole"), rank=2, alpha=4.0), make_tokens(1, 30)
    loaded = load_model(save(model.eval(), tmp_path / "adapter"))
    torch.testing.assert_close(loaded(tokens).logits, merged(model, None)(tokens).logits)


def test_what_is_no_adapter_of_a_model_with_memories_is_left_to_transformers(llama_folder, tmp_path):
    folder = save(adapted(llama_folder), tmp_path / "adapter")
    assert is_adapter(folder) and not is_adapter(llama_folder)
    load_model(llama_folder).config.save_pretrained(folder)
    assert not is_adapter(folder)
    (folder / "config.json").unlink()
    assert not is_adapter(folder)


def test_mistakes_are_named(llama_folder, tmp_path, monkeypatch):
    folder = save(adapted(llama_folder), tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"{llama_folder}"', "null"))
    with pytest.raises(ValueError, match="names no base; write it there as base_model_name_or_path"):
        load_model(folder)
    monkeypatch.setattr("infini_attention.models.adapters.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'infini-attention\[demo\]'"):
        load_model(folder)
