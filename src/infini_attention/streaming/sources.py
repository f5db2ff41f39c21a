"""Whatever a session can be fed with, as token ids."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infini_attention.data.texts import Text, decoded_pieces, token_blocks

Source = str | PathLike[str] | Tensor | Iterable[str] | Iterable[int]
"""Text, the path of a UTF-8 file, token ids, an open text or binary file, or pieces of text."""


def token_ids(source: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[Tensor]:
    """The ids of a source, int64 on the CPU, at most about `size` at a time; without special tokens.

    Raises ValueError for what is no `Source`, a file that is not there, and text that is not UTF-8.
    """
    if isinstance(source, Tensor):
        if source.is_floating_point():
            raise ValueError(f"cannot feed a tensor of {source.dtype}; give token ids")
        yield from source.flatten().to("cpu", torch.int64).split(size)
        return
    first, items = _peek(_items(source))
    if isinstance(first, str):
        yield from (block.ids for block in token_blocks(items, tokenizer))
    elif isinstance(first, int):
        while batch := list(islice(items, size)):
            yield torch.tensor(batch, dtype=torch.int64)
    elif first is not None:
        raise ValueError(f"cannot feed {type(first).__name__}; give text, token ids, a Path or a file")


def _items(source: Any) -> Iterable[Any]:
    """Pieces of text, or ids."""
    if isinstance(source, str):
        return [source]
    if isinstance(source, PathLike):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give the path of a text file, or text as str")
        return Text(path.name, path).pieces()
    if hasattr(source, "read"):
        first, pieces = _peek(iter(lambda: source.read(1 << 16), source.read(0)))
        name = str(getattr(source, "name", "the file"))
        return decoded_pieces(pieces, name=name) if isinstance(first, bytes) else pieces
    if not isinstance(source, Iterable):
        raise ValueError(f"cannot feed {type(source).__name__}; give text, token ids, a Path or a file")
    return source


def _peek(items: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first item, None if there is none, and all of them."""
    iterator = iter(items)
    first = list(islice(iterator, 1))
    return (first[0] if first else None), chain(first, iterator)
