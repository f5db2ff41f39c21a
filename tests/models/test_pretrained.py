"""The model in the package: small, told by its name, and able to do what its card says."""

from pathlib import Path
from typing import Any

import pytest

import infini_attention
from infini_attention.evaluation.passkey import passkey
from infini_attention.models import load_model, load_tokenizer
from infini_attention.models.loading import PASSKEY


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
