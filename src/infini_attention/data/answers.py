"""Passages of documents with questions and answers: what a model with memories is to learn from.

Some hide notes or facts and ask for them, so that answers are known. The others are answered by a
model that sees all of a passage, usually the base of the one that is to learn: context distillation
(arXiv 2209.15189). A memory learns so what attention would have seen, and the base's way of answering stays.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from infini_attention.data import facts
from infini_attention.data.documents import Documents, open_documents
from infini_attention.data.haystack import count_tokens, hidden, most_units, rotated, sentences
from infini_attention.data.prompts import question_turn
from infini_attention.data.summaries import Asked, text_ids

logger = logging.get_logger(__name__)

ABOUT = (
    "What is this text about? Answer in one sentence.",
    "Summarize the text in two sentences.",
    "Who are the people in this text?",
    "Where does this take place?",
    "What happens at the end of the text?",
    "What happens at the beginning of the text?",
    "What is the mood of the text?",
    "Name three things that the text mentions.",
    "What is the most important thing that the text says?",
    "Give the text a title.",
    "Is this text fiction or fact, and how can you tell?",
    "What question does the text leave open?",
)
"""Questions that any passage can be asked."""

GENERAL = (
    "What is the capital of France?",
    "How do I boil an egg?",
    "Write two sentences about the sea.",
    "What is the difference between a frog and a toad?",
    "Explain in one sentence why the sky is blue.",
    "Give me three tips for learning a language.",
    "What can I cook with rice and tomatoes?",
    "Write a short poem about autumn.",
    "What is photosynthesis?",
    "Who wrote Romeo and Juliet?",
    "How many days are there in a leap year?",
    "What should I pack for a week in the mountains?",
)
"""Questions that have nothing to do with a passage."""

CODES = (
    *("anchor", "barrel", "bridge", "castle", "compass", "curtain", "drawer", "engine", "feather", "forest"),
    *("hammock", "island", "kettle", "ladder", "mirror", "needle", "orchard", "parcel", "pocket", "ribbon"),
    *("saddle", "tunnel", "wagon", "window"),
)
NOTE, ASKED = "The code of the {what} is {number}.", "What is the code of the {what}?"
NOTES = 4  # in a passage, at most


@dataclass(frozen=True)
class Passages:
    """How passages are drawn, each by the seed and its number alone.

    Attributes:
        each: how many a document gives, but for those in which not even a sentence has room.
        least_tokens: of a passage; lengths are drawn evenly on a logarithmic scale.
        most_tokens: of one that a model answers about, which has to fit its window.
        told: share, from 0 to 1, of those that hide what they are asked for.
        told_tokens: the most of these, if what is hidden has room; None for `most_tokens`.
        questions: that a passage is asked, but for those that are told facts, which are asked one.
        seed: of all that is random.
    """

    each: int = 2
    least_tokens: int = 256
    most_tokens: int = 6_000
    told: float = 0.5
    told_tokens: int | None = None
    questions: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"each": 1, "least_tokens": 64, "questions": 1, "seed": 0}
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}")
        if not 0 <= self.told <= 1:
            raise ValueError(f"told is {self.told}; give a share from 0 to 1")
        for name, most in (("most_tokens", self.most_tokens), ("told_tokens", self._told_tokens)):
            if most < self.least_tokens:
                raise ValueError(f"{name} is {most}; give at least least_tokens, {self.least_tokens}")

    @property
    def _told_tokens(self) -> int:
        return self.most_tokens if self.told_tokens is None else self.told_tokens

    def longest(self, *, is_told: bool) -> int:
        """Tokens of the longest passage of a kind."""
        return self._told_tokens if is_told else self.most_tokens


@dataclass(frozen=True)
class Sampling:
    """How a model answers. What has no end within `max_new_tokens` is left out: it tends to go in circles."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 160
    batch_rows: int = 16

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and up to 1")
        for name in ("max_new_tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")


def answered(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    passages: Passages,
    sampling: Sampling,
) -> Iterator[Asked]:
    """Yield passages with questions and answers, those of a document together.

    Args:
        model: a causal language model of transformers that answers, on its device; its window is
            `max_position_embeddings`.
        tokenizer: the model's, with an end-of-text token, at which its answers end.
        documents: which ones; those without a word are left out.
        passages: how they are drawn.
        sampling: how the model answers.

    Raises:
        ValueError: (before anything is read) no end-of-text token, or passages that do not fit the window.
    """
    window = int(model.config.max_position_embeddings)
    taken = passages.most_tokens + sampling.max_new_tokens + _longest_turn(tokenizer)
    if passages.told < 1 and taken > window:
        raise ValueError(
            f"most_tokens is {passages.most_tokens}: with question and answer that is {taken} tokens, and "
            f"the model sees {window}; give at most {passages.most_tokens - taken + window}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token; set tokenizer.eos_token")
    return _answered(_Answerer(model, tokenizer, sampling), tokenizer, documents, passages)


def _answered(
    answerer: "_Answerer", tokenizer: PreTrainedTokenizerBase, documents: Documents, passages: Passages
) -> Iterator[Asked]:
    for number, document in enumerate(open_documents(documents)):
        units = list(sentences(document.pieces))
        if not units:
            continue
        drawn = [
            _drawn(units, tokenizer, passages, number, place, document.name) for place in range(passages.each)
        ]
        yield from answerer.complete([each for each in drawn if each.text], seed=passages.seed + number)
    if answerer.lost:
        logger.warning("%d answers had no words or no end, and are left out", answerer.lost)


def _drawn(
    units: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    passages: Passages,
    document: int,
    place: int,
    name: str,
) -> Asked:
    """A passage of a document's sentences with its questions; summaries only where answers are known.

    The text is empty where not even a sentence has room.
    """
    random = np.random.default_rng((passages.seed, document, place))
    is_told = bool(random.random() < passages.told)
    needles, asked = _needles(random, passages.questions) if is_told else ([], [])
    least, most = passages.least_tokens, passages.longest(is_told=is_told)
    length, start = int(least * (most / least) ** random.random()), float(random.random())

    def pieces(count: int) -> Iterable[str]:  # from anywhere that leaves so many
        first = int(start * (max(0, len(units) - count) + 1))
        return hidden(needles, rotated(units, first / len(units), count), count)

    length = max(length, count_tokens(pieces(0), tokenizer))  # what is hidden has to be there
    count = min(len(units), most_units(pieces, length, tokenizer))
    text = "".join(pieces(count))
    if is_told:
        return Asked(name, text, [question for question, _ in asked], [answer for _, answer in asked])
    return Asked(name, text, _questions(random, passages.questions), [])


def _needles(random: np.random.Generator, most: int) -> tuple[list[tuple[float, str]], list[tuple[str, str]]]:
    """What is hidden, each with its place from 0 to 1, and questions about it with their answers."""
    if random.random() < 0.5:
        kind = [*facts.KINDS][int(random.integers(len(facts.KINDS)))]
        example = facts.example(kind, seed=int(random.integers(2**31)))
        places = sorted(random.random(len(example.facts)).tolist())
        return [*zip(places, example.facts, strict=True)], [(example.question, example.answer)]
    things = [CODES[which] for which in random.permutation(len(CODES))[: 1 + int(random.integers(NOTES))]]
    numbers = [str(random.integers(1_000, 100_000)) for _ in things]
    notes = [NOTE.format(what=what, number=number) for what, number in zip(things, numbers, strict=True)]
    asked = [(ASKED.format(what=what), number) for what, number in zip(things, numbers, strict=True)]
    return [*zip(random.random(len(notes)).tolist(), notes, strict=True)], asked[:most]


def _questions(random: np.random.Generator, count: int) -> list[str]:
    """Some that any passage can be asked; one in four has nothing to do with it."""
    about = iter(ABOUT[which] for which in random.permutation(len(ABOUT)))
    general = iter(GENERAL[which] for which in random.permutation(len(GENERAL)))
    chosen = (next(general if random.random() < 0.25 else about, None) for _ in range(count))
    return [question for question in chosen if question is not None]


def _longest_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(
        len(text_ids(tokenizer, question_turn(tokenizer, each, first=True))) for each in (*ABOUT, *GENERAL)
    )


def written(passages: Iterable[Asked], output: Path) -> Iterator[Asked]:
    """Yield what is there already on disk: a line of JSON each in `output`, as `open_summaries` reads it.

    Raises ValueError, before the first, where the file exists or cannot be made.
    """
    with _opened(output) as file:
        for each in passages:
            row = {"text": each.text, "queries": list(each.queries), "summaries": list(each.summaries)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            yield each


def _opened(output: Path) -> TextIO:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.open("x", encoding="utf-8")
    except OSError as error:
        if output.exists():
            raise ValueError(f"{output} is there already; name a new file") from None
        raise ValueError(f"{output} cannot be written: {error.strerror}; name another place") from error


class _Answerer:
    """A model that answers questions about passages which it sees whole."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        ends = model.generation_config.eos_token_id  # a chat model's turn may end with another token
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.lost = 0  # answers that cannot be used

    def complete(self, drawn: Sequence[Asked], *, seed: int) -> Iterator[Asked]:
        """The same, with the model's answers where none are known; those left without any do not come."""
        waiting = [
            (passage, query) for passage in drawn if not passage.summaries for query in passage.queries
        ]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            said = iter(self._answers(waiting))
        for passage in drawn:
            if passage.summaries:
                yield passage
                continue
            both = [(query, answer) for query in passage.queries if (answer := next(said)) is not None]
            self.lost += len(passage.queries) - len(both)
            if both:
                queries, answers = zip(*both, strict=True)
                yield Asked(passage.name, passage.text, list(queries), list(answers))

    def _answers(self, waiting: Sequence[tuple[Asked, str]]) -> list[str | None]:
        """To each question, in order; None where an answer did not end."""
        prompts, rows = [self._prompt(*each) for each in waiting], self._sampling.batch_rows
        batches = (prompts[first : first + rows] for first in range(0, len(prompts), rows))
        return [answer for batch in batches for answer in self._batch(batch)]

    def _prompt(self, passage: Asked, query: str) -> list[int]:
        """The question as a turn of its own, and before it the passage where it is about that."""
        if query in GENERAL:
            return text_ids(self._tokenizer, question_turn(self._tokenizer, query, first=True))
        turn = question_turn(self._tokenizer, f"{passage.text}\n\n{query}", first=True)
        return text_ids(self._tokenizer, turn)

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[list[int]]) -> list[str | None]:
        """What the model says after each prompt; prompts are filled up on the left."""
        longest, filling = max(map(len, prompts)), self._tokenizer.eos_token_id
        rows = [F.pad(torch.tensor(each), (longest - len(each), 0), value=filling) for each in prompts]
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        made = self._model.generate(
            torch.stack(rows).to(self._model.device),
            attention_mask=mask.to(self._model.device),
            do_sample=True,
            temperature=self._sampling.temperature,
            top_k=0,
            top_p=self._sampling.top_p,
            max_new_tokens=self._sampling.max_new_tokens,
            eos_token_id=sorted(self._ends),
            pad_token_id=filling,
        )
        return [self._said(row[longest:].tolist()) for row in made]

    def _said(self, ids: list[int]) -> str | None:
        last = next((place for place, token in enumerate(ids) if token in self._ends), None)
        if last is None:
            return None
        text = self._tokenizer.decode(ids[:last], skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip() or None
