"""`infini demo`: what it hides, where, what it asks, and what it says about it."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from infini_attention.cli import main
from infini_attention.data.texts import Text
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.models import FAMILIES
from infini_attention.streaming import demo as module
from infini_attention.streaming.demo import Demo, demo
from infini_attention.streaming.demo_report import tables

LENGTH = 6000
BYTES = byte_tokenizer()
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = next(family for family in FAMILIES.values() if family.__name__ == "InfiniLlamaForCausalLM")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LLAMA(LLAMA.config_class(vocab_size=256, segment_length=64, gate_init=0.0, **SIZES)).eval()


@pytest.fixture
def text(tmp_path: Path) -> Text:
    path = tmp_path / "prose.txt"
    path.write_text("It was a dark and stormy night, and nobody was about. " * 40)
    return Text("a night", (path,))


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All ids that a session is fed; it then generates the last number that it was told."""
    ids: list[int] = []
    feed = module.Session.feed

    def kept(self: Any, source: torch.Tensor, **settings: Any) -> int:
        ids.extend(source.tolist())
        return feed(self, source, **settings)

    def found(self: Any, **_: Any) -> Iterator[int]:
        whole = bytes(ids).decode()
        yield from whole.split("The pass key is ")[1][:4].encode()

    monkeypatch.setattr(module.Session, "feed", kept)
    monkeypatch.setattr(module.Session, "generate", found)
    return ids


@pytest.mark.parametrize("depth", [0.0, 0.6, 1.0])
def test_the_session_reads_the_whole_text_with_the_key_in_it(
    model: Any, text: Text, fed: list[int], depth: float
) -> None:
    shown = demo(model, BYTES, text, tokens=LENGTH, depth=depth, seed=3)
    whole = bytes(fed).decode()
    assert len(fed) == LENGTH == shown.asked_at
    assert whole[shown.told_at :].strip().startswith(shown.told)
    assert whole.count(shown.told) == 1 and shown.key in shown.told
    assert whole.rstrip().endswith(shown.asked)
    assert whole.count("dark and stormy") > 80
    assert abs(shown.told_at / LENGTH - depth) < 0.1
    assert shown.found and shown.answer == shown.key


def test_a_wrong_answer_is_called_wrong(model: Any, text: Text) -> None:
    shown = demo(model, BYTES, text, tokens=LENGTH)
    assert not shown.found
    assert "wrong: it is " + shown.key in rendered(shown)


def test_the_state_stays_as_it_is_while_a_cache_would_grow(model: Any, text: Text, fed: list[int]) -> None:
    shown = demo(model, BYTES, text, tokens=20_000)
    tokens = [sample.tokens for sample in shown.samples]
    assert tokens[-1] == 20_000 and len(tokens) == 4
    assert all(later >= 2 * earlier for earlier, later in pairwise(tokens[:-1]))
    assert len({sample.state_bytes for sample in shown.samples[:-1]}) == 1  # the last one has an open segment
    assert all(sample.resident_bytes > 1e6 for sample in shown.samples)
    assert shown.cache_bytes_per_token == 2 * 1 * 16 * 4  # keys and values, one layer, 16 wide, fp32
    assert "(right)" in rendered(shown)


def test_the_command_shows_it_and_writes_json(
    model: Any, text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    BYTES.save_pretrained(folder)
    arguments = ["demo", str(text.paths[0]), "--model", str(folder), "--tokens", "5000", "--device", "cpu"]
    main(arguments)
    assert "after 5,000 tokens" in capsys.readouterr().out
    main([*arguments, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["asked_at"] == 5000 and shown["found"] is False
    assert shown["provenance"]["versions"]


def rendered(shown: Demo) -> str:
    console = Console(width=200, record=True)
    for table in tables(shown):
        console.print(table)
    return console.export_text()
