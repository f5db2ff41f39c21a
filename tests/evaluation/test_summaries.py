import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention import cli
from infini_attention.cli import main
from infini_attention.data.documents import Documents
from infini_attention.data.summaries import GENERAL, with_end
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.evaluation import summaries as module
from infini_attention.evaluation.summaries import (
    Answer,
    Decoding,
    SummariesReport,
    SummarizedDocument,
    Summary,
    read_report,
    rouge_scorer,
    scores_of,
    summaries,
)
from infini_attention.evaluation.summaries_report import tables
from infini_attention.layers import MemoryGate
from infini_attention.models import retrofit

from .conftest import SIZES

pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'infini-attention[eval]'")

SEGMENT, MOST = 16, 16
TALKS = [
    {
        "text": "Ann: We ship in May, whatever comes. Bob: That is too late, I am afraid. " * 2,
        "queries": ["Summarize the meeting", "When?", "What did Bob say about the date?"],
        "summaries": ["They ship in May.", "In May.", "That it is too late."],
    },
    {"text": "Nobody came.", "queries": ["Who came?"], "summaries": ["Nobody."]},
    {"text": "", "queries": ["Why?"], "summaries": ["No text."]},
    {"text": "Cat: The roof leaks. Dan: Since when? " * 3, "queries": ["What?"], "summaries": ["A leak."]},
]
BYTES = with_end(byte_tokenizer())
GREEDY, DRAWN = Decoding(greedy=True, max_new_tokens=MOST), Decoding(max_new_tokens=MOST, temperature=1.0)
Run = Callable[..., SummariesReport]


def make(layers: list[int] | None = None) -> Any:
    """A tiny model in evaluation mode that knows when to end, and whose heads differ."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 257})).eval()
    model = retrofit(base, segment_length=SEGMENT, update_rule="delta", layers=layers)
    with torch.no_grad():
        model.lm_head.weight[BYTES.eos_token_id] *= 1.5
        for gate in (each.logits for each in model.modules() if isinstance(each, MemoryGate)):
            torch.nn.init.normal_(gate, mean=1.0)
    return model


def write(path: Path, talks: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("talks") / "talks.jsonl", TALKS)


@pytest.fixture(scope="module")
def run(source: str) -> Run:
    def call(source: str = source, *, model: Any = None, **settings: Any) -> SummariesReport:
        model = make() if model is None else model
        return summaries(model, BYTES, Documents(source), **{"decoding": GREEDY} | settings)

    return call


def texts(report: SummariesReport, part: str = "summary") -> list[list[str]]:
    """What was said of each document."""
    return [[getattr(answer, part).text for answer in document.answers] for document in report.documents]


def said(model: Any, text: str, query: str) -> str:
    """The likeliest tokens one by one, each from all that came before it, read anew."""
    ids = BYTES(f"{text}\n\nQuery: {query}\nSummary:\n")["input_ids"]
    start = len(ids)
    while len(ids) < start + MOST:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == BYTES.eos_token_id:
            break
    return str(BYTES.decode(ids[start:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("layers", [None, [1]], ids=["every_layer", "a_layer_without_memory"])
def test_queries_branch_from_one_reading_as_if_each_were_asked_alone(
    run: Run, layers: list[int] | None
) -> None:
    model = make(layers)
    report = run(model=model, chunk_tokens=24)
    expected = [
        [said(model, talk["text"], query) for query in talk["queries"]] for talk in TALKS if talk["text"]
    ]
    assert texts(report) == expected
    assert len({text for document in expected for text in document}) == 5
    assert any(len(text) < 12 for text in expected[0])  # some end before they have to
    assert [document.tokens for document in report.documents] == [
        len(talk["text"]) for talk in TALKS if talk["text"]
    ]


def test_chunks_change_nothing(run: Run) -> None:
    assert texts(run(chunk_tokens=7)) == texts(run())


def test_draws_of_a_query_are_its_own(run: Run, tmp_path: Path) -> None:
    whole = texts(run(decoding=DRAWN))
    alone = TALKS[0] | {"queries": TALKS[0]["queries"][:1], "summaries": TALKS[0]["summaries"][:1]}
    assert texts(run(write(tmp_path / "one.jsonl", [alone]), decoding=DRAWN)) == [whole[0][:1]]
    assert texts(run(decoding=DRAWN)) == whole
    assert texts(run(decoding=Decoding(max_new_tokens=MOST, temperature=1.0, seed=1))) != whole
    twice = TALKS[0] | {"queries": ["When?", "When?"], "summaries": ["In May.", "In May."]}
    ((one, other),) = texts(run(write(tmp_path / "two.jsonl", [twice]), decoding=DRAWN))
    assert one != other
    ((one,), (other,)) = texts(run(write(tmp_path / "same.jsonl", [alone, alone]), decoding=DRAWN))
    assert one != other


def test_a_narrow_draw_is_the_likeliest(run: Run) -> None:
    likeliest = texts(run())
    assert texts(run(decoding=Decoding(max_new_tokens=MOST, top_p=1e-6))) == likeliest
    assert texts(run(decoding=Decoding(max_new_tokens=MOST, temperature=1e-4))) == likeliest


@pytest.mark.parametrize("window_at", ["start", "end"])
def test_the_control_sees_its_window_and_nothing_else(run: Run, tmp_path: Path, window_at: str) -> None:
    model, window = make(), 20
    report = run(model=model, window=window, window_at=window_at)
    long = [talk for talk in TALKS if talk["text"]]
    cut = slice(-window, None) if window_at == "end" else slice(window)
    expected = [[said(model, talk["text"][cut], query) for query in talk["queries"]] for talk in long]
    assert texts(report, "windowed") == expected
    whole = texts(report)
    assert whole[1] == expected[1] and whole[0] != expected[0]  # the second fits into the window


def test_the_window_leaves_query_and_summary_half_a_segment(run: Run) -> None:
    assert run().setting.window == SEGMENT // 2
    assert run().setting.window_at == "end"


def test_rouge_is_the_packages(run: Run) -> None:
    rouge = rouge_scorer()
    scores = rouge("The cats sat on the mat.", "the cat sat on a mat")
    # Four words of six are the same, three of them in a row with no stemmer: sat on, then mat.
    assert scores["rouge1"] == pytest.approx(4 / 6)
    assert scores["rouge2"] == pytest.approx(1 / 5)
    assert scores["rougeL"] == scores["rougeLsum"] == pytest.approx(4 / 6)
    swapped = rouge("It rains. He sleeps.", "He sleeps. It rains.")
    assert (swapped["rougeL"], swapped["rougeLsum"]) == (pytest.approx(0.5), 1.0)
    (answer, *_) = run().documents[0].answers
    assert answer.summary.rouge == rouge(answer.reference, answer.summary.text)


def document(number: int, *pairs: tuple[float, float]) -> SummarizedDocument:
    """One whose answers have these scores in ROUGE-1, with the memory and by the window."""

    def of(score: float) -> Summary:
        return Summary("", {"rouge1": score, "rouge2": score / 2, "rougeL": score, "rougeLsum": score / 4})

    return SummarizedDocument(number, 100 << number, [Answer("", "", of(a), of(b)) for a, b in pairs])


def test_scores_are_means_over_queries_with_paired_differences() -> None:
    documents = [document(0, (0.5, 0.4), (0.3, 0.2)), document(1, (0.7, 0.6))]
    scores = scores_of(documents)
    assert (scores.documents, scores.queries) == (2, 3)
    assert scores.summary["rouge1"].value == pytest.approx(50)
    assert scores.summary["overall"].value == pytest.approx((50 * 25 * 50) ** (1 / 3))
    assert scores.windowed["rougeLsum"].value == pytest.approx(10)
    paired = scores.difference["rouge1"]
    assert [paired.low, paired.value, paired.high] == pytest.approx([10, 10, 10])
    assert scores.summary["rouge1"].low == pytest.approx(40)  # twice the first document
    assert math.isnan(scores_of(documents[:1]).summary["rouge1"].low)


def test_lengths_are_grouped_by_powers_of_two(run: Run) -> None:
    report = run()
    assert [(least, below, part.documents) for least, below, part in report.by_length()] == [
        (8, 16, 1),
        (64, 128, 1),
        (128, 256, 1),
    ]


def test_reading_goes_on_where_it_was_cut_off(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole, writes = tmp_path / "new" / "result.json", run(decoding=DRAWN), module.write_whole

    def write_and_stop(path: Path, line: str) -> None:
        writes(path, line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_whole", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(decoding=DRAWN, output=output)
    first = read_report(output)
    assert len(first.documents) == 1
    again = run(decoding=DRAWN, output=output)
    assert again.documents == whole.documents and again.seconds > first.seconds
    assert read_report(output) == again
    monkeypatch.setattr(module, "_summarized", None)  # nothing is left to read
    assert run(decoding=DRAWN, output=output).documents == whole.documents


def test_other_settings_are_not_mixed_in(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    run(output=output)
    with pytest.raises(ValueError, match="holds other figures: window is 8 there and 4 here"):
        run(output=output, window=4)
    with pytest.raises(
        ValueError, match=r"decoding is .*'greedy': True.* there and .*'greedy': False.* here"
    ):
        run(output=output, decoding=DRAWN)
    output.write_text("{}")
    with pytest.raises(ValueError, match="was not written by infini summaries"):
        run(output=output)


def test_the_json_holds_all_texts_and_scores(run: Run, tmp_path: Path) -> None:
    report = run(output=tmp_path / "result.json")
    content = json.loads(report.to_json())
    assert (tmp_path / "result.json").read_text() == report.to_json() + "\n"
    assert content["documents"][0]["answers"][1]["query"] == "When?"
    assert content["documents"][0]["answers"][1]["summary"]["text"] == texts(report)[0][1]
    assert content["scores"]["difference"]["overall"]["value"] == report.scores().difference["overall"].value
    assert [part["least"] for part in content["by_length"]] == [8, 64, 128]
    assert content["by_length"][0]["summary"]["rouge1"]["low"] is None
    assert content["setting"]["decoding"]["greedy"] is True


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 0}, "window is 0; give at least 1"),
        ({"window_at": "middle"}, "window_at is 'middle'; give start or end"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; give at least 1"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_a_remedy(run: Run, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; give a number above 0, or greedy"),
        ({"top_p": 1.5}, "top_p is 1.5; give a number above 0 and up to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give at least 1"),
        ({"seed": -1}, "seed is -1; give at least 0"),
    ],
    ids=str,
)
def test_ways_to_decode_that_are_none_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Decoding(**settings)


def test_what_cannot_be_asked_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        run(model=make().train())
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match="give the config of an infini"):
        run(model=base, window=4)
    silent = write(tmp_path / "silent.jsonl", [{"text": "Hm.", "queries": [], "summaries": []}])
    with pytest.raises(ValueError, match=r"silent\.jsonl holds no document with queries"):
        run(silent)


def test_a_missing_rouge_is_said_before_the_reading(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match=r"pip install 'infini-attention\[eval\]'"):
        run()


def test_the_command_prints_scores_by_length(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    make().save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    options = ["--greedy", "true", "--max_new_tokens", "8", "--window", "12", "--window_at", "start"]
    main(["summaries", source, "--model", str(tmp_path / "model"), "--device", "cpu", *options])
    shown = " ".join(capsys.readouterr().out.split())  # titles with long paths are wrapped
    assert "3 documents, 5 queries" in shown and "first 12 tokens" in shown
    assert "128 to 255 1 3 " in shown and "greedy; at most 8 tokens" in shown


def test_the_command_asks_what_a_training_does() -> None:
    assert inspect.signature(cli.summaries).parameters["query"].default == GENERAL


def test_tables_show_intervals_and_signed_differences(run: Run) -> None:
    report, console = run(decoding=DRAWN), Console(width=200)
    with console.capture() as capture:
        for table in tables(report):
            console.print(table)
    shown = capture.get()
    difference = report.scores().difference["rouge1"]
    assert f"{difference.value:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})" in shown
    assert "temperature 1.0, top-p 0.95, seed 0" in shown
