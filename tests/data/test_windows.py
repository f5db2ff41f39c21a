import pickle
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithFlattening

from infini_attention.data.documents import Documents
from infini_attention.data.shards import TokenStore, tokenized
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.data.windows import (
    CarriedWindows,
    FlowingWindows,
    PackedDocuments,
    SplitWindows,
    Windows,
)

LENGTH = 8
SIZES = [20, 1, 2, 7, 8, 9, 10, 16, 17, 33]  # bytes of each document
TEXTS = [string.ascii_letters[start : start + size] for start, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder: Path = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return tokenized(Documents(f"{folder}/*.txt"), byte_tokenizer(), folder / "tokens")


def text_of(labels: Tensor) -> str:
    return bytes(labels[labels != -100].tolist()).decode()


@pytest.mark.parametrize("stride", [None, 8, 5, 1])
def test_every_token_but_a_documents_first_is_a_label_exactly_once(
    store: TokenStore, stride: int | None
) -> None:
    windows = Windows(store, LENGTH, stride=stride)
    labels = "".join(text_of(item["shift_labels"]) for item in windows)
    assert labels == "".join(text[1:] for text in TEXTS)
    assert all(len(item[name]) == LENGTH for item in windows for name in item)
    assert all((item["shift_labels"] != -100).any() for item in windows)


@pytest.mark.parametrize("stride", [None, 3])
def test_a_label_is_what_comes_after_its_input(store: TokenStore, stride: int | None) -> None:
    for item in Windows(store, LENGTH, stride=stride):
        inputs, labels = item["input_ids"], item["shift_labels"]
        assert item["input_ids"].dtype == item["shift_labels"].dtype == torch.int64
        inner = (labels[:-1] != -100) & (inputs[1:] != 0)
        assert labels[:-1][inner].equal(inputs[1:][inner])
        assert (labels[inputs == 0] == -100).all()


def test_smaller_strides_give_context(store: TokenStore) -> None:
    first, second, *_ = Windows(store, LENGTH, stride=5)
    assert second["input_ids"][:3].equal(first["input_ids"][5:])
    assert second["shift_labels"].tolist()[:3] == [-100] * 3


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_each_row_reads_whole_documents_one_after_the_other(store: TokenStore, rows: int) -> None:
    windows = CarriedWindows(store, LENGTH, rows, seed=3)
    assert len(windows) == windows.steps * rows
    read = []
    for row in range(rows):
        for item in (windows[step * rows + row] for step in range(windows.steps)):
            begins = bool(item["starts_document"])
            if begins:
                read.append(bytes(item["input_ids"][:1].tolist()).decode())
            else:  # goes on where the window before stopped
                assert chr(int(item["input_ids"][0])) == read[-1][-1]
            read[-1] += text_of(item["shift_labels"])
    empty = [text for text in read if text == "\0"]  # rows that ended early
    assert sorted(text for text in read if text != "\0") == sorted(text for text in TEXTS if len(text) > 1)
    assert sum(map(len, read)) - len(empty) == sum(SIZES) - 1


def test_rows_are_of_about_the_same_length(store: TokenStore) -> None:
    windows = CarriedWindows(store, LENGTH, 3)
    filled = [int((item["shift_labels"] != -100).any()) for item in windows]
    loads = [sum(filled[row::3]) for row in range(3)]
    assert max(loads) - min(loads) <= -(-max(SIZES) // LENGTH)
    assert windows.steps == max(loads)


@pytest.mark.parametrize(
    ("rows", "parts", "together"), [(1, 2, 1), (3, 2, 1), (4, 3, 2), (5, 2, 5), (20, 4, 1)]
)
def test_each_row_reads_whole_windows_one_after_the_other(
    store: TokenStore, rows: int, parts: int, together: int
) -> None:
    split = SplitWindows(store, LENGTH, rows, parts, together=together, seed=3)
    assert len(split) == split.steps * rows
    windows = [item for item in Windows(store, LENGTH * parts)]
    read: list[Tensor] = []
    for row in range(rows):
        items = [split[step * rows + row] for step in range(split.steps)]
        assert bool(items[0]["starts_document"])
        begins = [step for step, item in enumerate(items) if step and item["starts_document"]]
        first = begins[0] % parts if begins else 0  # in the midst of a window, whose beginning comes last
        assert begins == list(range(first or parts, split.steps, parts))
        items = items[first:] + items[:first]
        labels = torch.stack([item["shift_labels"] for item in items]).view(-1, parts * LENGTH)
        read += [each for each in labels if (each != -100).any()]
    expected = sorted(item["shift_labels"].tolist() for item in windows)
    assert sorted(each.tolist() for each in read) == expected


@pytest.mark.parametrize(("rows", "parts"), [(1, 2), (3, 2), (4, 3), (20, 4)])
def test_flowing_rows_take_window_after_window_and_wait_for_none(
    store: TokenStore, rows: int, parts: int
) -> None:
    flowing = FlowingWindows(store, LENGTH, rows, parts, seed=3)
    expected = [text_of(item["shift_labels"]) for item in Windows(store, LENGTH * parts)]
    sizes = [-(-len(text) // LENGTH) for text in expected]
    assert len(flowing) == flowing.steps * rows and flowing.steps == -(-sum(sizes) // rows)
    begun: list[tuple[int, int]] = []
    read: list[list[str]] = [[] for _ in range(rows)]
    for epoch in range(12):
        flowing.set_epoch(epoch)
        for index, item in enumerate(flowing):
            (step, row), text = divmod(index, rows), text_of(item["shift_labels"])
            assert text  # no part is empty
            if item["starts_document"]:
                begun.append((epoch * flowing.steps + step, row))
                read[row].append("")
            read[row][-1] += text
    texts = [iter(each) for each in read]
    windows = [(step, next(texts[row])) for step, row in begun]
    taken = [
        text for step, text in windows if 0 < step <= 12 * flowing.steps - parts
    ]  # and read to their ends
    count = len(expected)
    assert len(taken) > 4 * count

    def is_of_passes(taken: list[str]) -> bool:
        passes = [taken[start : start + count] for start in range(0, len(taken) - count + 1, count)]
        return all(sorted(each) == sorted(expected) for each in passes)

    assert any(is_of_passes(taken[first:]) for first in range(count))


def test_flowing_rows_begin_at_different_steps_and_go_on_over_the_ends_of_epochs(store: TokenStore) -> None:
    flowing = FlowingWindows(store, 4, 6, 3)
    begin = torch.tensor([bool(item["starts_document"]) for item in flowing]).view(-1, 6)
    assert begin[0].all() and not begin[1:].all(dim=1).any() and begin[1:3].sum(dim=0).max() == 1
    last = [item["shift_labels"][-1] for item in list(flowing)[-6:]]
    flowing.set_epoch(1)
    following = list(flowing)[:6]
    goes_on = [not item["starts_document"] for item in following]
    assert any(goes_on)
    for label, item, goes in zip(last, following, goes_on, strict=True):
        assert not goes or item["input_ids"][0] == label


def test_as_many_rows_as_can_begin_a_window_in_every_step(store: TokenStore) -> None:
    split = SplitWindows(store, 4, 6, 3)
    begin = torch.tensor([bool(item["starts_document"]) for item in split]).view(-1, 6).sum(dim=1)
    assert begin[0] == 6 and set(begin[1:].tolist()) == {2}
    pairs = SplitWindows(store, 4, 6, 3, together=3)
    begin = torch.tensor([bool(item["starts_document"]) for item in pairs]).view(-1, 2, 3)
    assert (begin.all(dim=2) | ~begin.any(dim=2)).all()  # three by three
    assert begin[1:].any(dim=2).sum(dim=1).max() == 1


@pytest.mark.parametrize("make", [SplitWindows, FlowingWindows])
def test_every_epoch_deals_windows_anew(store: TokenStore, make: Any) -> None:
    def read(epoch: int, seed: int = 0) -> list[list[int]]:
        windows = make(store, LENGTH, 2, 2, seed=seed)
        windows.set_epoch(epoch)
        return [item["shift_labels"].tolist() for item in windows]

    assert read(0) == read(0) != read(1) != read(0, seed=5)
    if make is SplitWindows:
        assert sorted(read(0)) == sorted(read(1))


def test_the_seed_decides_the_order_of_the_documents(store: TokenStore) -> None:
    orders = [
        [item["input_ids"].tolist() for item in CarriedWindows(store, LENGTH, 2, seed=s)] for s in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_packed_documents_predict_every_token_once_in_a_row_of_their_own(store: TokenStore) -> None:
    pieces = PackedDocuments(store, LENGTH)
    assert max(len(item["input_ids"]) for item in pieces) == LENGTH
    batch = DataCollatorWithFlattening()(list(pieces))
    assert text_of(batch["labels"][0]) == "".join(text[1:] for text in TEXTS)
    starts = [0, *torch.tensor([len(item["input_ids"]) for item in pieces]).cumsum(0).tolist()]
    assert (batch["position_ids"][0] == 0).nonzero().flatten().tolist() == starts[:-1]


@pytest.mark.parametrize(
    "make",
    [
        lambda s: Windows(s, 4),
        lambda s: CarriedWindows(s, 4, 2),
        lambda s: SplitWindows(s, 4, 2, 2),
        lambda s: FlowingWindows(s, 4, 2, 2),
    ],
)
def test_items_do_not_depend_on_workers_or_pickling(store: TokenStore, make: type[Dataset]) -> None:
    windows = make(store)
    here = [item["input_ids"] for item in windows]
    loader = DataLoader(pickle.loads(pickle.dumps(windows)), batch_size=3, num_workers=2)
    assert torch.cat([batch["input_ids"] for batch in loader]).equal(torch.stack(here))


def test_bad_sizes_are_refused(store: TokenStore) -> None:
    with pytest.raises(ValueError, match="length is 8 and stride 9; give 1 <= stride <= length"):
        Windows(store, 8, stride=9)
    with pytest.raises(ValueError, match="length is 0"):
        CarriedWindows(store, 0, 1)
    with pytest.raises(ValueError, match="length is 8, rows 2 and parts 0; give at least 1 of each"):
        SplitWindows(store, 8, 2, 0)
    with pytest.raises(ValueError, match="together is 3, and there are 2 rows; give from 1 to 2"):
        SplitWindows(store, 8, 2, 2, together=3)
    with pytest.raises(ValueError, match="length is 8, rows 0 and parts 2; give at least 1 of each"):
        FlowingWindows(store, 8, 0, 2)
    with pytest.raises(ValueError, match="9 documents have something to predict, for 10 rows; give fewer"):
        CarriedWindows(store, 8, 10)
    with pytest.raises(ValueError, match="length is 1; give at least 2"):
        PackedDocuments(store, 1)


def test_there_is_no_window_beyond_the_last(store: TokenStore) -> None:
    for windows in (
        Windows(store, 4),
        CarriedWindows(store, 4, 2),
        SplitWindows(store, 4, 2, 2),
        FlowingWindows(store, 4, 2, 2),
        PackedDocuments(store, 4),
    ):
        with pytest.raises(IndexError):
            windows[len(windows)]
