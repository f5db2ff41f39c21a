"""Sentences of texts, needles among them, and how many fill a length."""

from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infini_attention.data.haystack import (
    count_tokens,
    first_sentences,
    hidden,
    most_units,
    rotated,
    sentences,
)

TEXT = 'One two.  Three\nfour! "Five?" Six (seven.) eight'


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_sentences_do_not_depend_on_the_pieces_of_a_text(size: int) -> None:
    pieces = [TEXT[start : start + size] for start in range(0, len(TEXT), size)]
    assert [*sentences(pieces)] == ["One two.", "Three four!", '"Five?"', "Six (seven.)", "eight"]


def test_what_never_ends_is_cut_after_a_hundred_words() -> None:
    assert [len(each.split()) for each in sentences(["word " * 250])] == [100, 100, 50]


def test_no_more_of_a_text_is_read_than_its_first_sentences_need() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "A short one. "

    assert first_sentences(endless(), words=7) == ["A short one."] * 3
    assert first_sentences(endless(), words=0) == []


def test_units_are_read_from_a_place_on_and_then_from_the_first() -> None:
    assert [*rotated("abcd", 0.5, 7)] == [*"cdabcda"]
    assert [*rotated("", 0.5, 0)] == []
    with pytest.raises(ValueError, match="give one that is not empty"):
        rotated("", 0.5, 1)


@pytest.mark.parametrize("count", [0, 1, 10])
def test_needles_stand_at_their_shares_in_the_order_given(count: int) -> None:
    background = [f"b{place}" for place in range(count)]
    needles = [(0.99, "late"), (0.0, "first"), (0.0, "second"), (0.5, "middle")]
    found = "".join(hidden(needles, background, count, joint="\n")).split("\n")
    assert [each for each in found if each not in background] == ["first", "second", "middle", "late"]
    assert [each for each in found if each in background] == background
    assert found[:2] == ["first", "second"]
    if count == 10:
        assert found.index("middle") == 7 and found[-1] == "late"


@pytest.mark.parametrize("tokens", [4, 5, 13, 1000, 123_456])
def test_a_length_is_filled_and_not_passed(tokens: int, tokenizer: PreTrainedTokenizerFast) -> None:
    def pieces(units: int) -> Iterator[str]:
        yield "What came before?"
        yield from (" one two three" if place % 3 else " one" for place in range(units))

    units = most_units(pieces, tokens, tokenizer)
    assert count_tokens(pieces(units), tokenizer) <= tokens
    assert count_tokens(pieces(units + 3), tokenizer) > 0.998 * tokens


def test_a_length_without_room_says_what_is_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"1 tokens has no room: .* takes 2; give a longer length"):
        most_units(lambda units: ["two words"], 1, tokenizer)


def test_tokens_are_counted_in_blocks_as_in_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert count_tokens((" some words" for _ in range(20_000)), tokenizer) == 40_000
