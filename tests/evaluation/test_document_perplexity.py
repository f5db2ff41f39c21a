"""`infini perplexity` from documents to the report, with tiny models of every system on the CPU."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.baselines import BASELINES
from infini_attention.baselines.systems import is_local, system_name
from infini_attention.cli import main
from infini_attention.data.documents import Documents
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.evaluation import document_perplexity as module
from infini_attention.evaluation.document_perplexity import (
    PerplexityReport,
    document_perplexity,
    evaluation_documents,
    read_report,
)
from infini_attention.evaluation.document_perplexity_report import tables
from infini_attention.layers import MemoryGate
from infini_attention.models import memory_off, retrofit
from infini_attention.models.memory_off import SHUT

from .conftest import SIZES

SEGMENT = 16
OWN = {
    "memorizing": {"memory_size": 20, "neighbors": 3},
    "recurrent_memory": {"memory_tokens": 3},
    "sliding_window": {"window": 11, "sinks": 2},
}
TEXTS = {
    "a": "A rose by any other name would smell as sweet. " * 2,
    "b": "So it would, naïve or not.",
    "c": "What's in a name? That which we call a rose " * 3,
    "d": "!",  # one token predicts nothing
    "e": "",
}
READ = "abc"
BYTES = byte_tokenizer()
Run = Callable[..., PerplexityReport]


def make(name: str) -> Any:
    """A tiny model of a system, in evaluation mode; gates differ from head to head."""
    torch.manual_seed(0)
    if name in BASELINES:
        model_class = BASELINES[name][LlamaForCausalLM]
        fields = SIZES | {"segment_length": SEGMENT} | OWN.get(name, {})
        model = model_class(model_class.config_class(**fields)).eval()
    else:
        base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        model = retrofit(base, segment_length=SEGMENT, update_rule="delta")
    for gate in (each.logits for each in model.modules() if isinstance(each, MemoryGate)):
        torch.nn.init.constant_(gate, SHUT) if name == "local" else torch.nn.init.normal_(gate, mean=1.0)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("documents")
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return f"{folder}/*.txt"


@pytest.fixture(scope="module")
def run(source: str) -> Run:
    def call(kind: str = "infini", **settings: Any) -> PerplexityReport:
        return document_perplexity(make(kind), BYTES, Documents(source), **settings)

    return call


def losses(model: Any, text: str) -> float:
    """Of a whole text from the model's own forward, all at once."""
    ids = torch.tensor(BYTES(text)["input_ids"])
    with torch.no_grad():
        return F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum").item()


@pytest.mark.parametrize("system", [*BASELINES, "infini", "local"])
def test_every_system_streams_whole_documents_side_by_side(run: Run, system: str) -> None:
    model, report = make(system), run(system, chunk_tokens=24, batch_rows=2)
    assert sorted(document.number for document in report.documents) == [0, 1, 2]
    for document in report.documents:
        text = TEXTS[READ[document.number]]
        loss = document.loss()
        assert loss.nats == pytest.approx(losses(model, text), rel=1e-4)
        assert (loss.tokens, document.length) == (len(text.encode()) - 1, len(text.encode()))
        assert (loss.words, loss.bytes) == (len(text.split()), len(text.encode()))
        if report.setting.memory_off:
            with memory_off(model):
                assert document.loss("off").nats == pytest.approx(losses(model, text), rel=1e-4)
    assert report.setting.memory_off == (system == "infini")  # memorizing holds a cache beside its gates


def test_chunks_and_neighbours_change_nothing(run: Run) -> None:
    one, other = run(batch_rows=1, chunk_tokens=7), run(batch_rows=3)
    by_number = {document.number: document for document in other.documents}
    for document in one.documents:
        twin = by_number[document.number]
        assert document.digest == twin.digest
        for stretch, like in zip(document.by_position, twin.by_position, strict=True):
            assert (stretch.start, stretch.end) == (like.start, like.end)
            assert stretch.nats == pytest.approx(like.nats, rel=1e-4)


def test_figures_are_of_all_documents_and_lie_in_their_intervals(run: Run) -> None:
    report = run()
    whole = [document.loss() for document in report.documents]
    nats, tokens = sum(loss.nats for loss in whole), sum(loss.tokens for loss in whole)
    figures = report.figures()
    assert figures.token_perplexity.value == pytest.approx(math.exp(nats / tokens))
    assert figures.token_perplexity.low < figures.token_perplexity.value < figures.token_perplexity.high
    size = sum(loss.bytes for loss in whole)
    assert figures.bits_per_byte.value == pytest.approx(nats / math.log(2) / size)


def test_positions_are_doubling_and_pool_the_documents_that_reach_them(run: Run) -> None:
    report = run()
    starts = [(start, end) for start, end, _ in report.by_position()]
    assert starts == [(0, 16), (16, 32), (32, 64), (64, 128), (128, 132)]
    last = report.by_position()[-1][2].token_perplexity
    (alone,) = (each for each in report.documents if each.length == 132)
    assert last.value == pytest.approx(alone.by_position[-1].loss().token_perplexity)
    assert math.isnan(last.low)  # one document has no interval


def test_sizes_are_those_of_the_system(run: Run) -> None:
    infini, local, transformer_xl = run("infini"), run("local"), run("transformer_xl")
    assert infini.memory_floats == 2 * 2 * 8 * 9  # layers, heads, d (d + 1)
    assert (local.memory_floats, local.compression) == (0, None)
    assert transformer_xl.memory_floats == 2 * 2 * 2 * 8 * SEGMENT
    assert transformer_xl.compression == pytest.approx((65_536 + 2 * SEGMENT) / (2 * SEGMENT))
    assert infini.peak_memory_bytes > 0 and infini.seconds > 0
    names = [each.setting.system for each in (infini, local, transformer_xl)]
    assert names == ["Infini delta", "local only", "Transformer-XL"]


def test_a_systems_name_says_what_is_not_the_papers() -> None:
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = retrofit(base, segment_length=SEGMENT, feature_map="exp", short_convolution=4)
    assert system_name(model) == "Infini linear, exp, convolution of 4"
    sinks = retrofit(base, segment_length=SEGMENT, local_attention="sink", sink_tokens=3)
    assert system_name(sinks) == "Infini linear, 3 sinks"
    for gate in (each.logits for each in model.modules() if isinstance(each, MemoryGate)):
        torch.nn.init.constant_(gate, SHUT)
    assert system_name(model) == "local only, convolution of 4" and is_local(model)


def test_reading_goes_on_where_it_was_cut_off(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole, write = tmp_path / "new" / "result.json", run(), module.write_whole

    def write_and_stop(path: Path, line: str) -> None:
        write(path, line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_whole", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(output=output)
    first = read_report(output)
    assert len(first.documents) == 1
    again = run(output=output)
    assert again.documents[0] == first.documents[0]
    assert again.seconds > first.seconds
    assert again.figures().token_perplexity.value == pytest.approx(whole.figures().token_perplexity.value)
    assert read_report(output) == again
    assert run(output=output).documents == again.documents  # nothing is left to read


def test_another_models_figures_are_not_mixed_in(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run(output=output)
    with pytest.raises(ValueError, match=r"holds other figures: model_type is 'infini_llama' there and 'tr"):
        run("transformer_xl", output=output)
    with pytest.raises(ValueError, match="max_tokens is None there and 40 here"):
        run(output=output, max_tokens=40)
    output.write_text("{}")
    with pytest.raises(ValueError, match="was not written by infini perplexity"):
        run(output=output)


def test_max_tokens_reads_the_beginning_of_each(run: Run) -> None:
    report = run(max_tokens=20)
    assert [document.length for document in report.documents] == [20, 20, 20]
    assert sum(document.loss().words for document in report.documents) == sum(
        len(TEXTS[name].encode()[:20].decode().split()) for name in READ
    )


def test_the_json_is_one_line_with_the_figures(run: Run) -> None:
    report = run(name="roses", system="mine")
    content = json.loads(report.to_json())
    assert "\n" not in report.to_json()
    assert content["setting"]["documents"] == "roses" and content["setting"]["system"] == "mine"
    assert content["figures"]["on"]["bits_per_byte"]["value"] == report.figures().bits_per_byte.value
    assert set(content["figures"]) == {"on", "off"}
    assert {"command", "commit", "versions"} <= set(content["provenance"])


def test_tables_show_figures_by_position(run: Run) -> None:
    report, console = run(name="roses"), Console(width=160)
    with console.capture() as capture:
        for table in tables(report):
            console.print(table)
    shown = re.sub(r" +", " ", capture.get())
    assert "Infini delta on roses: 3 documents, 253 tokens" in shown
    assert f"{report.figures('off').bits_per_byte.value:.4f}" in shown
    assert "128 to 131 1 " in shown and "288 numbers of memory, 7,285 times less" in shown


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 1}, "max_tokens is 1; give at least 2"),
        ({"batch_rows": 0}, "batch_rows is 0; give at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; give at least 1"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_a_remedy(run: Run, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(**settings)


def test_models_that_cannot_read_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        document_perplexity(make("infini").train(), BYTES, Documents(source))
    with pytest.raises(ValueError, match="LlamaConfig is no config of an infini"):
        document_perplexity(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), BYTES, Documents(source))


def test_corpora_are_read_from_their_test_split() -> None:
    assert evaluation_documents("pg19").split == "test"
    assert evaluation_documents("pg19", "validation").split == "validation"
    assert evaluation_documents("books/*.txt", max_documents=3) == Documents("books/*.txt", max_documents=3)


@pytest.mark.parametrize("system", ["infini", "recurrent_memory"])
def test_the_command_reads_a_folder_of_any_system_and_finds_its_training(
    source: str, system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(system).save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "tokens": 960}))
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    main(["perplexity", source, *model, "-o", str(tmp_path / "result.json"), "--name", "roses", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["trained"] == {"steps": 3, "tokens": 960}
    assert read_report(tmp_path / "result.json").setting.documents == "roses"
    assert content["setting"]["system"] == {"infini": "Infini delta"}.get(system, "RMT, 3 tokens")
    if system != "infini":
        with pytest.raises(SystemExit):
            main(["perplexity", source, *model, "--update_rule", "delta"])
        assert "is a baseline; update_rule can be set only when retrofitting" in capsys.readouterr().err


def test_a_training_of_another_kind_makes_another_system_of_a_model(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("infini").save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    summary = {"steps": 3, "stop_gradient": True, "gate_init": -2.0}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    command = ["perplexity", source, "--model", str(tmp_path / "model"), "--device", "cpu", "--json"]
    for more, name in (([], "Infini delta, gates from -2, stopped gradient"), (["--system", "ours"], "ours")):
        main([*command, *more])
        assert json.loads(capsys.readouterr().out)["setting"]["system"] == name
    for told, name in (
        ({"carried_through": "documents"}, "Infini delta, carried through documents"),
        ({"carried_through": 64, "carried_together": True}, "Infini delta, carried through 64, together"),
        ({"carried_through": 64, "carried_packed": True}, "Infini delta, carried through 64, packed"),
        (
            {"carried_through": 64, "reset_probability": 0.25},
            "Infini delta, carried through 64, reset with probability 0.25",
        ),
        ({"carried_through": 64, "read_again": True}, "Infini delta, carried through 64, read again"),
        ({"carried_through": 64, "read_again": False}, "Infini delta, carried through 64, not read again"),
    ):
        (tmp_path / "summary.json").write_text(json.dumps({"steps": 3} | told))
        main(command)
        assert json.loads(capsys.readouterr().out)["setting"]["system"] == name


def test_the_command_reads_with_a_window_in_place_of_a_memory(
    source: str, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["perplexity", source, "--model", str(base_folder), "--device", "cpu", "--json"]
    systems = {
        "--window 999": ("sliding window of 999", 999),
        "--window 16": ("sliding window of 16", 16),
        "--window 16 --sinks 4 --segment_length 8": ("attention sinks, 4 of 16", 8),
    }
    perplexities = set()
    for options, expected in systems.items():
        main([*command, *options.split()])
        content = json.loads(capsys.readouterr().out)
        setting = content["setting"]
        assert (setting["system"], setting["segment_length"]) == expected
        assert setting["model_type"] == "sliding_window_llama" and not setting["memory_off"]
        perplexities.add(content["figures"]["on"]["token_perplexity"]["value"])
    assert len(perplexities) == 3


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("base", "--sinks 4", "sinks is 4, and there is no window; set window, too"),
        (
            "base",
            "--window 8 --gate_init 0 --update_rule delta",
            "window is 8, and update_rule, gate_init can be set only where there is a memory; leave out",
        ),
        ("base", "--window 8 --sinks 8", "sinks is 8, and window 8; give from 0 to 7 sinks"),
        ("base", "--window 2049", "window is 2049, more than the model's max_position_embeddings, 2048"),
        ("infini", "--window 8", "has memories already; window can be set only for one without"),
        ("transformer_xl", "--window 8", "is a baseline; window can be set only when retrofitting"),
        ("sliding_window", "--sinks 4", "is a baseline; sinks can be set only when retrofitting"),
    ],
)
def test_a_window_that_contradicts_is_refused(
    source: str,
    base_folder: Path,
    kind: str,
    options: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind != "base":
        make(kind).save_pretrained(tmp_path)
    folder = base_folder if kind == "base" else tmp_path
    with pytest.raises(SystemExit) as ended:
        main(["perplexity", source, "--model", str(folder), "--device", "cpu", *options.split()])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
