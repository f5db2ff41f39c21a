"""`infini stream` from the text to the report, with a tiny model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from infini_attention.data.texts import TokenBlock
from infini_attention.evaluation import stream as module
from infini_attention.evaluation import stream_report
from infini_attention.evaluation.perplexity import StreamedPerplexity
from infini_attention.evaluation.stream import StreamReport, stream
from infini_attention.evaluation.stream_report import plot, tables, to_json
from infini_attention.models import retrofit

TEXT = (
    "What's in a name? That which we call a rose\nBy any other name would smell as sweet; naïve 🙂.\n\n" * 4
)
Stream = Callable[..., StreamReport]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rose.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(text_file: Path, base_folder: Path) -> Stream:
    """`stream` on the CPU with small segments."""

    def call(text: Path = text_file, **settings: Any) -> StreamReport:
        fixed = {"model": str(base_folder), "segment_length": 32, "device": "cpu", "dtype": "float32"}
        return stream(str(text), **(fixed | settings))

    return call


@pytest.fixture(scope="module")
def report(run: Stream) -> StreamReport:
    return run()


def printed(report: StreamReport) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        for table in tables(report):
            console.print(table)
    return capture.get()


def test_the_whole_text_is_read(report: StreamReport) -> None:
    size = len(TEXT.encode())
    assert report.ending == "end of text"
    assert report.total.end == size  # one token a byte
    assert (report.total.on.tokens, report.total.on.bytes) == (size - 1, size)
    assert report.total.on.words == len(TEXT.split())
    assert report.total.on.nats != report.total.off.nats


def test_the_loss_does_not_depend_on_the_chunks(run: Stream, report: StreamReport) -> None:
    other = run(chunk_length=17)
    assert other.total.on.nats == pytest.approx(report.total.on.nats, rel=1e-5)


def test_the_settings_are_those_asked_for(run: Stream) -> None:
    setting = run(update_rule="delta", feature_map="exp", gate_init=0.0, max_tokens=70).setting
    assert (setting.update_rule, setting.feature_map, setting.segment_length) == ("delta", "exp", 32)
    assert setting.gate_share == pytest.approx(0.5)
    assert setting.retrofitted


def test_the_full_cache_is_two_vectors_a_head_a_layer(report: StreamReport) -> None:
    assert report.setting.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4  # 2 layers, 2 heads of 8, fp32
    assert report.full_cache_bytes == report.total.end * 256


def test_what_is_carried_is_measured_at_every_chunk(run: Stream) -> None:
    report = run(chunk_length=32)
    whole = [sample.state_bytes for sample in report.samples[1:] if sample.tokens % 32 == 0]
    assert len(set(whole)) == 1
    assert report.samples[0].tokens == 0
    assert all(0 < sample.resident_bytes <= report.peak_resident_bytes for sample in report.samples)


def test_max_tokens_ends_the_reading(run: Stream) -> None:
    report = run(max_tokens=50, chunk_length=16)
    assert (report.ending, report.total.end) == ("max_tokens", 50)
    assert "stopped at max_tokens" in printed(report)


def test_ctrl_c_reports_what_was_read(run: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "StreamedPerplexity", interrupted_after(2))
    report = run(chunk_length=16)
    assert (report.ending, report.total.end) == ("interrupted", 32)
    assert "interrupted" in printed(report)


def interrupted_after(chunks: int) -> type[StreamedPerplexity]:
    class Interrupted(StreamedPerplexity):
        def feed(self, piece: TokenBlock) -> None:
            if self.tokens == chunks * len(piece):
                raise KeyboardInterrupt
            super().feed(piece)

    return Interrupted


def test_samples_stay_few(run: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SAMPLES", 8)
    samples = run(chunk_length=8).samples
    assert len(samples) <= 8
    assert (samples[0].tokens, samples[1].tokens, samples[-1].tokens) == (0, 8, len(TEXT.encode()))


def test_tables_show_both_modes_by_position(report: StreamReport) -> None:
    shown = printed(report)
    assert f"0 to 31 {report.by_position[0].on.token_perplexity:,.2f}" in re.sub(r" +", " ", shown)
    assert f"{report.total.off.bits_per_byte:.4f}" in shown
    for words in ("untrained", "1.8%", "every gate shut", "computed", "measured", "peak"):
        assert words in shown


def test_json_has_everything_in_one_line(report: StreamReport) -> None:
    line = to_json(report)
    assert "\n" not in line
    content = json.loads(line)
    assert content["total"]["on"]["token_perplexity"] == report.total.on.token_perplexity
    assert content["by_position"][0]["off"]["bits_per_byte"] == report.by_position[0].off.bits_per_byte
    assert content["setting"]["segment_length"] == 32
    assert content["full_cache_bytes"] == report.full_cache_bytes
    assert content["state_bytes"] == report.state_bytes
    assert {"torch", "transformers", "python"} <= set(content["provenance"]["versions"])
    assert {"command", "commit", "date"} <= set(content["provenance"])
    assert len(content["samples"]) == len(report.samples)


def test_the_picture_is_written_where_asked(report: StreamReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'infini-attention[demo]'")
    path = tmp_path / "new" / "stream.png"
    plot(report, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_pip_command_is_named(
    report: StreamReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stream_report, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'infini-attention\[demo\]'"):
        plot(report, tmp_path / "stream.png")


@pytest.fixture(scope="module")
def infini_folder(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that has memories."""
    folder = tmp_path_factory.mktemp("infini")
    model = retrofit(base_folder, segment_length=24, gate_init=1.0, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_memories_is_read_with_as_it_is(run: Stream, infini_folder: Path) -> None:
    report = run(model=str(infini_folder), segment_length=None)
    assert report.setting.segment_length == 24
    assert report.setting.gate_share == pytest.approx(torch.tensor(1.0).sigmoid().item())
    assert "untrained" not in printed(report)


def test_a_model_with_memories_takes_no_other_settings(run: Stream, infini_folder: Path) -> None:
    with pytest.raises(ValueError, match="has memories already; segment_length, update_rule can be set only"):
        run(model=str(infini_folder), update_rule="delta")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_length": 0}, "chunk_length is 0; give at least 1"),
        ({"max_tokens": 1}, "max_tokens is 1; give at least 2"),
        ({"dtype": "float16"}, "dtype is 'float16'; give one of auto, float32, bfloat16"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"update_rule": "quadratic"}, "quadratic"),
    ],
)
def test_mistakes_are_named_with_a_remedy(run: Stream, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**settings)


def test_a_text_too_short_to_measure_is_refused(run: Stream, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r"0 tokens of empty\.txt were read; a perplexity needs at least 2"):
        run(empty)
