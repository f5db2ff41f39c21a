"""Windows of tokens for training: map-style datasets over a TokenStore.

Every token of a document but its first, which has nothing before it, is to be predicted exactly once. Items
can be read in any order and by any number of workers.
"""

import bisect
import heapq

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from infini_attention.data.shards import TokenStore
from infini_attention.models.loss import IGNORED


class Windows(Dataset[dict[str, Tensor]]):
    """Every document cut into windows of `length` tokens, its last one filled up.

    Items are `input_ids` and `shift_labels`, each (length,) int64. shift_labels[t] is the token that comes
    after input_ids[t] in the document, -100 where none does, where the window is filled up (with id 0), or
    where an earlier window has it.

    Args:
        store: the documents' tokens.
        length: tokens a window.
        stride: from one window's first token to the next one's; default `length`. With less, a window begins
            with length - stride tokens that an earlier one has predicted, for their context.

    Raises:
        ValueError: a length below 1, or a stride outside 1 to `length`.
    """

    def __init__(self, store: TokenStore, length: int, *, stride: int | None = None) -> None:
        stride = length if stride is None else stride
        if not 1 <= stride <= length:
            raise ValueError(f"length is {length} and stride {stride}; give 1 <= stride <= length")
        self.store, self.length, self.stride = store, length, stride
        later = -(-np.maximum(store.lengths - 1 - length, 0) // stride)
        self._ends = np.cumsum(np.where(store.lengths > 1, 1 + later, 0))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The window number `index`, documents in their order."""
        document, number = _find(self._ends, range(len(self))[index])
        item = _window(self.store, document, number * self.stride, self.length)
        if number:
            item["shift_labels"][: self.length - self.stride] = IGNORED
        return item


class CarriedWindows(Dataset[dict[str, Tensor]]):
    """Windows in the order in which a memory that is carried from step to step can read them.

    Each row of the batch goes through documents of its own, window after window. The documents are shuffled
    and each goes to the row that has the least so far. Item `step * rows + row` is what `row` reads in
    `step`: read the items in their order, `rows` at a time.

    Items are those of `Windows` (without overlap), and `starts_document`, a bool of no dimension: true where
    the row's memory has to be emptied first. Rows that end early are filled with windows that have nothing to
    predict, and start documents.

    Args:
        store: the documents' tokens.
        length: tokens a window.
        rows: of a whole step, over all processes and all batches that are accumulated.
        seed: of the shuffle.

    Raises:
        ValueError: a length or rows below 1, or fewer documents of at least two tokens than rows.
    """

    def __init__(self, store: TokenStore, length: int, rows: int, *, seed: int = 0) -> None:
        if length < 1 or rows < 1:
            raise ValueError(f"length is {length} and rows {rows}; give at least 1 of each")
        self.store, self.length, self.rows = store, length, rows
        windows = -(-(store.lengths - 1) // length)
        shuffled = _shuffled(len(store), seed)
        self._documents = _deal(shuffled[windows[shuffled] > 0], windows, rows)
        self._ends = [np.cumsum(windows[documents]) for documents in self._documents]
        self.steps = max(int(ends[-1]) for ends in self._ends)

    def __len__(self) -> int:
        return self.steps * self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """What row `index % rows` reads in step `index // rows`."""
        step, row = divmod(range(len(self))[index], self.rows)
        if step >= self._ends[row][-1]:
            return _nothing(self.length) | {"starts_document": torch.tensor(True)}
        place, number = _find(self._ends[row], step)
        item = _window(self.store, int(self._documents[row][place]), number * self.length, self.length)
        return item | {"starts_document": torch.tensor(number == 0)}


class SplitWindows(Dataset[dict[str, Tensor]]):
    """Windows of which a step reads a part, of many documents: their memory is carried from part to part.

    Each row of the batch goes through windows of `parts * length` tokens, a part a step. Rows begin their
    windows at different steps, as evenly as can be: an epoch starts in the midst of most rows' first window,
    whose beginning is read last. Windows are shuffled and dealt anew for every epoch. Item
    `step * rows + row` is what `row` reads in `step`: read the items in their order, `rows` at a time.

    Items are those of `CarriedWindows`. Rows that have fewer windows are filled with such that have nothing
    to predict.

    Args:
        store: the documents' tokens.
        length: tokens a part.
        rows: of a whole step, over all processes and all batches that are accumulated.
        parts: of a window.
        together: so many rows, side by side, begin their windows at the same steps.
        seed: of the shuffle.

    Raises:
        ValueError: length, rows or parts below 1, or `together` not from 1 to `rows`.
    """

    def __init__(
        self, store: TokenStore, length: int, rows: int, parts: int, *, together: int = 1, seed: int = 0
    ) -> None:
        _check_sizes(length, rows, parts)
        if not 1 <= together <= rows:
            raise ValueError(f"together is {together}, and there are {rows} rows; give from 1 to {rows}")
        self.store, self.length, self.rows, self.parts = store, length, rows, parts
        self.together, self.seed = together, seed
        self._ends = _window_ends(store, parts * length)
        self.steps = -(-int(self._ends[-1]) // rows) * parts
        self.set_epoch(0)

    @property
    def filled(self) -> float:
        """The share of all positions that have something to predict."""
        return int(_predicted(self.store).sum()) / max(1, len(self) * self.length)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as for this epoch."""
        self._order = _shuffled(int(self._ends[-1]), self.seed + epoch)

    def __len__(self) -> int:
        return self.steps * self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """What row `index % rows` reads in step `index // rows`."""
        step, row = divmod(range(len(self))[index], self.rows)
        first = row - row % self.together  # of those that begin with this one
        ahead = first * self.parts // self.rows
        turn, part = divmod((step + ahead) % self.steps, self.parts)
        place = turn * self.rows + row
        if place >= len(self._order):
            item = _nothing(self.length)
        else:
            item = _part(self, int(self._order[place]), part)
        return item | {"starts_document": torch.tensor(part == 0 or step == 0)}


class FlowingWindows(Dataset[dict[str, Tensor]]):
    """Windows of which a step reads a part, and that no row waits for: where one is over the next begins.

    As SplitWindows, but for that: a window has as many parts as its text, at most `parts`, and rows take the
    next of all windows as soon as they are through with one. They go on so over the ends of epochs, in each
    of which they read as many parts as there are; the windows of a pass are shuffled anew. Rows begin as
    evenly spread as can be, as if they had read before the first step: up to `parts` parts each, which are
    left to later passes. Item `step * rows + row` is what `row` reads in `step`: read the items in their
    order, `rows` at a time.

    Args:
        store: the documents' tokens.
        length: tokens a part.
        rows: of a whole step, over all processes and all batches that are accumulated.
        parts: of a window, at most.
        seed: of the shuffle.

    Raises:
        ValueError: length, rows or parts below 1, or documents in which there is nothing to predict.
    """

    def __init__(self, store: TokenStore, length: int, rows: int, parts: int, *, seed: int = 0) -> None:
        _check_sizes(length, rows, parts)
        self.store, self.length, self.rows, self.parts, self.seed = store, length, rows, parts, seed
        self._ends = _window_ends(store, parts * length)
        if not self._ends[-1]:
            raise ValueError("no document has two tokens, of which one is predicted; give others")
        self._sizes = np.full(int(self._ends[-1]), parts)
        rest = -(-(_predicted(store) % (parts * length)) // length)  # of a last window that is shorter
        self._sizes[self._ends[rest > 0] - 1] = rest[rest > 0]
        self.steps = -(-int(self._sizes.sum()) // rows)
        self._begin()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Be where this epoch begins: where the one before ends."""
        if epoch < self._epoch:
            self._begin()
        while self._epoch < epoch:
            self._go_on()

    def _begin(self) -> None:
        self._epoch, self._taken = -1, 0
        self._free = [(-(row * self.parts // self.rows), row) for row in range(self.rows)]  # when
        heapq.heapify(self._free)
        self._read: list[list[tuple[int, int]]] = [[] for _ in range(self.rows)]  # from when, what window

    def _go_on(self) -> None:
        """Let rows take the next epoch's windows."""
        self._epoch += 1
        end = (self._epoch + 1) * self.steps
        self._read = [read[-1:] for read in self._read]  # which may go on
        while self._free[0][0] < end:
            step, row = self._free[0]
            window = self._next()
            self._read[row].append((step, window))
            heapq.heapreplace(self._free, (step + int(self._sizes[window]), row))

    def _next(self) -> int:
        number, place = divmod(self._taken, len(self._sizes))
        if not place:
            self._order = _shuffled(len(self._sizes), self.seed + number)
        self._taken += 1
        return int(self._order[place])

    def __len__(self) -> int:
        return self.steps * self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """What row `index % rows` reads in step `index // rows`."""
        step, row = divmod(range(len(self))[index], self.rows)
        step += self._epoch * self.steps
        read = self._read[row]
        began, window = read[bisect.bisect(read, step, key=lambda each: each[0]) - 1]
        part = step - began
        return _part(self, window, part) | {"starts_document": torch.tensor(part == 0 or step == 0)}


class PackedDocuments(Dataset[dict[str, Tensor]]):
    """Whole documents, or pieces of at most `length` tokens, of as many tokens as they have.

    For `transformers.DataCollatorWithFlattening`, which packs a batch into one row whose positions restart at
    every item, and takes the first token of each for given: so a piece begins with the last token of the one
    before. Items are `input_ids` and `labels`, the same, (tokens,) int64.

    Raises:
        ValueError: a length below 2.
    """

    def __init__(self, store: TokenStore, length: int) -> None:
        if length < 2:
            raise ValueError(f"length is {length}; give at least 2, of which one is predicted")
        self.store, self.length = store, length
        self._ends = np.cumsum(-(-(store.lengths - 1) // (length - 1)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The piece number `index`, documents in their order."""
        document, number = _find(self._ends, range(len(self))[index])
        start = number * (self.length - 1)
        tokens = self.store.document(document, start, start + self.length)
        return {"input_ids": tokens, "labels": tokens}


def _check_sizes(length: int, rows: int, parts: int) -> None:
    if length < 1 or rows < 1 or parts < 1:
        raise ValueError(f"length is {length}, rows {rows} and parts {parts}; give at least 1 of each")


def _shuffled(count: int, seed: int) -> np.ndarray:
    """The numbers below `count`, in the order of the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


def _part(of: SplitWindows | FlowingWindows, window: int, part: int) -> dict[str, Tensor]:
    """One part of a window."""
    document, number = _find(of._ends, window)
    return _window(of.store, document, (number * of.parts + part) * of.length, of.length)


def _predicted(store: TokenStore) -> np.ndarray:
    """How many tokens of each document are to be predicted."""
    return np.maximum(store.lengths - 1, 0)


def _window_ends(store: TokenStore, tokens: int) -> np.ndarray:
    """How many windows of so many tokens the documents have, up to each one's end."""
    return np.cumsum(-(-_predicted(store) // tokens))


def _find(ends: np.ndarray, index: int) -> tuple[int, int]:
    """The document that window `index` is of, and which of its windows; `ends` counts windows up to each."""
    document = int(np.searchsorted(ends, index, side="right"))
    return document, index - (int(ends[document - 1]) if document else 0)


def _window(store: TokenStore, document: int, start: int, length: int) -> dict[str, Tensor]:
    tokens = store.document(document, start, start + length + 1)
    inputs, labels = tokens[:length], tokens[1:]
    return {
        "input_ids": F.pad(inputs, (0, length - len(inputs))),
        "shift_labels": F.pad(labels, (0, length - len(labels)), value=IGNORED),
    }


def _nothing(length: int) -> dict[str, Tensor]:
    """What a row reads that has nothing left to predict."""
    labels = torch.full((length,), IGNORED)
    return {"input_ids": torch.zeros_like(labels), "shift_labels": labels}


def _deal(documents: np.ndarray, windows: np.ndarray, rows: int) -> list[list[int]]:
    """Give each document in turn to the row that has the fewest windows so far."""
    if len(documents) < rows:
        raise ValueError(
            f"{len(documents)} documents have something to predict, for {rows} rows; give fewer rows"
        )
    dealt: list[list[int]] = [[] for _ in range(rows)]
    loads = [(0, row) for row in range(rows)]
    for document in documents:
        load, row = heapq.heappop(loads)
        dealt[row].append(int(document))
        heapq.heappush(loads, (load + int(windows[document]), row))
    return dealt
