import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from infini_attention import cli
from infini_attention.streaming import Session

Infini = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with a model in `model` and a text of 300 words; commands run there."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{number * 7 % 60}" for number in range(300)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def infini(place: Path, capsys: pytest.CaptureFixture[str]) -> Infini:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        model = [] if arguments[0] == "state" and arguments[1] != "rewind" else ["--model", "model"]
        try:
            cli.main([*arguments, *model])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_ingest_ask_generate_and_state(infini: Infini, place: Path) -> None:
    code, output, _ = infini("ingest", "text.txt", "-o", "a.state", "--snapshots", "true", "--json")
    report = json.loads(output)
    assert (code, report["tokens"], report["ending"]) == (0, 300, "end of text")
    assert report["file_bytes"] == (place / "a.state").stat().st_size
    before = (place / "a.state").read_bytes()

    code, output, _ = infini("ask", "a.state", "w1 w2", "--max_new_tokens", "4", "--json")
    assert code == 0
    assert 1 <= len(json.loads(output)["ids"]) <= 4
    assert (place / "a.state").read_bytes() == before

    code, output, _ = infini(
        "generate", "a.state", "--prompt", "w3", "--max_new_tokens", "3", "-o", "b.state"
    )
    assert code == 0
    shown = json.loads(infini("state", "show", "b.state", "--json")[1])
    assert 301 < shown["tokens"] <= 304

    assert infini("state", "fork", "a.state", "c.state")[0] == 0
    assert (place / "c.state").read_bytes() == before
    code, _, error = infini("state", "fork", "a.state", "c.state")
    assert (code, "exists" in error) == (2, True)

    assert infini("state", "rewind", "c.state", "298")[0] == 0
    assert json.loads(infini("state", "show", "c.state", "--json")[1])["tokens"] == 298
    code, _, error = infini("state", "rewind", "c.state", "999")
    assert (code, "cannot rewind to token 999" in error) == (2, True)


def test_ingesting_goes_on_where_it_stopped(
    infini: Infini, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    infini("ingest", "text.txt", "-o", "whole.state")
    infini("ingest", "text.txt", "-o", "parts.state", "--max_tokens", "77")
    code, output, _ = infini("ingest", "text.txt", "-o", "parts.state", "--json")
    assert code == 0
    assert json.loads(output)["skipped_tokens"] == 77
    assert Path("parts.state").read_bytes() == Path("whole.state").read_bytes()


def test_ingesting_onto_a_state_adds_to_it_and_leaves_it(infini: Infini) -> None:
    infini("ingest", "text.txt", "-o", "first.state", "--max_tokens", "50")
    before = Path("first.state").read_bytes()
    infini("ingest", "text.txt", "-o", "second.state", "--onto", "first.state", "--max_tokens", "20")
    code, output, _ = infini(
        "ingest", "text.txt", "-o", "second.state", "--onto", "first.state", "--max_tokens", "60", "--json"
    )
    assert (code, json.loads(output)["tokens"]) == (0, 110)
    assert Path("first.state").read_bytes() == before


def test_another_texts_state_is_not_overwritten(infini: Infini, place: Path) -> None:
    infini("ingest", "text.txt", "-o", "a.state")
    before = Path("a.state").read_bytes()
    (place / "other.txt").write_text(" ".join(f"w{number * 11 % 60}" for number in range(400)))
    code, _, error = infini("ingest", "other.txt", "-o", "a.state")
    assert code == 2
    assert "holds another text" in error
    assert Path("a.state").read_bytes() == before


def test_ctrl_c_saves_what_has_been_read_and_says_how_to_go_on(
    infini: Infini, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "long.txt").write_text("\n".join([(place / "text.txt").read_text()] * 60))
    feed, calls = Session.feed, []

    def interrupted(session: Session, *arguments: object) -> int:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return feed(session, *arguments)

    with monkeypatch.context() as changed:
        changed.setattr(Session, "feed", interrupted)
        code, _, error = infini("ingest", "long.txt", "-o", "a.state")
    tokens = int(re.sub(",", "", re.search(r"goes on after token ([\d,]+)", error)[1]))
    assert (code, tokens > 0) == (130, True)
    assert json.loads(infini("state", "show", "a.state", "--json")[1])["tokens"] == tokens
    infini("ingest", "long.txt", "-o", "a.state")
    infini("ingest", "long.txt", "-o", "b.state")
    assert Path("a.state").read_bytes() == Path("b.state").read_bytes()


def test_chat_remembers_and_is_saved(
    infini: Infini,
    monkeypatch: pytest.MonkeyPatch,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    lines = iter(
        ["w1 w2 w3", "/info", "/rewind nowhere", "/rewind 2", "/what", "w4", "/save b.state", "/quit"]
    )
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(lines))
    code, output, _ = infini("chat", "a.state", "--max_new_tokens", "3")
    assert code == 0
    assert "no token number" in output
    assert "/what is not known" in output
    session = Session.load("a.state", make_model(), tokenizer)
    assert session.tokens > 2
    assert Path("b.state").read_bytes() == Path("a.state").read_bytes()


@pytest.mark.parametrize("template", [None, "{{ messages[-1]['content'] }}"], ids=["without", "with"])
def test_what_a_model_without_a_chat_template_does_is_said(
    template: str | None,
    infini: Infini,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if template is not None:
        (place / "model" / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: "/quit")
    infini("ingest", "text.txt", "-o", "a.state")
    for command in (["ask", "a.state", "w1", "--max_new_tokens", "2"], ["chat"]):
        code, _, said = infini(*command)
        assert code == 0
        assert ("model has no chat template" in said) == (template is None)


def test_mistakes_are_one_line(infini: Infini) -> None:
    for arguments, words in (
        (["ask", "no.state", "w1"], "cannot be loaded"),
        (["ask", "text.txt", "w1"], "no state file"),
        (["generate"], "nothing was fed yet"),
        (["state", "fork", "text.txt"], "fork needs a third argument"),
        (["ingest", "nothing.txt", "-o", "a.state"], "there is no file"),
        (["ingest", "text.txt", "-o", "nowhere/a.state"], "there is no folder"),
    ):
        code, _, error = infini(*arguments)
        assert (code, words in error, error.count("\n")) == (2, True, 1), error
