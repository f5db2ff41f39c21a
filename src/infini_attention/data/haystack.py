"""Sentences hidden among those of a text, as many as fill a prompt of so many tokens."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

LONGEST = 100  # words, after which a sentence is cut
BLOCK = 1 << 16  # characters that are tokenised at once
FIRST_TRIED = 256  # units
UNUSED = 1 / 500  # of a prompt's length, at most, where units are shorter than that

Unit = TypeVar("Unit")


def sentences(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the sentences of a text that arrives in pieces, with single spaces between their words.

    A sentence ends after a word that ends in `.`, `!` or `?`, quotes and brackets after it or not, and after
    100 words at the latest.
    """
    sentence: list[str] = []
    for word in _words(pieces):
        sentence.append(word)
        if word.rstrip("\"')]”’_*").endswith((".", "!", "?")) or len(sentence) == LONGEST:
            yield " ".join(sentence)
            sentence = []
    if sentence:
        yield " ".join(sentence)


def first_sentences(pieces: Iterable[str], *, words: int) -> list[str]:
    """A text's first sentences, with so many words or a few more."""
    found: list[str] = []
    following = sentences(pieces)
    while words > 0 and (sentence := next(following, None)) is not None:
        found.append(sentence)
        words -= sentence.count(" ") + 1
    return found


def rotated(units: Sequence[Unit], start: float, count: int) -> Iterator[Unit]:
    """Yield `count` of the units from a place on, a share from 0 to 1; from the first again after the last.

    Raises ValueError where there are none to yield.
    """
    if count and not units:
        raise ValueError("there is no text to hide anything in; give one that is not empty")
    first = int(start * len(units))
    return (units[place % len(units)] for place in range(first, first + count))


def hidden(
    needles: Sequence[tuple[float, str]], background: Iterable[str], count: int, *, joint: str = " "
) -> Iterator[str]:
    """Yield `count` units of background and the needles among them, `joint` before all but the first.

    Each needle has the share of the background, from 0 to 1, that stands before it; those with the same
    stand in the order in which they are given.
    """
    for number, piece in enumerate(_woven(needles, background, count)):
        yield (joint if number else "") + piece


def most_units(pieces: Callable[[int], Iterable[str]], tokens: int, tokenizer: Any) -> int:
    """How many units fill a prompt of at most `tokens` tokens, but for 0.2 % or a unit of average length.

    `pieces` gives the prompt with so many units, in pieces, each but the first beginning with whitespace.
    What units take is about the same throughout, so few prompts are counted: the time is linear in the
    length. Raises ValueError where not even a prompt without any unit has room.
    """
    alone = count_tokens(pieces(0), tokenizer)
    if alone > tokens:
        raise ValueError(
            f"a prompt of {tokens:,} tokens has no room: what it hides and asks takes {alone:,}; give a "
            "longer length"
        )
    fitting, units, too_many = 0, FIRST_TRIED, sys.maxsize
    while fitting < units < too_many:
        taken = count_tokens(pieces(units), tokenizer)
        fitting, too_many = (units, too_many) if taken <= tokens else (fitting, units)
        estimated = units + (tokens - taken) * units // (taken - alone)
        if taken <= tokens and (estimated == units or taken >= (1 - UNUSED) * tokens):
            break
        units = estimated if fitting < estimated < too_many else (fitting + too_many) // 2
    return fitting


def count_tokens(pieces: Iterable[str], tokenizer: Any) -> int:
    """The number of a text's tokens, special ones left out; the text is never held whole."""
    counts = (
        len(tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"])
        for block in _blocks(pieces)
    )
    return sum(counts)


def _woven(needles: Sequence[tuple[float, str]], background: Iterable[str], count: int) -> Iterator[str]:
    units, read = iter(background), 0
    for share, needle in sorted(needles, key=itemgetter(0)):
        place = min(int(share * (count + 1)), count)
        yield from islice(units, place - read)
        yield needle
        read = place
    yield from islice(units, count - read)


def _words(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        text = rest + piece
        words = text.split()
        rest = words.pop() if words and not text[-1].isspace() else ""
        yield from words
    if rest:
        yield rest


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for piece in pieces:
        if size >= BLOCK:
            yield "".join(block)
            block, size = [], 0
        block.append(piece)
        size += len(piece)
    yield "".join(block)
