"""`infini report` from a folder of results to the page: the repository's own, and small made-up ones."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infini_attention.cli import main
from infini_attention.evaluation import passkey_report
from infini_attention.evaluation.document_perplexity import DocumentLoss, PerplexityReport, Stretch
from infini_attention.evaluation.document_perplexity import Setting as PerplexitySetting
from infini_attention.evaluation.lm_table import lm_table
from infini_attention.evaluation.passkey import Outcome, PasskeyReport, Setting
from infini_attention.evaluation.report import Report, report
from infini_attention.evaluation.report_figures import Drawing, drawings
from infini_attention.evaluation.report_page import page
from infini_attention.provenance import provenance

RESULTS = Path(__file__).parents[2] / "results"
PIXEL = b"not looked at"
VOID = {"meta", "link", "img", "br"}
TEXT, JSON = "2026-01-02-cpu-a.txt", "2026-01-03-cpu-b.json"
Folder = Callable[..., Path]


class Page(HTMLParser):
    """What a test asks of a page; an end tag that nothing opened, or another one, fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name == "src":
                self.sources.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.words += text


@pytest.fixture(scope="module")
def own() -> Report:
    if not RESULTS.is_dir():
        pytest.skip("a source distribution has no results")
    return report(RESULTS)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder with files by name, and an index with an entry for each of `named`, by default all."""

    def made(
        files: dict[str, str | bytes], named: list[str] | None = None, headline: list[Any] | None = None
    ) -> Path:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        names = [*files] if named is None else named
        results = [{"title": f"Of {name}", "finding": "It is so.", "files": [name]} for name in names]
        sections = [{"title": "Recall & more", "about": "What is known.", "results": results}]
        index = {"title": "Made up", "about": "For a test.", "sections": sections, "headline": headline or []}
        (tmp_path / "index.yaml").write_text(json.dumps(index))
        return tmp_path

    return made


def texts(drawing: Drawing) -> list[list[str]]:
    return [[cell.text for cell in row] for row in drawing.rows]


def test_every_result_of_the_repository_says_how_and_where_it_was_made(own: Report) -> None:
    for _, results in own.sections:
        for result in results:
            origin = result.origin
            assert origin.commands and origin.where and origin.commits, result.entry.title


def test_the_repositorys_page_needs_nothing_else_and_has_no_dead_link(own: Report) -> None:
    read = Page(page(own))
    assert "script" not in read.tags
    assert len(read.ids) == len({*read.ids})
    inner = [link for link in read.links if link.startswith("#")]
    assert {link[1:] for link in inner} <= {*read.ids}
    outer = [link for link in read.links if link not in inner]
    assert outer == ["data:,"]  # no icon, so that none is asked for
    pictures = [path for _, results in own.sections for result in results for path in result.pictures]
    assert len(read.sources) == len(pictures)
    assert all(source.startswith("data:image/") for source in read.sources)


def test_the_repositorys_page_shows_every_file(own: Report) -> None:
    words = Page(page(own)).words
    for path in RESULTS.iterdir():
        if path.name not in ("README.md", "index.yaml"):
            assert path.name in words
        if path.suffix == ".txt":
            lines = [line.strip() for line in path.read_text().splitlines()]
            assert all(line in words for line in lines if not line.startswith("{"))


def test_every_drawing_of_the_repository_has_a_cell_for_each_heading(own: Report) -> None:
    assert not any(file.problem for _, results in own.sections for result in results for file in result.files)
    drawn = [each for _, results in own.sections for result in results for each in drawings_of(result)]
    assert len(drawn) >= 30
    for drawing in drawn:
        assert drawing.rows, drawing.title
        assert {len(row) for row in drawing.rows} == {len(drawing.columns)}, drawing.title


def drawings_of(result: Any) -> Iterator[Drawing]:
    return (drawing for file in result.files for drawing in file.drawings)


def test_what_files_say_is_text_and_no_markup(folder: Folder) -> None:
    shown = page(report(folder({TEXT: "<script>alert(1)</script> & so on"})))
    assert "script" not in Page(shown).tags
    assert "<script>alert(1)</script> & so on" in Page(shown).words


def test_newer_results_come_first(folder: Folder) -> None:
    names = ["2026-01-02-a.txt", "2026-01-04-b.txt", "2026-01-04-c.txt", "2026-01-03-d.txt"]
    (_, results), *_ = report(folder(dict.fromkeys(names, "x"))).sections
    order = [result.entry.files[0] for result in results]
    assert order == ["2026-01-04-b.txt", "2026-01-04-c.txt", "2026-01-03-d.txt", "2026-01-02-a.txt"]


def test_what_files_say_of_their_making_is_shown_and_what_the_index_says_comes_first(folder: Folder) -> None:
    versions = {"python": "3.11", "torch": "2.13.0", "triton": "not installed"}
    made = {"command": "infini so", "commit": "0123456789-dirty", "versions": versions, "card": None}
    line = json.dumps({"loss": 0.5, "provenance": made | {"processor": "a CPU"}})
    path = folder({TEXT: line})
    origin = report(path).sections[0][1][0].origin
    assert origin.commands == ["infini so"]
    assert origin.where == ["a CPU, torch 2.13.0"]
    assert origin.commits == ["0123456-dirty"]
    index = json.loads((path / "index.yaml").read_text())
    index["sections"][0]["results"][0]["command"] = "another"
    (path / "index.yaml").write_text(json.dumps(index))
    assert report(path).sections[0][1][0].origin.commands == ["another"]


def test_pictures_are_within_the_page(folder: Folder) -> None:
    shown = page(report(folder({"2026-01-02-a.png": PIXEL})))
    assert Page(shown).sources == ["data:image/png;base64,bm90IGxvb2tlZCBhdA=="]


@pytest.mark.parametrize(
    ("files", "named", "words"),
    [
        ({TEXT: "a table"}, [], "does not name 2026-01-02-cpu-a.txt; add it there"),
        ({}, [TEXT], "lacks 2026-01-02-cpu-a.txt; put it there, or take it out of index.yaml"),
        ({TEXT: "x"}, [TEXT, TEXT], "names 2026-01-02-cpu-a.txt more than once"),
        ({}, [], "names no files for anything; name some"),
        ({JSON: "[1, 2]"}, [JSON], "holds a list and no object of JSON"),
        ({TEXT: b"\xff\xfe\x00"}, [TEXT], "is neither text nor a picture"),
        ({TEXT: 'a table\n{"rows": [1, 2'}, [TEXT], "line 2 of {folder}/2026-01-02-cpu-a.txt is broken JSON"),
        ({JSON: "a table"}, [JSON], "line 1 of {folder}/2026-01-03-cpu-b.json is broken JSON"),
        ({"table.txt": "x"}, ["table.txt"], "table.txt does not begin with a date"),
    ],
    ids=[
        "unnamed",
        "missing",
        "twice",
        "nothing",
        "a list",
        "no text",
        "broken line",
        "broken file",
        "no date",
    ],
)
def test_a_folder_that_does_not_fit_its_index_is_refused_with_a_remedy(
    folder: Folder, files: dict[str, str | bytes], named: list[str], words: str
) -> None:
    path = folder(files, named)
    with pytest.raises(ValueError, match=re.escape(words.replace("{folder}", str(path)))):
        report(path)


def test_json_of_another_form_than_its_kind_is_shown_as_it_is_with_a_remark(folder: Folder) -> None:
    path = folder(
        {
            TEXT: 'a table\n{"benchmark": "speed", "rows": [3]}',
            JSON: '{"gates": [[0.5]], "kinds": 1, "layers": 1}',
        }
    )
    words = Page(page(report(path))).words
    for name in (TEXT, JSON):
        assert f"{name} is not drawn as a table" in words
    assert "a table" in words
    assert '"kinds": 1' in words


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no index\.yaml; name a folder of results"):
        report(tmp_path)


@pytest.mark.parametrize("text", ["title: T\nabout: A\nsection: []", "title: [", "3"])
def test_an_index_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"index\.yaml is no index"):
        report(tmp_path)


def test_a_headline_shows_a_table_of_a_file_or_is_refused(folder: Folder) -> None:
    line = json.dumps({"benchmark": "speed", "rows": [{"length": 1, "ms": 2.0}, {"length": 2, "ms": 3.0}]})
    shown = {"title": "In short", "finding": "So.", "file": TEXT, "table": "Benchmark speed", "rows": 1}
    ((_, drawing, _),) = report(folder({TEXT: line}, headline=[shown])).headline
    assert texts(drawing) == [["1", "2"]]
    with pytest.raises(ValueError, match=r"'Speed' of .*, which has 'Benchmark speed'; name one of these"):
        report(folder({TEXT: line}, headline=[shown | {"table": "Speed"}]))


def test_the_command_writes_the_page(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out" / "report.html"
    main(["report", str(folder({TEXT: "a table"})), "-o", str(target)])
    assert "Recall & more" in Page(target.read_text()).words
    assert str(target) in capsys.readouterr().out


@pytest.fixture
def asked() -> PasskeyReport:
    """Shares that differ from cell to cell."""
    words = {
        "model": "m",
        "model_type": "t",
        "fingerprint": "f",
        "update_rule": "delta",
        "feature_map": "exp",
    }
    words |= {
        "normalization": "sum",
        "dtype": "float32",
        "device": "cpu",
        "variant": "varied",
        "prose": "books",
    }
    lengths, depths = [2048, 1_048_576], [0.0, 0.5, 1.0]
    setting = Setting(
        **words,
        segment_length=128,
        keys=4,
        rewrites=0,
        lengths=lengths,
        depths=depths,
        samples=4,
        exact_lengths=False,
        seed=0,
    )
    hits = iter((4, 3, 0, 1, 2, 4))
    outcomes = [
        Outcome(length, depth, sample, 5, 5 if sample < right else 2, 0, False)
        for length in lengths
        for depth in depths
        for right in [next(hits)]
        for sample in range(4)
    ]
    return PasskeyReport(setting, provenance(), outcomes, 1.0)


@pytest.mark.parametrize("width", [40, 120])
def test_grids_are_the_same_from_what_infini_passkey_prints_and_from_its_json(
    asked: PasskeyReport, width: int
) -> None:
    console = Console(width=width)
    with console.capture() as capture:
        for table in passkey_report.tables(asked):
            console.print(table)
    (printed,) = drawings(capture.get(), [])
    drawn, by_length = drawings(capture.get(), [json.loads(asked.to_json())])
    assert printed.columns[1:] == drawn.columns == ["tokens", "0%", "50%", "100%"]
    assert [row[1:] for row in printed.rows] == drawn.rows
    assert texts(drawn) == [["2,048", "100", "75", "0"], ["1,048,576", "25", "50", "100"]]
    assert {row[0].text for row in printed.rows} == {"varied in books, 4 keys"}
    assert texts(by_length)[0][1:4] == ["2,048", "12", "58.3 (32.0 to 80.7)"]


def test_runs_are_told_apart_by_their_seeds(asked: PasskeyReport) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        for table in [*passkey_report.tables(asked), *passkey_report.tables(asked)]:
            console.print(table)
    by_length = json.loads(asked.to_json())["by_length"]
    runs = [{"command": f"infini passkey --model m-seed-{seed}", "by_length": by_length} for seed in (1, 2)]
    for drawing in drawings(capture.get(), [{"runs": runs}]):
        names = [f"seed {seed}: varied in books, 4 keys" for seed in (1, 1, 2, 2)]
        assert [row[0].text for row in drawing.rows] == names


def share(value: float) -> dict[str, float]:
    return {"share": value, "low": 0.0, "high": 1.0, "trials": 4}


def test_a_study_is_drawn_by_arm_with_what_others_published_below() -> None:
    answers = [
        {
            "question": "paper",
            "length": 32768,
            "score": {"exact_match": share(right)},
            "by_depth": [{"token_accuracy": share(right)}, {"token_accuracy": share(1.0)}],
        }
        for right in (0.5, 0.75)
    ]
    study = {"seeds": [0, 1], "published": {"1B": {"32768": "97/99"}, "2B": {"1048576": "1/2"}}}
    arms = [
        {"name": "a", "factors": {"update_rule": "delta"}},
        {"name": "b", "factors": {"update_rule": "linear"}},
    ]
    results = [{"arm": "a", "answers": [answer]} for answer in answers] + [{"arm": "b", "answers": []}]
    right, accuracy = drawings("", [{"study": study, "arms": arms, "results": results}])
    assert right.columns == ["update rule", "paper, 32,768"]
    assert texts(right) == [["delta", "62 [50, 75]"], ["linear", "-"]]
    assert right.rows[0][1].share == 0.625
    published = [["published: 1B", "97/99"], ["published: 2B", "-"]]
    assert texts(accuracy) == [["delta", "62/100"], ["linear", "-"], *published]


def test_a_study_of_associative_recall_is_drawn_by_length_and_pairs() -> None:
    score = {"length": 256, "pairs": 16, "accuracy": share(0.9)}
    results = [{"arm": "a", "answers": [{"question": "mqar", "score": score}]}]
    found = {"study": {"seeds": [0]}, "arms": [{"name": "a", "factors": {"arm": "a"}}], "results": results}
    (drawing,) = drawings("", [found])
    assert drawing.columns == ["arm", "mqar, 256 / 16"]
    assert texts(drawing) == [["a", "90"]]


def test_a_study_of_whole_documents_is_drawn_by_arm_and_question() -> None:
    def answer(value: float) -> dict[str, Any]:
        return {"question": "books", "shown": {"value": value, "low": 4.0, "high": 7.5}, "beside": {}}

    arms = [{"name": name, "factors": {"arm": name}} for name in ("a", "b", "c")]
    results = [{"arm": "a", "answers": [answer(value)]} for value in (5.0, 6.0)]
    results += [{"arm": "b", "answers": [answer(5.25)]}, {"arm": "c", "answers": []}]
    study = {"seeds": [0, 1], "ask": {"books": {"perplexity_of": {"source": "pg19"}}}}
    (drawing,) = drawings("", [{"study": study, "arms": arms, "results": results}])
    assert drawing.columns == ["arm", "books"]
    assert texts(drawing) == [["a", "5.50 [5.00, 6.00]"], ["b", "5.25 (4.00 to 7.50)"], ["c", "-"]]
    assert "Means of 2 seeds" in drawing.remark and "intervals over documents" in drawing.remark
    key = {"question": "paper", "length": 512, "score": {"exact_match": share(0.5)}}
    results[0]["answers"].append(key)
    both = drawings("", [{"study": study, "arms": arms, "results": results}])
    assert [each.columns for each in both] == [["arm", "books"], ["arm", "paper, 512"]]
    assert both[1].remark == "One seed."


@pytest.fixture
def read() -> PerplexityReport:
    """Two documents, of which one has a second stretch."""
    setting = {
        "model": "m",
        "model_type": "llama",
        "system": "Infini delta",
        "fingerprint": "f",
        "parameters": 1,
    }
    setting |= {
        "segment_length": 16,
        "dtype": "float32",
        "device": "cpu",
        "documents": "books",
        "source": "s",
    }
    first = Stretch(0, 16, 15, 3, 60, 15 * math.log(4), 15 * math.log(4))
    second = Stretch(16, 32, 16, 3, 60, 16 * math.log(2), 16 * math.log(3))
    documents = [DocumentLoss(0, "a", [first, second]), DocumentLoss(1, "b", [first])]
    made = PerplexitySetting(**setting, max_tokens=None, memory_off=True)  # type: ignore[arg-type]
    return PerplexityReport(made, provenance(), documents=documents, whole=True)


def test_perplexity_is_drawn_by_position_with_the_memory_on_and_off(read: PerplexityReport) -> None:
    whole, by_position = drawings("", [json.loads(read.to_json())])
    assert whole.title == "Infini delta on books"
    value = read.figures("on").token_perplexity.value
    assert whole.rows[0][1].text.startswith(f"{value:.2f} (")
    assert texts(by_position) == [["from 0", "4", "4"], ["from 16", "2", "3"]]


def test_a_table_of_language_models_is_drawn_by_position(read: PerplexityReport, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(read.to_json())
    whole, by_position = drawings("", [json.loads(lm_table([tmp_path / "a.json"]).to_json())])
    assert [row[0].text for row in whole.rows] == ["Infini delta", "Infini delta, memory off"]
    assert texts(by_position) == [["Infini delta", "4", "2"], ["Infini delta, memory off", "4", "3"]]
    assert by_position.columns == ["", "0 to 15", "16 to 31"]


def test_positions_that_only_begin_alike_have_columns_of_their_own(
    read: PerplexityReport, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(read.to_json())
    setting = replace(read.setting, system="window", fingerprint="w", segment_length=32, memory_off=False)
    stretch = Stretch(0, 32, 31, 6, 120, 31 * math.log(5), None)
    documents = [replace(each, by_position=[stretch]) for each in read.documents]
    (tmp_path / "b.json").write_text(replace(read, setting=setting, documents=documents).to_json())
    _, by_position = drawings(
        "", [json.loads(lm_table([tmp_path / "a.json", tmp_path / "b.json"]).to_json())]
    )
    assert by_position.columns == ["", "0 to 15", "0 to 31", "16 to 31"]
    assert texts(by_position)[-1] == ["window", "-", "5", "-"]


def test_gates_are_drawn_as_maps_by_layer_and_head() -> None:
    kind = {"name": "key", "share": [[0.25, 0.5]], "predicted": 9, "loss": 1.5, "loss_memory_off": 2.0}
    empty = kind | {"name": "question", "share": None}
    found = {"gates": [[0.018, 0.9]], "layers": [3], "kinds": [kind, empty]}
    gates, measured, losses = drawings("", [found])
    assert texts(gates) == [["layer 3", "0.02", "0.90"]]
    assert [cell.share for cell in gates.rows[0]] == [None, 0.018, 0.9]
    assert (measured.title, texts(measured)) == (
        "Measured share of the memory, key",
        [["layer 3", "0.25", "0.50"]],
    )
    assert texts(losses)[0] == ["key", "9", "1.5", "2"]


def test_times_are_drawn_by_length_with_both_of_what_ran_twice() -> None:
    rows = [
        {"system": "local", "length": "32K", "pass": "forward", "ms": 0.25, "extra_bytes": 67_000_000},
        {"system": "full", "length": "32K", "pass": "backward", "ms": 3.0, "extra_bytes": 1_500_000_000},
        {"system": "full", "length": "1M", "pass": "forward", "note": "out of memory"},
        {"system": "local", "length": "32K", "pass": "forward", "ms": 0.26, "extra_bytes": 67_000_000},
    ]
    (drawing,) = drawings("", [{"benchmark": "ops_gpu", "rows": rows}])
    assert drawing.columns == ["pass", "system", "32K tokens", "1M tokens"]
    assert texts(drawing) == [
        ["forward", "local", "0.25 (67 MB) and 0.26 (67 MB)", "-"],
        ["forward", "full", "-", "out of memory"],
        ["backward", "full", "3 (1.5 GB)", "-"],
    ]


def test_rows_of_a_benchmark_are_a_table_for_each_of_its_parts() -> None:
    rows = [
        {"part": "read", "context": 1000, "peak_bytes": 49_000_000},
        {"part": "decode", "context": 1000, "seconds": {"ours": 0.5, "peer": None}},
        {"part": "decode", "context": 8192, "seconds": {"ours": 0.25}, "note": "once"},
    ]
    first, second = drawings("", [{"benchmark": "stream", "rows": rows}])
    assert (first.title, first.columns) == ("Benchmark stream, read", ["context", "peak bytes"])
    assert texts(first) == [["1,000", "49 MB"]]
    assert second.columns == ["context", "seconds, ours", "seconds, peer", "note"]
    assert texts(second) == [["1,000", "0.5", "-", "-"], ["8,192", "0.25", "-", "once"]]


def test_tasks_of_lm_eval_are_drawn_under_the_system_that_was_asked() -> None:
    found = {
        "setting": {
            "model": "a",
            "system": "Infini linear",
            "segment_length": 2048,
            "dtype": "bfloat16",
            "memory_reset": True,
        },
        "lm_eval": "0.4.13",
        "figures": [{"task": "b", "value": 0.25, "stderr": None}],
    }
    [drawing] = drawings("", [found])
    assert drawing.title == "a, Infini linear, segments of 2,048, bfloat16, memory reset, by lm-eval 0.4.13"
    assert (drawing.columns, texts(drawing)) == (["task", "value", "stderr"], [["b", "0.25", "-"]])
    found["setting"] |= {"memory_reset": False}
    assert (
        drawings("", [found])[0].title == "a, Infini linear, segments of 2,048, bfloat16, by lm-eval 0.4.13"
    )


def test_figures_of_a_kind_that_is_not_known_are_shown_as_they_are() -> None:
    one = {"steps": 400, "recall": 1.0, "provenance": asdict(provenance()), "commit": "c"}
    (drawing,) = drawings("", [one, one | {"recall": 0.06}])
    assert drawing.columns == ["steps", "recall"]
    assert texts(drawing) == [["400", "1"], ["400", "0.06"]]
