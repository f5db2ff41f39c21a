"""Long documents, queries about them and people's summaries: read, put into words, trained on.

A prompt is the document, a query, and the summary on a line of its own. Each of the three is tokenised by
itself, so that a document can be read once and asked many times. The words are plain, or (`chat`) those of
`infini ask`: the query is a turn of the tokenizer's chat template after the document, the summary the answer.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from infini_attention.data.documents import CORPORA, Documents, Row, open_rows, text_column, text_in, value_in
from infini_attention.data.prompts import question_turn
from infini_attention.data.shards import TokenStore
from infini_attention.models.loss import IGNORED

logger = logging.get_logger(__name__)

QUESTION = "\n\nQuery: {query}\nSummary:\n"  # the summary begins its line, as tokenizers of all kinds expect
GENERAL = "Summarize the whole text."
END = "<|end|>"


@dataclass(frozen=True)
class Asked:
    """A document, the queries about it, and the summary that answers each of them."""

    name: str
    text: str
    queries: Sequence[str]
    summaries: Sequence[str]


def open_summaries(
    documents: Documents,
    *,
    query_column: str | None = None,
    summary_column: str | None = None,
    query: str = GENERAL,
) -> Iterator[Asked]:
    """Return an iterator over the documents that have text, with what was asked about them.

    A row has either a list of summaries and a list of as many queries, as QMSum's meetings have, or one
    summary, as BookSum's chapters have. What has no words is left out.

    Args:
        documents: which ones.
        query_column: of the queries; by default `queries` beside a list of summaries. Beside a single
            summary it holds a single query, and by default there is none: `query` is asked.
        summary_column: of the summaries; by default a corpus' own, else `summaries`.
        query: asked where a row has one summary and no query.

    Raises:
        ValueError: (some of it while reading) a column is missing or holds something else, queries and
            summaries differ in number, or what `open_rows` raises.
    """
    corpus = CORPORA.get(documents.source)
    column = summary_column or (corpus and corpus.summary_column) or "summaries"
    return _read(documents, query_column, column, query)


def question_text(tokenizer: PreTrainedTokenizerBase, query: str, *, chat: bool) -> str:
    """What stands between a document and a summary; with `chat` in the form of a conversation's turn."""
    if chat:
        return question_turn(tokenizer, query.strip(), first=False)
    return QUESTION.format(query=query.strip())


def question_ids(tokenizer: PreTrainedTokenizerBase, query: str, *, chat: bool = False) -> list[int]:
    """The tokens of it."""
    return text_ids(tokenizer, question_text(tokenizer, query, chat=chat))


def with_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, which is given an end-of-text token if it has none."""
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": END})
    return tokenizer


class SummariesTask(Dataset[dict[str, Tensor]]):
    """Summaries to learn, each after its document and its query.

    A row is of whole segments. Items are `input_ids` and `shift_labels`, each (length,) int64;
    shift_labels[t] is the token expected after position t (there is no further shift) where that is one of
    the summary or the end-of-text token behind it, else -100. Rows are filled up on the right, which nothing
    before can see, items of a batch up to the longest of them.

    A document that leaves the query and its summary no room within `max_tokens` is cut: its beginning and its
    end are kept, as much of each. How many are is said in a warning and in `cut`.

    Args:
        tokenizer: one with an end-of-text token; see `with_end`.
        store: tokens of the documents with text, in their order (`shards.tokenized`).
        asked: the same documents (`open_summaries`).
        segment_length: of the model.
        max_tokens: the longest a row may be, a multiple of the segment length.
        chat: put queries as `infini ask` does.

    Raises:
        ValueError: no end-of-text token, a length that is no multiple, a query and a summary without room for
            a document, nothing to learn, or other documents in the store.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        store: TokenStore,
        asked: Iterable[Asked],
        *,
        segment_length: int,
        max_tokens: int,
        chat: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token; set tokenizer.eos_token")
        if max_tokens < 1 or max_tokens % segment_length:
            raise ValueError(
                f"max_tokens is {max_tokens}, and rows are of whole segments of {segment_length}; "
                "give a multiple"
            )
        self.store, self.segment_length, self.max_tokens = store, segment_length, max_tokens
        self._examples, documents = [], 0
        for each in asked:
            for query, summary in zip(each.queries, each.summaries, strict=True):
                question = question_ids(tokenizer, query, chat=chat)
                answer = [*text_ids(tokenizer, summary.strip()), tokenizer.eos_token_id]
                self._examples.append((documents, question, answer))
            documents += 1
        if documents != len(store):
            raise ValueError(f"the store has {len(store)} documents, and {documents} were asked about")
        if not self._examples:
            raise ValueError("the documents have no summaries; check the source and the columns")
        self._check_room()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The example number `index`, as a batch of its own."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The examples of a batch, all of the length of the longest."""
        rows = [self._row(*self._examples[range(len(self))[index]]) for index in indices]
        segments = max(-(-len(ids) // self.segment_length) for ids, _ in rows)
        return [_filled(ids, labels, segments * self.segment_length) for ids, labels in rows]

    def _row(self, document: int, question: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
        """What is read, and what is expected after each of it."""
        text = _ends(self.store.document(document), self._room(question, answer))
        ids = torch.cat([text, torch.tensor(question + answer)])
        labels = ids.clone()
        labels[: len(text) + len(question)] = IGNORED
        return ids[:-1], labels[1:]

    def _room(self, question: list[int], answer: list[int]) -> int:
        """Tokens of a document that fit beside them; the last token of an answer is not read."""
        return self.max_tokens - len(question) - len(answer) + 1

    def _check_room(self) -> None:
        rooms = [(document, self._room(question, answer)) for document, question, answer in self._examples]
        if (least := min(room for _, room in rooms)) < 1:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, and a query with its summary takes "
                f"{self.max_tokens - least}; give more"
            )
        self.cut = sum(int(self.store.lengths[document]) > room for document, room in rooms)
        if self.cut:
            logger.warning(
                "max_tokens is %d: in %d of %d examples the middle of the document is left out",
                self.max_tokens,
                self.cut,
                len(rooms),
            )


def _read(documents: Documents, query_column: str | None, column: str, query: str) -> Iterator[Asked]:
    for name, row in open_rows(documents):
        text = text_in(row, text_column(documents), name)
        if not text:
            continue
        if isinstance(value_in(row, column, name), list):
            queries = _texts(row, query_column or "queries", name)
            summaries = _texts(row, column, name)
        else:
            queries = [query if query_column is None else text_in(row, query_column, name)]
            summaries = [text_in(row, column, name)]
        if len(queries) != len(summaries):
            raise ValueError(
                f"{name} has {len(queries)} queries and {len(summaries)} summaries; give one summary a query"
            )
        told = [pair for pair in zip(queries, summaries, strict=True) if all(map(str.strip, pair))]
        yield Asked(name, text, [asked for asked, _ in told], [summary for _, summary in told])


def _texts(row: Row, column: str, name: str) -> list[str]:
    values = value_in(row, column, name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"column {column!r} in {name} is no list of texts; name another")
    return values


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, no special ones added; nothing is said of long ones."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _ends(ids: Tensor, most: int) -> Tensor:
    """The first and the last of so many ids at most, as many of each."""
    if len(ids) <= most:
        return ids
    return torch.cat([ids[: most - most // 2], ids[len(ids) - most // 2 :]])


def _filled(ids: Tensor, labels: Tensor, length: int) -> dict[str, Tensor]:
    filling = (0, length - len(ids))
    return {"input_ids": F.pad(ids, filling), "shift_labels": F.pad(labels, filling, value=IGNORED)}
