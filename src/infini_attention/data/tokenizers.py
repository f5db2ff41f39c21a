"""Tokenizers: bytes, which need no file and no training, and those that belong to models."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infini_attention.models import load_tokenizer

BYTES = "bytes"


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
