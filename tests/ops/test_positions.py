"""segment_positions: where local position embeddings restart."""

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from infini_attention.ops import segment_positions


def counted(mask: list[list[bool]], opened: list[int], segment_length: int) -> list[list[int]]:
    """By counting on the fingers."""
    table = []
    for row, used in zip(mask, opened, strict=True):
        places, position = [], used
        for real in row:
            places.append(position % segment_length if real else 0)
            position += real
        table.append(places)
    return table


@given(st.data())
def test_positions_count_real_tokens_of_each_row(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    segment_length = data.draw(st.integers(1, 5))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = data.draw(st.lists(row, min_size=rows, max_size=rows))
    opened = data.draw(st.lists(st.integers(0, segment_length - 1), min_size=rows, max_size=rows))
    positions = segment_positions(
        length,
        segment_length=segment_length,
        open_lengths=torch.tensor(opened),
        padding_mask=torch.tensor(mask),
    )
    assert positions.tolist() == counted(mask, opened, segment_length)


@given(st.integers(1, 20), st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_rows_without_padding_count_on_from_their_open_segments(
    length: int, segment_length: int, opened: list[int]
) -> None:
    opened = [used % segment_length for used in opened]
    positions = segment_positions(length, segment_length=segment_length, open_lengths=torch.tensor(opened))
    expected = torch.tensor(counted([[True] * length] * len(opened), opened, segment_length))
    assert torch.equal(positions.expand_as(expected), expected)


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), min_size=1, max_size=4), st.integers(1, 5))
def test_packed_documents_count_for_themselves(documents: list[tuple[int, int]], segment_length: int) -> None:
    """Also on from segments that they have open."""
    lengths = [length for length, _ in documents]
    opened = [used % segment_length for _, used in documents]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    settings = {"segment_length": segment_length, "cu_seqlens": ends}
    rows = counted([[True] * length for length in lengths], opened, segment_length)
    positions = segment_positions(sum(lengths), open_lengths=torch.tensor(opened), **settings)
    assert positions.tolist() == [list(chain(*rows))]
    if not any(opened):
        assert torch.equal(segment_positions(sum(lengths), **settings), positions)
