"""Every form of source, made small and read by the loader that reads the large ones."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from infini_attention.data import documents as module
from infini_attention.data.documents import CORPORA, Documents, identity, open_documents, pinned

PROOF_PILE = "hoskinson-center/proof-pile@490b9802"
ARXIV = {"config": "arxiv", "file": "1812.02537/v5 arxiv/main.tex"}
FORUM = {"config": "stack-exchange", "question_id": 7, "votes": {"up": [1]}}


def texts(source: str | Documents, **settings: Any) -> list[str]:
    documents = source if isinstance(source, Documents) else Documents(source, **settings)
    return ["".join(document.pieces) for document in open_documents(documents)]


def write_lines(path: Path, *rows: Any) -> str:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def write_table(path: Path, **columns: list[Any]) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_text_files_are_a_document_each_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.txt"):
        (tmp_path / name).write_text(f"{name}\r\n\n日本")
    assert texts(f"{tmp_path}/*") == [f"{name}\r\n\n日本" for name in ("a.md", "b.txt", "c.txt")]
    assert texts(f"{tmp_path}/b.txt") == ["b.txt\r\n\n日本"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text("d")
    assert len(texts(f"{tmp_path}/**/*.txt")) == 3


def test_text_files_arrive_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 200_000)
    (document,) = open_documents(Documents(f"{tmp_path}/a.txt"))
    assert document.name.endswith("a.txt")
    assert max(map(len, document.pieces)) < 100_000


def test_parquet_files_have_a_document_a_row(tmp_path: Path) -> None:
    write_table(tmp_path / "b.parquet", title=["3"], text=["three"])
    write_table(tmp_path / "a.parquet", title=["1", "2"], text=["one", "two"])
    assert texts(f"{tmp_path}/*.parquet") == ["one", "two", "three"]
    assert texts(f"{tmp_path}/*.parquet", column="title") == ["1", "2", "3"]
    assert texts(f"{tmp_path}/*.parquet", max_documents=2) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.v1.jsonl.gz"])
def test_json_lines_need_not_be_alike(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one\u2028\n"}, {"id": 7, "text": "two"}, {"id": "8", "x": {"y": []}, "text": "three"}]
    assert texts(write_lines(tmp_path / name, *rows)) == ["one\u2028\n", "two", "three"]


def test_documents_without_text_have_no_pieces(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": ""}, {"text": None}, {"text": "one"})
    assert [list(document.pieces) for document in open_documents(Documents(path))] == [[], [], ["one"]]


def test_files_of_pg19s_form_are_read_in_its_place(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "test-00000-of-00001.parquet",
        short_book_title=["Emma"],
        publication_date=[1815],
        url=["http://www.gutenberg.org/ebooks/158"],
        text=["EMMA\r\n"],
    )
    assert texts("pg19", split="test", data_files=[path]) == ["EMMA\r\n"]


@pytest.mark.parametrize("as_text", [False, True], ids=["objects", "json"])
def test_of_proof_pile_only_arxiv_is_read(tmp_path: Path, as_text: bool) -> None:
    metas = [json.dumps(meta) if as_text else meta for meta in (ARXIV, FORUM, ARXIV)]
    rows = [{"text": f"paper {number}", "meta": meta} for number, meta in enumerate(metas)]
    path = write_lines(tmp_path / "proofpile_train_0.jsonl.gz", *rows)
    assert texts("arxiv-math", data_files=[path]) == ["paper 0", "paper 2"]
    assert texts("arxiv-math", data_files=[path], max_documents=2) == ["paper 0", "paper 2"]


def test_files_of_c4s_form_are_read_in_its_place(tmp_path: Path) -> None:
    rows = [{"text": f"page {n}", "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"} for n in range(2)]
    for shard, row in enumerate(rows):
        write_lines(tmp_path / f"c4-train.{shard:05d}-of-01024.json.gz", row)
    assert texts("c4", data_files=[f"{tmp_path}/c4-train.*.json.gz"]) == ["page 0", "page 1"]


def test_csv_files_have_a_document_a_row(tmp_path: Path) -> None:
    rows = [
        f'{n},"Chapter {n}, in which\n""nothing"" happens."\n' for n in range(40)
    ]  # more than are read at once
    (tmp_path / "a.csv").write_text("number,text\n" + "".join(rows))
    found = texts(f"{tmp_path}/a.csv")
    assert found == [f'Chapter {n}, in which\n"nothing" happens.' for n in range(40)]


def test_a_corpus_has_a_column_of_its_own_unless_another_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("chapter,summary_text\nAll of it.,Some of it.\n")
    files = [f"{tmp_path}/a.csv"]
    assert texts("booksum", data_files=files) == ["All of it."]
    assert texts("booksum", data_files=files, column="summary_text") == ["Some of it."]


@pytest.mark.parametrize(
    ("corpus", "split", "builder", "repository", "files"),
    [
        ("pg19", "validation", "parquet", "emozilla/pg19@c021754c", "/data/validation-*.parquet"),
        (
            "arxiv-math",
            "validation",
            "text",
            PROOF_PILE,
            "/dev/proofpile_dev.jsonl.gz",
        ),
        ("c4", "train", "text", "allenai/c4@1588ec45", "/en/c4-train.*.json.gz"),
        ("booksum", "validation", "csv", "kmfoda/booksum@c6232103", "/dev.csv"),
    ],
)
def test_a_corpus_is_read_from_the_hub_at_one_commit(
    monkeypatch: pytest.MonkeyPatch, corpus: str, split: str, builder: str, repository: str, files: str
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(*arguments: Any, **settings: Any) -> list[Any]:
        calls.append((*arguments, settings["data_files"], settings["streaming"]))
        return []

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(corpus, split=split) == []
    (address,) = identity(Documents(corpus, split=split))["data_files"]
    assert calls == [(builder, [address], True)]
    assert address.startswith(f"hf://datasets/{repository}")
    assert address.partition(CORPORA[corpus].revision)[2] == files


def test_a_hub_dataset_is_held_at_the_commit_it_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*names: str, **settings: Any) -> list[Any]:
        calls.append((names, settings))
        return [{"body": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: SimpleNamespace(sha="abc"))
    documents = pinned(Documents("someone/books", split="test", config="small", column="body"))
    assert documents.revision == identity(documents)["revision"] == "abc"
    assert texts(documents) == ["one"]
    settings = {"split": "test", "revision": "abc", "streaming": True}
    assert calls == [(("someone/books", "small"), settings)]


def test_a_hub_that_does_not_answer_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    with pytest.raises(ValueError, match=r"dataset 'someone/books'.*known are pg19, .*no network"):
        pinned(Documents("someone/books"))


def test_a_split_that_a_corpus_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ValueError, match="c4 has no split 'test'; choose one of train, validation"):
        open_documents(Documents("c4", split="test"))


@pytest.mark.parametrize("source", ["*.txt", "nothing.txt", "./books", "a/b/c", "~/nothing"])
def test_a_source_that_matches_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no file matches .*; give an existing path"):
        open_documents(Documents(source))


def test_files_that_cannot_be_told_or_read_together_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.pdf"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"a\.txt and .*b\.jsonl are of different forms"):
        open_documents(Documents(f"{tmp_path}/[ab].*"))
    with pytest.raises(ValueError, match=r"what .*c\.pdf holds is not known; give files that end in \.txt, "):
        open_documents(Documents(f"{tmp_path}/*"))
    with pytest.raises(ValueError, match=r"is a folder; name its files with a pattern"):
        open_documents(Documents(str(tmp_path)))
    with pytest.raises(ValueError, match=r"no file matches .* of data_files"):
        open_documents(Documents("pg19", data_files=[f"{tmp_path}/*.parquet"]))


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("a.txt", {"split": "test"}),
        ("a.txt", {"column": "body"}),
        ("a.txt", {"data_files": ["b.txt"]}),
        ("pg19", {"config": "en"}),
        ("someone/books", {"data_files": ["b.txt"]}),
    ],
)
def test_settings_that_mean_nothing_for_a_source_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, settings: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*; leave it out"):
        open_documents(Documents(source, **settings))


def test_what_is_wrong_with_a_row_is_said_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line, message in (
        ('{"title": "", "body": ""}', r"row 1 of .* has no column 'text'; choose one of title, body"),
        ('{"text": 7}', r"column 'text' in row 1 of .* is int; name a column of text"),
        ("text", r"row 1 of .* is not JSON: .*; give one object a line"),
        ("[]", r"row 1 of .* is list; give one JSON object a line"),
    ):
        path.write_text('{"text": "one"}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            texts(str(path))


def test_max_documents_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_documents is 0"):
        Documents("a.txt", max_documents=0)


def test_without_datasets_the_pip_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    path = write_lines(tmp_path / "a.jsonl", {"text": "one"})
    with pytest.raises(ValueError, match=r"needs the package datasets.*'infini-attention\[train\]'"):
        texts(path)


def test_every_corpus_is_held_at_a_whole_commit() -> None:
    assert all(len(corpus.revision) == 40 for corpus in CORPORA.values())


def test_the_plays_are_split_by_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plays = {}
    for name in ("hamlet", "king-lear", "othello", "macbeth"):
        plays[name] = tmp_path / f"{name}.md"
        plays[name].write_text(f"# {name}")
    monkeypatch.setattr("infini_attention.data.documents.text_aliases", lambda: plays)
    splits = {
        split: [Path(found.name).stem for found in open_documents(Documents("shakespeare", split=split))]
        for split in ("train", "validation")
    }
    assert splits == {"train": ["othello", "macbeth"], "validation": ["hamlet", "king-lear"]}
    with pytest.raises(ValueError, match="shakespeare has no split 'test'; choose one of train, validation"):
        list(open_documents(Documents("shakespeare", split="test")))


def test_names_that_look_like_patterns_are_names(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("c1", "c[1]"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "d [2].txt").write_text("d")
    found = open_documents(Documents(f"{tmp_path}/c*.jsonl"))
    assert sorted("".join(document.pieces) for document in found) == ["c1", "c[1]"]
    (document,) = open_documents(Documents(f"{tmp_path}/d [2].txt"))
    assert "".join(document.pieces) == "d"
