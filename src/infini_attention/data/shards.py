"""Documents, tokenised once into Arrow files that are read through the memory map."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infini_attention.data.documents import Documents, identity, open_documents, pinned
from infini_attention.data.texts import BLOCK_CHARACTERS, CONTEXT_CHARACTERS, require_fast, token_blocks

FORMAT = 1
BATCH_TOKENS = 1 << 20
TOKENS, INFO = "tokens.arrow", "info.json"


def tokenized(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    end_of_document: int | None = None,
) -> "TokenStore":
    """Return the documents' tokens, from `folder` if they are there, else tokenised into it.

    The store is named by a fingerprint of what decides the tokens: the documents (`documents.identity`), the
    tokenizer and `end_of_document`. It is there as a whole or not at all, whoever else builds it at the same
    time; what a killed process leaves is called `.unfinished-`. However large the corpus, building holds a
    few rows of text and some `BATCH_TOKENS` tokens, or one document's, at 2 or 4 bytes each.

    A source that is the folder of a store itself is taken as it is, so that one machine can tokenise and
    another train.

    Args:
        documents: which ones; those without text are skipped and counted in `TokenStore.info`.
        tokenizer: a fast one; no special tokens are added.
        folder: where stores are kept, each in a folder of its own.
        end_of_document: an id that ends every document; None for nothing.

    Raises:
        ValueError: there is no text at all, the tokenizer is slow, the source is a store of another tokenizer
            or ending, or what `open_documents` raises.
    """
    if end_of_document is not None and end_of_document < 0:
        raise ValueError(f"end_of_document is {end_of_document}; give an id of the model's vocabulary")
    require_fast(tokenizer)
    if (Path(documents.source) / INFO).is_file():
        return _ready_made(documents, tokenizer, end_of_document)
    documents = pinned(documents)
    ingredients = {
        "format": FORMAT,
        "documents": identity(documents),
        "tokenizer": _tokenizer_digest(tokenizer),
        "blocks": [BLOCK_CHARACTERS, CONTEXT_CHARACTERS],
        "end_of_document": end_of_document,
    }
    fingerprint = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    place = folder / fingerprint[:16]
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as scratch:
            unfinished = Path(scratch) / place.name
            unfinished.mkdir()
            counts = _build(unfinished / TOKENS, documents, tokenizer, end_of_document)
            info = {"fingerprint": fingerprint, **counts, "made_from": ingredients}
            (unfinished / INFO).write_text(json.dumps(info, indent=2) + "\n")
            try:
                unfinished.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was faster, with the same tokens
                    raise
    return TokenStore(place)


class TokenStore:
    """The tokens of many documents, on disk; reading costs memory for what is read alone.

    Attributes:
        folder: where it lies.
        info: what it was made from, and how many `documents`, `tokens` and `empty_documents` (skipped) there
            were.
        lengths: tokens of each document, (documents,) int64.
    """

    def __init__(self, folder: Path) -> None:
        _require_pyarrow()
        import pyarrow

        self.folder = folder
        self.info: dict[str, Any] = json.loads((folder / INFO).read_text())
        with pyarrow.memory_map(str(folder / TOKENS)) as file:
            batches = [batch.column(0) for batch in pyarrow.ipc.open_stream(file)]
        # Views of the memory map, a pair for each batch of documents.
        self._values = [batch.values.to_numpy() for batch in batches]
        self._offsets = [batch.offsets.to_numpy() for batch in batches]
        self._firsts = np.cumsum([0, *map(len, batches)])  # number of each batch's first document
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, number: int, start: int = 0, stop: int | None = None) -> Tensor:
        """The tokens of document `number` from `start` up to `stop`, or to its end; (tokens,) int64."""
        number = range(len(self))[number]
        batch = int(np.searchsorted(self._firsts, number, side="right")) - 1
        row = number - self._firsts[batch]
        begin, end = (int(offset) for offset in self._offsets[batch][row : row + 2])
        end = end if stop is None else min(begin + stop, end)
        return torch.from_numpy(self._values[batch][begin + start : end].astype(np.int64))

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.folder,)


def _ready_made(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, end_of_document: int | None
) -> TokenStore:
    """The store that is the source; ValueError where it is not what was asked for."""
    if documents != Documents(documents.source):
        raise ValueError(
            f"{documents.source} holds tokens, of which all are taken; leave all settings of documents out "
            "but source"
        )
    store = TokenStore(Path(documents.source))
    wanted = {"tokenizer": _tokenizer_digest(tokenizer), "end_of_document": end_of_document, "format": FORMAT}
    made_from = store.info["made_from"]
    if wrong := [name for name, value in wanted.items() if made_from[name] != value]:
        raise ValueError(
            f"{documents.source} holds tokens made with another {' and '.join(wrong)}; make them anew from "
            "the documents"
        )
    return store


def _build(
    path: Path, documents: Documents, tokenizer: PreTrainedTokenizerBase, end_of_document: int | None
) -> dict[str, int]:
    """Write a list of ids for each document, in batches of some `BATCH_TOKENS` tokens; return the counts."""
    _require_pyarrow()
    import pyarrow

    counts = {"documents": 0, "tokens": 0, "empty_documents": 0}
    largest = max(*tokenizer.get_vocab().values(), end_of_document or 0)
    dtype = np.dtype(np.uint16 if largest < 1 << 16 else np.int32)
    schema = pyarrow.schema({"input_ids": pyarrow.large_list(pyarrow.from_numpy_dtype(dtype))})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in _batches(_token_lists(documents, tokenizer, end_of_document, dtype, counts)):
            offsets = np.cumsum([0, *map(len, batch)])
            ids = pyarrow.LargeListArray.from_arrays(offsets, np.concatenate(batch))
            writer.write_batch(pyarrow.record_batch([ids], schema=schema))
    if not counts["documents"]:
        raise ValueError(
            f"{documents.source} holds no text ({counts['empty_documents']} empty documents); "
            "check the source, the split and the column"
        )
    return counts


def _token_lists(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    end_of_document: int | None,
    dtype: np.dtype,
    counts: dict[str, int],
) -> Iterator[np.ndarray]:
    """Yield the ids of each document that has any, and count."""
    ending = [] if end_of_document is None else [np.array([end_of_document], dtype)]
    for document in open_documents(documents):
        blocks = [block.ids.numpy().astype(dtype) for block in token_blocks(document.pieces, tokenizer)]
        if not blocks:
            counts["empty_documents"] += 1
            continue
        ids = np.concatenate([*blocks, *ending])
        counts["documents"] += 1
        counts["tokens"] += len(ids)
        yield ids


def _batches(documents: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Group documents until `BATCH_TOKENS` tokens are reached: few batches to look through, little held."""
    waiting: list[np.ndarray] = []
    held = 0
    for ids in documents:
        waiting.append(ids)
        held += len(ids)
        if held >= BATCH_TOKENS:
            yield waiting
            waiting, held = [], 0
    if waiting:
        yield waiting


def _tokenizer_digest(tokenizer: Any) -> str:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for changes_with_every_call in ("truncation", "padding"):
        description.pop(changes_with_every_call, None)
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _require_pyarrow() -> None:
    if find_spec("pyarrow") is None:
        raise ValueError(
            "stores of tokens need pyarrow; install it with: pip install 'infini-attention[train]'"
        )
