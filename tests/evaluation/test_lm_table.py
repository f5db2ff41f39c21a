"""`infini table lm` from result files to the table, with results that are made up."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infini_attention.cli import main
from infini_attention.evaluation.document_perplexity import DocumentLoss, PerplexityReport, Setting, Stretch
from infini_attention.evaluation.lm_table import LmTable, Row, lm_table
from infini_attention.evaluation.lm_table_report import markdown, plot
from infini_attention.provenance import provenance

LENGTHS = [40, 64, 100, 30, 64, 81]
HARD = np.random.default_rng(0).normal(3, 0.5, len(LENGTHS))  # nats a token of each document, for all systems
Write = Callable[..., Path]


def report(system: str, gain: float, **fields: Any) -> PerplexityReport:
    """A system that is better than others by `gain` nats a token after the first segment of 16."""
    setting = {"model": system, "model_type": "llama", "system": system, "fingerprint": f"{system} {gain}"}
    setting |= {"parameters": 1000, "segment_length": 16, "dtype": "float32", "device": "cpu"}
    setting |= {"documents": "books", "source": "s", "max_tokens": None, "memory_off": "Infini" in system}
    own = {name: fields.pop(name) for name in [*fields] if name in setting}
    documents = [document(number, gain, bool(setting["memory_off"])) for number in range(len(LENGTHS))]
    made = PerplexityReport(Setting(**setting | own), provenance(), documents=documents, seconds=5.0)
    return replace(made, **fields)


def document(number: int, gain: float, off: bool) -> DocumentLoss:
    length, stretches = LENGTHS[number], []
    for start in (0, 16, 32, 64):
        end = min(16 if start == 0 else 2 * start, length)
        if start < length:
            counts = end - start - (start == 0), 3, 4 * (end - start)
            easy = HARD[number] + 0.01 * number  # what systems differ by varies a little
            nats = counts[0] * (easy - (gain if start else 0))
            stretches.append(Stretch(start, end, *counts, nats, counts[0] * easy if off else None))
    return DocumentLoss(number, f"digest {number}", stretches)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, *arguments: Any, **fields: Any) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(report(*arguments, **fields).to_json())
        return path

    return written


@pytest.fixture
def table(write: Write) -> LmTable:
    """Three systems on books, one of them with two seeds, and two of them on maths."""
    trained = {"tokens": 2e8, "seconds": 1800.0, "peak_memory_bytes": int(1.2e10)}
    sizes = {"memory_floats": 396_288, "compression": 177.6}
    return lm_table(
        [
            write("infini-0", "Infini delta", 0.10, trained=trained, **sizes),
            write("infini-1", "Infini delta", 0.14, trained=trained | {"seconds": 5400.0}, **sizes),
            write("local", "local only", 0.0, trained=trained),
            write("xl", "Transformer-XL", 0.05),
            write("infini-maths", "Infini delta", 0.20, documents="maths", trained={"tokens": 6e7}, **sizes),
            write("local-maths", "local only", 0.0, documents="maths"),
        ]
    )


def row(table: LmTable, name: str) -> Row:
    return next(each for each in table.rows if each.name == name)


def test_rows_are_systems_with_the_memory_off_beside_it(table: LmTable) -> None:
    names = [each.name for each in table.rows]
    assert names == ["Infini delta", "Infini delta, memory off", "local only", "Transformer-XL"]
    assert table.documents == ["books", "maths"]
    assert row(table, "Infini delta").memory_floats == 396_288
    off = row(table, "Infini delta, memory off")
    assert (off.memory_floats, off.compression) == (None, None)
    assert [*row(table, "Transformer-XL").cells] == ["books"]


def test_seeds_are_one_system_by_their_mean_loss(table: LmTable) -> None:
    cell = row(table, "Infini delta").cells["books"]
    assert len(cell.seeds) == 2
    assert cell.figures.token_perplexity.value == pytest.approx(math.sqrt(math.prod(cell.seeds)))
    assert (cell.trained_tokens, cell.trained_seconds) == (2e8, 3600.0)
    assert cell.trained_peak_bytes == 1.2e10


def test_the_difference_is_paired_and_tighter_than_what_documents_differ_by(table: LmTable) -> None:
    cell = row(table, "Infini delta").cells["books"]
    later = sum(max(length - 16, 0) for length in LENGTHS) / (sum(LENGTHS) - len(LENGTHS))
    assert cell.difference is not None
    assert cell.difference.value == pytest.approx(100 * (math.exp(-0.12 * later) - 1))
    assert cell.difference.low < cell.difference.value < cell.difference.high < 0
    perplexity = cell.figures.token_perplexity
    apart = 100 * (perplexity.high - perplexity.low) / perplexity.value
    assert cell.difference.high - cell.difference.low < apart / 5
    assert row(table, "local only").cells["books"].difference is None
    assert row(table, "Infini delta, memory off").cells["books"].difference.value == pytest.approx(0)


def test_the_difference_by_position_is_over_those_documents_that_reach_it(table: LmTable) -> None:
    first, second, third, last = row(table, "Transformer-XL").cells["books"].by_position
    assert [each.documents for each in (first, second, third, last)] == [6, 6, 5, 2]
    assert (last.start, last.end) == (64, 100)
    assert first.difference is not None and first.difference.value == pytest.approx(0)
    for each in (second, third, last):
        assert each.difference is not None
        assert each.difference.value == pytest.approx(100 * (math.exp(-0.05) - 1))


def test_any_system_can_be_the_reference(write: Write) -> None:
    paths = [write("xl", "Transformer-XL", 0.05), write("local", "local only", 0.0)]
    table = lm_table(paths, reference="Transformer-XL")
    difference = row(table, "local only").cells["books"].difference
    assert difference is not None and difference.value > 0
    assert row(table, "Transformer-XL").cells["books"].difference is None
    assert all(each.cells["books"].difference is None for each in lm_table(paths, reference="none").rows)


def test_the_markdown_has_every_system_figure_and_position(table: LmTable) -> None:
    shown = markdown(table)
    lines = shown.splitlines()
    assert lines[0].startswith(
        "| system | memory, numbers | compression | books: token ppl | to local only, %"
    )
    assert len({line.count("|") for line in lines[:6]}) == 1
    infini = next(line for line in lines if line.startswith("| Infini delta |"))
    perplexity = row(table, "Infini delta").cells["books"].figures.token_perplexity
    for words in ("| 396K | 178x |", f"{perplexity.value:,.2f} (", "| 200M, 60M | 1.00, - | 12 GB, - |"):
        assert words in infini
    assert "| Transformer-XL |" in shown and "- Infini delta on books: " in shown
    assert "Token perplexity by position on maths" in shown and "| 64 to 99 | 2 |" in shown


def test_positions_stand_in_one_line_only_where_they_are_the_same(write: Write, tmp_path: Path) -> None:
    other = report("window", 0.0, segment_length=32)
    longer = [replace(each, by_position=_first_two_in_one(each.by_position)) for each in other.documents]
    path = tmp_path / "window.json"
    path.write_text(replace(other, documents=longer).to_json())
    lines = markdown(lm_table([write("local", "local only", 0.0), path])).splitlines()
    shown = [line.rsplit("|", 3)[1:3] for line in lines if re.match(r"\| 0 to ", line)]
    assert [[cell.strip() == "-" for cell in cells] for cells in shown] == [[False, True], [True, False]]


def _first_two_in_one(stretches: list[Stretch]) -> list[Stretch]:
    first, second, *others = stretches
    counted = ("tokens", "words", "bytes", "nats")
    sums = {name: getattr(first, name) + getattr(second, name) for name in counted}
    return [replace(first, end=second.end, **sums), *others]


def test_the_picture_is_written_where_asked(table: LmTable, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'infini-attention[eval]'")
    path = tmp_path / "new" / "lm.png"
    plot(table, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_markdown_or_json(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write("xl", "Transformer-XL", 0.05)), str(write("local", "local only", 0.0))]
    main(["table", "lm", *paths])
    assert capsys.readouterr().out.startswith("| system |")
    main(["table", "lm", *paths, "--reference", "Transformer-XL", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert [each["system"] for each in content["rows"]] == ["Transformer-XL", "local only"]
    assert content["reference"] == "Transformer-XL"


def test_a_file_may_be_called_otherwise(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    long, short = write("long", "local only", 0.0), write("rows=512", "local only", 0.1, segment_length=32)
    main(["table", "lm", str(long), f"local only, rows of 512={short}", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [each["system"] for each in rows] == ["local only", "local only, rows of 512"]
    assert rows[1]["cells"]["books"]["difference"]["value"] < 0
    main(["table", "lm", str(short), "--json"])  # whose path has a = in it
    assert json.loads(capsys.readouterr().out)["rows"][0]["system"] == "local only"
    with pytest.raises(ValueError, match=r"names has .*rows=512\.json, which is not among the files"):
        lm_table([long], names={short: "other rows"})
    with pytest.raises(SystemExit):
        main(["table", "lm", f"{short}x"])  # which is nowhere, and no name
    assert f"{short}x cannot be read" in capsys.readouterr().err


def test_results_that_are_not_alike_are_refused(write: Write, tmp_path: Path) -> None:
    local = write("local", "local only", 0.0)
    with pytest.raises(ValueError, match=r"local\.json and .*again\.json are of the same model"):
        lm_table([local, write("again", "local only", 0.0)])
    with pytest.raises(ValueError, match=r"local\.json is given twice"):
        lm_table([local, local])
    fewer = write("fewer", "Transformer-XL", 0.1, documents="books")
    cut_off = json.loads(fewer.read_text())
    cut_off["documents"].pop()
    fewer.write_text(json.dumps(cut_off))
    with pytest.raises(ValueError, match=r"\(6 documents and 5, 5 alike\); let infini perplexity finish"):
        lm_table([local, fewer])
    longer = write("longer", "local only", 0.1, segment_length=32)
    with pytest.raises(ValueError, match=r"both of local only, with segment_length 16 and 32, so"):
        lm_table([local, longer])
    read, unread = write("read", "Infini", 0.0), write("unread", "Infini", 0.1, memory_off=False)
    with pytest.raises(ValueError, match=r"with memory_off True and False, so .* otherwise, as NAME=FILE"):
        lm_table([read, unread])
    lucky = write("lucky", "local only", 0.1, trained={"tokens": 1.0})
    with pytest.raises(ValueError, match=r"lucky\.json are both of local only, and only one"):
        lm_table([local, lucky])
    older = write("older", "RMT", 0.1, trained={"tokens": 1.0})  # which does not tell, and is no excuse
    made = {"steps": (5, 1750), "learning_rate": (0.001, 0.002), "row_tokens": (512, 2048)}
    for what, two in (made | {"gate_learning_rate": (0, 0.01)}).items():
        seeds = [
            write(f"{what}-{each}", "RMT", each / 1e4, trained={"tokens": 1.0, what: each}) for each in two
        ]
        told = f"are both of RMT, with {what} {two[0]:,} and {two[1]:,}, so they are no two seeds"
        with pytest.raises(ValueError, match=re.escape(told)):
            lm_table([older, *seeds])
    with pytest.raises(ValueError, match=r"both of local only, with parameters 1,000 and 2,000"):
        lm_table([local, write("wide", "local only", 0.1, parameters=2000)])
    with pytest.raises(ValueError, match=r"nothing\.json cannot be read"):
        lm_table([tmp_path / "nothing.json"])
