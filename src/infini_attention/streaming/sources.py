"""Whatever a session can be fed with, as token ids."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from operator import index
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
        yield from _checked_tensor(source).to("cpu", torch.int64).split(size)
        return
    broken: list[BaseException] = []  # what is read before a source breaks is fed before anyone hears of it
    first, items = _peek(_until_broken(_items(source), broken))
    if isinstance(first, str):
        yield from (block.ids for block in token_blocks(map(_checked_text, items), tokenizer))
    else:
        while batch := list(islice(items, size)):
            yield torch.tensor([_checked_id(item) for item in batch], dtype=torch.int64)
    if broken:
        raise broken[0]


def _until_broken(items: Iterable[Any], broken: list[BaseException]) -> Iterator[Any]:
    try:
        yield from items
    except GeneratorExit:
        raise
    except BaseException as error:
        broken.append(error)


def _checked_tensor(ids: Tensor) -> Tensor:
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"cannot feed a tensor of {ids.dtype}; give token ids")
    if ids.dim() > 2 or (ids.dim() == 2 and len(ids) != 1):
        raise ValueError(f"cannot feed a tensor of {tuple(ids.shape)}; a session is one text: give (tokens,)")
    return ids.flatten()


def _checked_id(item: Any) -> int:
    if isinstance(item, (bool, str)) or not hasattr(item, "__index__") or not 0 <= index(item) < 2**31:
        raise ValueError(f"cannot feed {item!r} as a token id; give whole numbers of the vocabulary")
    return index(item)


def _checked_text(item: Any) -> str:
    if not isinstance(item, str):
        raise ValueError(f"cannot feed {item!r} among pieces of text; give text, or token ids only")
    return item


def _items(source: Any) -> Iterable[Any]:
    """Pieces of text, or ids."""
    if isinstance(source, str):
        return [source]
    if isinstance(source, PathLike):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give the path of a text file, or text as str")
        return Text(path.name, (path,)).pieces()
    if hasattr(source, "read"):
        first, pieces = _peek(iter(lambda: source.read(1 << 16), source.read(0)))
        name = str(getattr(source, "name", "the file"))
        return decoded_pieces(pieces, name=name) if isinstance(first, bytes) else pieces
    if not isinstance(source, Iterable) or isinstance(source, (Mapping, bytes, bytearray)):
        raise ValueError(f"cannot feed {type(source).__name__}; give text, token ids, a Path or a file")
    return source


def _peek(items: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first item, None if there is none, and all of them."""
    iterator = iter(items)
    first = list(islice(iterator, 1))
    return (first[0] if first else None), chain(first, iterator)
