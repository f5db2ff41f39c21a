import inspect
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention import cli
from infini_attention.data.tokenizers import open_tokenizer
from infini_attention.evaluation import bindings as experiment
from infini_attention.evaluation.stream import stream
from infini_attention.models import load_model, load_tokenizer


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `infini` with `arguments`."""
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(capsys, "--help")
    assert code == 0
    for subcommand in ("stream", "bindings", "doctor", "train"):
        assert subcommand in output


@pytest.mark.parametrize("subcommand", ["stream", "bindings", "doctor"])
def test_every_subcommand_can_print_json(capsys: pytest.CaptureFixture[str], subcommand: str) -> None:
    code, output, _ = run(capsys, subcommand, "--help")
    assert code == 0
    assert "--json" in output


def test_every_option_of_bindings_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = run(capsys, "bindings", "--help")
    for words in ("Width of keys", "Number of segments", "Seed of the draws", "Where to draw"):
        assert words in output


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(capsys, "--version")
    assert code == 0
    assert output.strip() == f"infini {version('infini-attention')}"


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, error = run(capsys, "bindings", "--bindings", "[33]", "--segments", "16")
    assert code == 2
    assert output == ""
    assert error.startswith("infini: 33 bindings cannot be cut into 16 equal segments")
    assert error.count("\n") == 1


def test_an_unknown_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "bindings", "--no_such_option", "1")
    assert code == 2
    assert "no_such_option" in error


def test_bindings_with_json_prints_one_line_of_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "SWEEP_BINDINGS", 1)
    code, output, _ = run(
        capsys, "bindings", "--bindings", "[1,16]", "--head_dim", "8", "--trials", "2", "--json"
    )
    assert code == 0
    assert output.count("\n") == 1
    assert json.loads(output)["trials"] == 2


def test_tables_are_cut_to_a_terminal_s_width_and_not_to_a_pipe_s(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(show_header=False)
    table.add_row(*["22,435.21 to 23,019.64"] * 6)
    cli._print([table])
    assert capsys.readouterr().out.count("22,435.21 to 23,019.64") == 6
    monkeypatch.setenv("COLUMNS", "80")
    cli._print([table])
    assert max(map(len, capsys.readouterr().out.splitlines())) == 80


def test_stream_takes_every_setting_that_its_function_takes() -> None:
    command, function = (inspect.signature(each).parameters for each in (cli.stream, stream))
    assert {name: each.default for name, each in command.items() if name not in ("json", "plot")} == {
        name: each.default for name, each in function.items()
    }


@pytest.mark.parametrize("name", ["ingest", "ask", "generate", "chat", "state"])
def test_what_reads_and_talks_has_one_model_by_default(name: str) -> None:
    """One, since a state belongs to its model."""
    assert inspect.signature(cli.SUBCOMMANDS[name]).parameters["reader"].default.model == "smollm2-ask"


def test_a_text_that_is_not_there_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, error = run(capsys, "stream", "no-such-file.txt")
    assert code == 2
    assert output == ""
    assert error.startswith("infini: ")
    assert error.count("\n") == 1


def test_retrofit_saves_a_model_that_loads_again_and_overwrites_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    open_tokenizer("bytes").save_pretrained(tmp_path / "base")
    chosen = ["--segment_length", "8", "--update_rule", "delta", "--layers", "[1]", "--json"]
    command = ["retrofit", str(tmp_path / "base"), "-o", str(tmp_path / "new")]
    code, output, _ = run(capsys, *command, *chosen)
    figures = json.loads(output)
    assert code == 0
    assert (figures["gates"], figures["layers_with_memory"]) == (4, 1)
    assert figures["numbers_in_memory"] == 2 * 8 * 9 + 2 * 8 * 2 * 8  # a memory, a layer's window beside it
    model = load_model(tmp_path / "new")
    assert (model.config.segment_length, model.config.update_rule) == (8, "delta")
    assert model.config.infini_layers == [1]
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, base(ids).logits)
    assert len(load_tokenizer(tmp_path / "new")) == 256
    code, _, error = run(capsys, *command)
    assert code == 2
    assert "holds something already; name a new folder" in error
