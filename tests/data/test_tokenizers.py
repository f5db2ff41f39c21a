from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from infini_attention.cli import main
from infini_attention.data import tokenizers
from infini_attention.data.passkey import WORDS
from infini_attention.data.texts import TokenBlock, token_blocks
from infini_attention.data.tokenizers import byte_tokenizer, open_tokenizer, train_tokenizer

TOKENIZER = byte_tokenizer()
SAMPLE = "naïve – 日本語 🙂🙂\r\n\tdon't  \x00 "


@given(st.text())
def test_ids_are_the_utf_8_bytes_and_come_back_as_the_text(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_there_are_256_tokens_and_none_of_them_is_special() -> None:
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(256))
    assert TOKENIZER.all_special_ids == []


@given(text=st.text(st.sampled_from("ab \n日🙂é")), block=st.integers(1, 30))
def test_a_stream_has_the_same_bytes(text: str, block: int) -> None:
    blocks = list(token_blocks([text], TOKENIZER, block_characters=block, context_characters=8))
    tokens = TokenBlock.cat(blocks).ids.tolist() if blocks else []
    assert bytes(tokens) == text.encode()
    assert sum(int(part.bytes.sum()) for part in blocks) == len(text.encode())


def test_it_is_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(SAMPLE).input_ids == list(SAMPLE.encode())
    assert loaded.decode(list(SAMPLE.encode())) == SAMPLE


def test_bytes_is_the_name_of_the_byte_tokenizer_and_other_names_are_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda name: f"that of {name}")
    assert len(open_tokenizer("bytes")) == 256
    assert open_tokenizer("smollm2") == "that of smollm2"


TRAINED = train_tokenizer(["the cat sat on the mat in 1234 and 1299 "] * 5, vocab_size=270)


@given(st.text())
def test_a_trained_tokenizer_gives_any_text_back(text: str) -> None:
    assert TRAINED.decode(TRAINED(text).input_ids) == text


def test_training_makes_words_tokens_and_leaves_digits_apart() -> None:
    assert len(TRAINED) == 270
    assert TRAINED.tokenize(" the 1299") == ["Ġthe", "Ġ", "1", "2", "9", "9"]


def test_words_are_whole_however_rare_they_are() -> None:
    words = ["umbrella", "mat"]
    trained = train_tokenizer(["the cat sat on the mat in 1234 and 1299 "] * 5, vocab_size=280, words=words)
    assert all(len(trained(f" {word}").input_ids) == 1 for word in words)
    text = "An umbrella, two umbrellas and 3 mats; umbrella"
    assert trained.decode(trained(text).input_ids) == text
    with pytest.raises(ValueError, match="in which umbrella found no room to be whole; give more"):
        train_tokenizer(["the cat sat on the mat "] * 5, vocab_size=260, words=["umbrella"])


def test_a_vocabulary_without_room_or_text_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 100; give at least 256"):
        train_tokenizer(["text"], vocab_size=100)
    with pytest.raises(ValueError, match=r"the texts give 2\d\d tokens and vocab_size is 2000"):
        train_tokenizer(["a little text"], vocab_size=2000)


def test_the_command_keeps_the_words_of_pass_keys_whole(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It was a dark and stormy night, and nobody was about. " * 40)
    command = ["tokenizer", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out")]
    main([*command, "--vocab_size", "430", "--passkeys", "true"])
    trained = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(trained) == 430
    assert all(len(trained(f" {word}").input_ids) == 1 for word in WORDS)
