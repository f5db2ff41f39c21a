"""Tokenizers: bytes, which need no training, those trained here, and those that belong to models."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infini_attention.models import load_tokenizer

BYTES = "bytes"
OFTEN = 1 << 17  # so many times words are seen that are to be tokens by themselves


def open_tokenizer(name_or_path: str) -> Any:
    """Return `byte_tokenizer()` for "bytes", else the tokenizer that `models.load_tokenizer` loads."""
    return byte_tokenizer() if name_or_path == BYTES else load_tokenizer(name_or_path)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 256 tokens: a text's ids are its UTF-8 bytes.

    Any text comes back as it was. There are no special tokens; a model that needs one, to end documents say,
    gives it an id from 256 up.
    """
    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _whole(tokenizer)


def train_tokenizer(
    pieces: Iterable[str], *, vocab_size: int = 2048, words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on texts, in which every digit is a token by itself.

    Any text comes back as it was. There are no special tokens, and nothing but the arguments decides the
    merges.

    Args:
        pieces: of texts.
        vocab_size: tokens, of which 256 are the bytes.
        words: that are tokens by themselves after a space, however rare they are.

    Raises:
        ValueError: a vocabulary with no room for the 256 bytes or the words, or texts that hold too little to
            fill it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise ValueError(f"vocab_size is {vocab_size}; give at least {len(alphabet)}, one for every byte")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(chain(pieces, (f" {word}" * OFTEN for word in words)), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the texts give {tokenizer.get_vocab_size()} tokens and vocab_size is {vocab_size}; "
            "give more text, or a smaller vocabulary"
        )
    if split := [word for word in words if len(tokenizer.encode(f" {word}").ids) > 1]:
        raise ValueError(
            f"vocab_size is {vocab_size}, in which {', '.join(split)} found no room to be whole; give more"
        )
    return _whole(tokenizer)


def _whole(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _characters() -> list[str]:
    """The character that stands for each byte in a byte-level tokenizer.

    A byte that is printable in Latin-1 stands for itself; the others take characters from 256 up, in order.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    themselves = {ord(character): character for character in alphabet if ord(character) < 256}
    others = (character for character in alphabet if ord(character) >= 256)
    return [themselves.get(byte) or next(others) for byte in range(256)]
