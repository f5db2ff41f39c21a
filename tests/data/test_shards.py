import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import torch

from infini_attention.data import shards
from infini_attention.data.documents import Documents
from infini_attention.data.shards import TokenStore, tokenized
from infini_attention.data.tokenizers import byte_tokenizer

TEXTS = ["The quality of mercy\n", "", "is not strain'd – 日本\n" * 9, "x"]
FULL = [text for text in TEXTS if text]


@pytest.fixture
def books(tmp_path: Path) -> Documents:
    (tmp_path / "books").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    return Documents(f"{tmp_path}/books/*.txt")


def read(store: TokenStore) -> list[str]:
    return [bytes(store.document(number).tolist()).decode() for number in range(len(store))]


@pytest.mark.parametrize("batch_tokens", [1, 30, 1 << 20])
def test_documents_come_back_as_their_tokens(
    books: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(shards, "BATCH_TOKENS", batch_tokens)
    store = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    assert read(store) == FULL
    assert store.lengths.tolist() == [len(text.encode()) for text in FULL]
    assert store.tokens == sum(store.lengths)
    assert store.document(1).dtype == torch.int64
    assert store.document(-1).equal(store.document(2))
    with pytest.raises(IndexError):
        store.document(3)


def test_a_slice_of_a_document_ends_with_the_document(books: Documents, tmp_path: Path) -> None:
    store = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    whole = store.document(1)
    for start, stop in ((0, 5), (3, 3), (7, 10_000), (len(whole), None), (len(whole) + 5, len(whole) + 9)):
        assert store.document(1, start, stop).equal(whole[start:stop])


def test_reading_holds_nothing_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100_000)
    folder = tokenized(Documents(f"{tmp_path}/a.txt"), byte_tokenizer(), tmp_path / "tokens").folder
    before = pyarrow.total_allocated_bytes()
    store = TokenStore(folder)
    assert bytes(store.document(0, 250_000, 250_004).tolist()) == b"word"
    assert pyarrow.total_allocated_bytes() - before < 10_000


def test_a_document_can_end_in_a_token_of_its_own(books: Documents, tmp_path: Path) -> None:
    for ending in (256, 70_000):  # 16 and 32 bits
        store = tokenized(books, byte_tokenizer(), tmp_path / "tokens", end_of_document=ending)
        assert [int(store.document(number)[-1]) for number in range(3)] == [ending] * 3
        assert bytes(store.document(0)[:-1].tolist()).decode() == FULL[0]
    with pytest.raises(ValueError, match="end_of_document is -1"):
        tokenized(books, byte_tokenizer(), tmp_path / "tokens", end_of_document=-1)


def test_what_a_store_holds_and_was_made_from_is_written_beside_it(books: Documents, tmp_path: Path) -> None:
    store = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    assert store.info == json.loads((store.folder / "info.json").read_text())
    assert store.folder.name == store.info["fingerprint"][:16]
    counts = {name: store.info[name] for name in ("documents", "tokens", "empty_documents")}
    assert counts == {"documents": 3, "tokens": store.tokens, "empty_documents": 1}
    assert [file["name"] for file in store.info["made_from"]["documents"]["data_files"]] == [
        f"{number}.txt" for number in range(4)
    ]


def test_a_second_time_nothing_is_tokenised(
    books: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    blocks = shards.token_blocks
    monkeypatch.setattr(shards, "token_blocks", lambda *args: calls.append(args) or blocks(*args))
    first = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    assert len(calls) == len(TEXTS)
    second = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    assert len(calls) == len(TEXTS)
    assert second.folder == first.folder
    assert read(second) == FULL


def changed_text(folder: Path) -> None:
    (folder / "0.txt").write_text(TEXTS[0].replace("m", "n"))


def changed_name(folder: Path) -> None:
    (folder / "0.txt").rename(folder / "00.txt")


def one_more(folder: Path) -> None:
    (folder / "9.txt").write_text("nine")


@pytest.mark.parametrize("change", [changed_text, changed_name, one_more])
def test_other_files_are_another_store(
    books: Documents, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    first = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    change(tmp_path / "books")
    assert tokenized(books, byte_tokenizer(), tmp_path / "tokens").folder != first.folder


def test_other_settings_or_another_tokenizer_are_another_store(books: Documents, tmp_path: Path) -> None:
    more = byte_tokenizer()
    more.add_tokens(["mercy"])
    stores = [
        tokenized(books, byte_tokenizer(), tmp_path / "tokens"),
        tokenized(Documents(books.source, max_documents=3), byte_tokenizer(), tmp_path / "tokens"),
        tokenized(books, byte_tokenizer(), tmp_path / "tokens", end_of_document=256),
        tokenized(books, more, tmp_path / "tokens"),
    ]
    assert len({store.folder for store in stores}) == 4


def test_the_place_and_date_of_files_and_the_tokenizers_last_call_change_nothing(
    books: Documents, tmp_path: Path
) -> None:
    first = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    shutil.copytree(tmp_path / "books", tmp_path / "moved")
    os.utime(tmp_path / "moved" / "0.txt", (0, 0))
    tokenizer = byte_tokenizer()
    tokenizer("a text", truncation=True, max_length=3)
    assert tokenized(Documents(f"{tmp_path}/moved/*"), tokenizer, tmp_path / "tokens").folder == first.folder


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_build_that_is_broken_off_leaves_nothing(
    books: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def break_off(documents: Documents) -> Iterator[Any]:
        yield from list(documents_of(documents))[:2]
        raise error

    documents_of = shards.open_documents
    monkeypatch.setattr(shards, "open_documents", break_off)
    monkeypatch.setattr(shards, "BATCH_TOKENS", 1)  # so that something was written
    with pytest.raises(error):
        tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []
    monkeypatch.undo()
    assert read(tokenized(books, byte_tokenizer(), tmp_path / "tokens")) == FULL


def test_of_two_who_build_at_once_the_slower_takes_what_is_there(
    books: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, faster = shards._build, []

    def overtaken(*arguments: Any) -> dict[str, int]:
        counts = build(*arguments)
        monkeypatch.setattr(shards, "_build", build)
        faster.append(tokenized(books, byte_tokenizer(), tmp_path / "tokens"))
        return counts

    monkeypatch.setattr(shards, "_build", overtaken)
    slower = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == [slower.folder] == [faster[0].folder]
    assert read(slower) == read(faster[0]) == FULL


def test_a_store_can_be_the_source_where_its_texts_are_not(books: Documents, tmp_path: Path) -> None:
    made = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    shutil.rmtree(tmp_path / "books")
    moved = shutil.move(made.folder, tmp_path / "elsewhere")
    again = tokenized(Documents(str(moved)), byte_tokenizer(), tmp_path / "unused")
    assert read(again) == FULL
    assert not (tmp_path / "unused").exists()


def test_a_store_that_was_made_otherwise_is_refused_as_a_source(books: Documents, tmp_path: Path) -> None:
    other = byte_tokenizer()
    other.add_tokens(["mercy"])
    source = str(tokenized(books, byte_tokenizer(), tmp_path / "tokens").folder)
    with pytest.raises(ValueError, match="tokens made with another tokenizer; make them anew"):
        tokenized(Documents(source), other, tmp_path)
    with pytest.raises(ValueError, match="tokens made with another end_of_document"):
        tokenized(Documents(source), byte_tokenizer(), tmp_path, end_of_document=0)
    with pytest.raises(ValueError, match="of which all are taken; leave all settings of documents out"):
        tokenized(Documents(source, max_documents=1), byte_tokenizer(), tmp_path)


def test_documents_that_hold_no_text_at_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a\.txt holds no text \(1 empty documents\)"):
        tokenized(Documents(f"{tmp_path}/a.txt"), byte_tokenizer(), tmp_path / "tokens")


def test_a_slow_tokenizer_is_refused(books: Documents, tmp_path: Path) -> None:
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="does not report where tokens begin; load the model's fast"):
        tokenized(books, slow, tmp_path / "tokens")


def test_a_store_can_be_pickled(books: Documents, tmp_path: Path) -> None:
    store = tokenized(books, byte_tokenizer(), tmp_path / "tokens")
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert read(pickle.loads(pickled)) == FULL


def test_without_pyarrow_the_pip_command_is_named(
    books: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"need pyarrow.*pip install 'infini-attention\[train\]'"):
        tokenized(books, byte_tokenizer(), tmp_path / "tokens")
