"""Where the cuts fall: from rows of tokens, padded or packed, to segments.

Every row is a sequence of its own, cut at multiples of N from its own first real token. One call's new
tokens fall into at most three parts, the same for every row:

    row 0   ..open|head---|whole--|whole--|tail..        N = 8, 2 tokens already open
    row 1     open|head-----|whole--|tail.               4 tokens already open, a shorter row

`head` finishes the open segment, `whole` segments are complete, `tail` opens the next one. Padding is
taken out before anything is computed and put back, as zeros, into the output.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stretches:
    """Runs of consecutive real tokens, each of one row, to be handled side by side.

    `starts` and `counts` are in tokens of the row, `used` are tokens that the run's segment holds already.
    `columns` says which of the call's segments each run lies in, `first` whether that is its row's first of
    all. Where the runs are the same slice of every row, `span` is that slice; else `index` holds their flat
    (batch * length) positions, (runs, width), in which places beyond a run's end repeat a real token.
    """

    rows: list[int]
    starts: list[int]
    counts: list[int]
    used: list[int]
    columns: list[int]
    first: list[bool]
    span: slice | None
    index: Tensor | None

    @property
    def width(self) -> int:
        """Tokens of the longest run."""
        return max(self.counts)

    @property
    def alike(self) -> bool:
        """Whether all runs have as many tokens, and their segments held as many before."""
        return len(set(self.counts)) == 1 and len(set(self.used)) == 1

    def valid(self, device: torch.device) -> Tensor:
        """(runs, width) bool, True = a real token."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(self.width, device=device) < counts[:, None]


@dataclass(frozen=True)
class Whole(Stretches):
    """Whole segments, row after row.

    `segments` counts those of each row: run i of row r is the row's i-th segment in this block.
    """

    segments: list[int]

    def steps(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """What happens in order: at each step, the rows that still have a segment, and its run."""
        first = [sum(self.segments[:row]) for row in range(len(self.segments))]
        steps = []
        for step in range(max(self.segments)):
            rows = [row for row, count in enumerate(self.segments) if count > step]
            runs = [first[row] + step for row in rows]
            steps.append((torch.tensor(rows, device=device), torch.tensor(runs, device=device)))
        return steps


@dataclass(frozen=True)
class Layout:
    """The plan of one call: which tokens are real, whose they are, and how they are cut.

    Per row: `open_lengths` tokens are in its open segment already, which is its `first` of all or not;
    `counts` are new, of which `heads` finish that segment and then fill so many whole `segments`. `real`
    lists the flat (batch * length) positions of the real tokens, row after row; None when every token is real
    and rows are the batch's own.
    """

    batch: int
    length: int
    segment_length: int
    open_lengths: list[int]
    first: list[bool]
    counts: list[int]
    heads: list[int]
    segments: list[int]
    real: Tensor | None
    device: torch.device

    @property
    def rows(self) -> int:
        """Number of sequences: batch size, or documents of a packed batch."""
        return len(self.counts)

    def head(self) -> Stretches | None:
        """What continues the open segments; None if no row has one or there is nothing to add."""
        return self._open_stretches(
            [0] * self.rows, self.heads, self.open_lengths, [0] * self.rows, self.first
        )

    def tail(self) -> Stretches | None:
        """What is left after the last whole segment of each row; None if nothing is."""
        pairs = zip(self.heads, self.segments, strict=True)
        starts = [head + whole * self.segment_length for head, whole in pairs]
        counts = [count - start for count, start in zip(self.counts, starts, strict=True)]
        ends = [used + head for used, head in zip(self.open_lengths, self.heads, strict=True)]
        used = [end % self.segment_length for end in ends]  # not 0 where a head did not finish its segment
        last = self.columns - 1  # a row that ends with a whole segment has no column for its empty tail
        columns = [min(self._first_column + whole, last) for whole in self.segments]
        first = [
            is_first and used + start < self.segment_length
            for is_first, used, start in zip(self.first, self.open_lengths, starts, strict=True)
        ]
        return self._open_stretches(starts, counts, used, columns, first)

    def whole(self, block_tokens: int | None = None, *, first_apart: bool = False) -> list[Whole]:
        """All whole segments, in blocks of about `block_tokens` tokens; None for a single block.

        With `first_apart`, one that is its row's first of all is in a block with no later one of its row.
        """
        most = max([0, *self.segments])
        steps = most if block_tokens is None else block_tokens // (self.segment_length * self.rows)
        apart = int(first_apart and any(self._is_first(row, 0) for row in range(self.rows)))
        edges = [*range(min(apart, most)), *range(apart, most, max(1, steps)), most]
        return [self._whole_block(first, last) for first, last in pairwise(edges)]

    @property
    def columns(self) -> int:
        """Number of segments that the longest row touches in this call."""
        return max(
            -(-(used + count) // self.segment_length)
            for used, count in zip(self.open_lengths, self.counts, strict=True)
        )

    def take(self, x: Tensor, part: Stretches) -> Tensor:
        """The tokens of `part`: (batch, heads, length, dim) to (runs, heads, width, dim)."""
        if part.span is not None:
            return _fold(x[:, :, part.span], part.width)
        return x.transpose(1, 2).flatten(0, 1)[part.index].transpose(1, 2)

    def take_weights(self, weights: Tensor, part: Stretches) -> Tensor:
        """The weights of the segments of `part`: (rows, columns) to (runs,)."""
        if part.span is not None:
            return weights[:, part.columns[0] : part.columns[-1] + 1].flatten()
        return weights[part.rows, part.columns]

    @property
    def _uniform(self) -> bool:
        return self.real is None and len(set(self.open_lengths)) == 1

    @property
    def _first_column(self) -> int:
        return 1 if any(self.open_lengths) else 0

    def _is_first(self, row: int, step: int) -> bool:
        """Whether that of the row's whole segments is its first of all."""
        return self.first[row] and step == 0 and not any(self.open_lengths)

    def _open_stretches(
        self, starts: list[int], counts: list[int], used: list[int], columns: list[int], first: list[bool]
    ) -> Stretches | None:
        if not any(counts):
            return None
        rows = list(range(self.rows))
        span = slice(starts[0], starts[0] + counts[0]) if self._uniform else None
        index = None if self._uniform else self._index(rows, starts, max(counts))
        return Stretches(rows, starts, counts, used, columns, first, span, index)

    def _whole_block(self, first: int, last: int) -> Whole:
        size, head = self.segment_length, self.heads
        segments = [max(0, min(last, whole) - first) for whole in self.segments]
        pairs = [(row, step) for row in range(self.rows) for step in range(first, first + segments[row])]
        rows = [row for row, _ in pairs]
        starts = [head[row] + step * size for row, step in pairs]
        columns = [self._first_column + step for _, step in pairs]
        firsts = [self._is_first(row, step) for row, step in pairs]
        span = slice(head[0] + first * size, head[0] + last * size) if self._uniform else None
        index = None if self._uniform else self._index(rows, starts, size)
        counts, used = [size] * len(pairs), [0] * len(pairs)
        return Whole(rows, starts, counts, used, columns, firsts, span, index, segments)

    def _index(self, rows: list[int], starts: list[int], width: int) -> Tensor:
        """(runs, width) flat positions in the input; places beyond a row's last real token repeat it."""
        counts = torch.tensor(self.counts)
        row = torch.tensor(rows)
        first, last = (counts.cumsum(0) - counts)[row], (counts.cumsum(0) - 1)[row]
        places = (first + torch.tensor(starts))[:, None] + torch.arange(width)
        places = places.minimum(last[:, None]).clamp(min=0).to(self.device)
        return places if self.real is None else self.real[places]


class Output:
    """The output of one call, (batch, heads, length, value_dim), filled part by part; 0 at padding.

    Each part is written to its place as it comes, so that none outlives its turn; a part that is all
    there is becomes the output itself.
    """

    def __init__(self, layout: Layout, query: Tensor, value_dim: int) -> None:
        self._layout = layout
        self._like = query
        self._value_dim = value_dim
        self._tensor: Tensor | None = None

    def write(self, part: Stretches, values: Tensor) -> None:
        """Put `values` (runs, heads, width, value_dim), the inverse of `Layout.take`."""
        if part.span == slice(0, self._layout.length):
            self._tensor = _unfold(values, self._layout.batch)
            return
        output = self._zeros() if self._tensor is None else self._tensor
        if part.span is not None:
            output[:, :, part.span] = _unfold(values, self._layout.batch)
        else:
            assert part.index is not None
            valid = part.valid(values.device)
            flat = output.transpose(1, 2).flatten(0, 1)
            flat.index_copy_(0, part.index[valid], values.transpose(1, 2)[valid])
        self._tensor = output

    def tensor(self) -> Tensor:
        """The output, after every part."""
        return self._zeros() if self._tensor is None else self._tensor

    def _zeros(self) -> Tensor:
        layout, heads = self._layout, self._like.shape[1]
        return self._like.new_zeros(layout.batch, layout.length, heads, self._value_dim).transpose(1, 2)


def _fold(x: Tensor, width: int) -> Tensor:
    """(batch, heads, steps * width, dim) to (batch * steps, heads, width, dim); a view where x allows it."""
    batch, heads, _, dim = x.shape
    return x.reshape(batch, heads, -1, width, dim).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_fold`."""
    return x.reshape(batch, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)


def plan(
    batch: int,
    length: int,
    *,
    segment_length: int,
    lengths: list[int],
    device: torch.device,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Layout:
    """The layout of a (batch, length) input whose rows have had so many tokens before, their `lengths`."""
    open_lengths, first = [n % segment_length for n in lengths], [n < segment_length for n in lengths]
    real: Tensor | None = None
    counts = [length] * batch
    if cu_seqlens is not None:
        counts = cu_seqlens.diff().tolist()
        real = torch.arange(length, device=device)
    elif padding_mask is not None and not bool(padding_mask.all()):
        counts = padding_mask.sum(dim=1).tolist()
        real = padding_mask.to(device).flatten().nonzero().squeeze(1)
    heads = [0] * len(counts)
    if any(open_lengths):
        rooms = [segment_length - used for used in open_lengths]
        heads = [min(count, room) for count, room in zip(counts, rooms, strict=True)]
    segments = [(count - head) // segment_length for count, head in zip(counts, heads, strict=True)]
    return Layout(batch, length, segment_length, open_lengths, first, counts, heads, segments, real, device)


def segment_positions(
    length: int,
    *,
    segment_length: int,
    open_lengths: Tensor | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Each token's position inside its own segment, which is where local position embeddings restart.

    `open_lengths` (rows,) are the tokens each row has open already (`MemoryState.open_length`), None for
    none; `padding_mask` (batch, length) bool; `cu_seqlens` (documents + 1,) for a packed batch of one.
    Returns (batch, length) int64 in [0, segment_length), with batch 1 when all rows are alike; 0 at padding.
    """
    if cu_seqlens is not None:
        starts = cu_seqlens.to(device, torch.int64)
        order = torch.arange(length, device=device)
        document = torch.searchsorted(starts, order, right=True) - 1
        places = (order - starts[document]).unsqueeze(0)
        used = 0 if open_lengths is None else open_lengths.to(device)[document]
        return (places + used) % segment_length
    if padding_mask is not None:
        mask = padding_mask.to(device)
        places = mask.to(torch.int64).cumsum(dim=1) - 1
    else:
        places = torch.arange(length, device=device).unsqueeze(0)
    if open_lengths is not None:
        if padding_mask is None and len(alike := set(open_lengths.tolist())) == 1:
            places = places + alike.pop()
        else:
            places = places + open_lengths.to(device)[:, None]
    places = places % segment_length
    return places if padding_mask is None else places.masked_fill(~mask, 0)
