import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infini_attention.data.documents import Documents
from infini_attention.data.shards import tokenized
from infini_attention.data.summaries import GENERAL, Asked, SummariesTask, open_summaries, with_end
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.models import retrofit
from infini_attention.models.loss import predicted

SEGMENT = 16
MEETINGS: dict[str, list[Any]] = {
    "id": ["a", "b", "c"],
    "text": ["Ann: We ship in May. " * 3, "", "Bob: Too late. " * 20],
    "queries": [["Summarize the meeting", "When?"], ["What?"], ["Who spoke?"]],
    "summaries": [["They ship in May.", "In May."], ["Nothing."], ["Bob."]],
}


def meetings(folder: Path, **changes: list[Any]) -> Documents:
    path = folder / "meetings.parquet"
    pyarrow.parquet.write_table(pyarrow.table(MEETINGS | changes), path)
    return Documents(str(path))


def ended() -> PreTrainedTokenizerFast:
    return with_end(byte_tokenizer())


def task(folder: Path, *, max_tokens: int = 512) -> SummariesTask:
    documents = meetings(folder)
    store = tokenized(documents, ended(), folder / "tokens")
    asked = open_summaries(documents)
    return SummariesTask(ended(), store, asked, segment_length=SEGMENT, max_tokens=max_tokens)


def text_of(ids: Tensor) -> str:
    return str(ended().decode(ids, skip_special_tokens=False))


def test_a_meeting_a_row_has_lists_of_queries_and_summaries(tmp_path: Path) -> None:
    first, last = open_summaries(meetings(tmp_path))  # the one between has no text
    assert first.text == MEETINGS["text"][0]
    assert list(zip(first.queries, first.summaries, strict=True)) == [
        ("Summarize the meeting", "They ship in May."),
        ("When?", "In May."),
    ]
    assert (last.queries, last.summaries) == (["Who spoke?"], ["Bob."])


def test_a_corpus_is_known_by_name_with_its_columns(tmp_path: Path) -> None:
    rows = ['bid,chapter,summary_name,summary_text\n27681,"One said ""no"",\nand left.",I,Someone leaves.\n']
    rows += ["27681,Two.,II,\n"]  # nobody has written one
    (tmp_path / "dev.csv").write_text("".join(rows))
    documents = Documents("booksum", split="validation", data_files=[str(tmp_path / "dev.csv")])
    first, second = open_summaries(documents)
    assert first == Asked("row 0 of booksum", 'One said "no",\nand left.', [GENERAL], ["Someone leaves."])
    assert (second.text, second.queries) == ("Two.", [])


def test_one_summary_a_row_may_have_one_query(tmp_path: Path) -> None:
    row = {"talk": "Hello.", "asked": "What?", "told": "A greeting."}
    (tmp_path / "talks.jsonl").write_text(json.dumps(row) + "\n")
    documents = Documents(str(tmp_path / "talks.jsonl"), column="talk")
    (one,) = open_summaries(documents, query_column="asked", summary_column="told")
    assert one.queries == ["What?"]
    (other,) = open_summaries(documents, summary_column="told", query="Say it briefly.")
    assert (other.queries, other.summaries) == (["Say it briefly."], ["A greeting."])


def test_a_row_is_document_query_and_summary_and_only_the_summary_is_learnt(tmp_path: Path) -> None:
    examples = task(tmp_path)
    assert len(examples) == 3 and examples.cut == 0
    item = examples[1]
    prompt = f"{MEETINGS['text'][0]}\n\nQuery: When?\nSummary:\n"
    inputs, labels = item["input_ids"], item["shift_labels"]
    whole = len(prompt + "In May.")
    assert text_of(inputs[:whole]) == prompt + "In May."
    learnt = labels != -100
    assert text_of(labels[learnt]) == "In May.<|end|>"
    assert learnt.nonzero()[0] == len(prompt) - 1  # predicted by the prompt's last token
    assert labels[learnt][:-1].equal(inputs[1:][learnt[:-1]][: len("In May.")])
    assert not inputs[whole:].any() and len(inputs) == -(-whole // SEGMENT) * SEGMENT


def test_queries_can_be_turns_of_a_conversation(tmp_path: Path) -> None:
    tokenizer, documents = ended(), meetings(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    store = tokenized(documents, tokenizer, tmp_path / "tokens")
    rows = {"segment_length": SEGMENT, "max_tokens": 512}
    examples = SummariesTask(tokenizer, store, open_summaries(documents), chat=True, **rows)
    said = f"{MEETINGS['text'][0]}[user]When?[/][assistant]In May."
    assert text_of(examples[1]["input_ids"][: len(said)]) == said
    plain = SummariesTask(ended(), store, open_summaries(documents), chat=True, **rows)
    said = f"{MEETINGS['text'][0]}\n\nQuestion: When?\nAnswer:In May."
    assert text_of(plain[1]["input_ids"][: len(said)]) == said


def test_items_of_a_batch_are_as_long_as_the_longest(tmp_path: Path) -> None:
    examples = task(tmp_path)
    alone, batch = [examples[1], examples[2]], examples.__getitems__([1, 2])
    assert len(alone[0]["input_ids"]) < len(alone[1]["input_ids"])
    assert {len(item["input_ids"]) for item in batch} == {len(alone[1]["input_ids"])}
    for one, other in zip(alone, batch, strict=True):
        for name in ("input_ids", "shift_labels"):
            assert other[name][: len(one[name])].equal(one[name])
        assert predicted(one) == predicted(other)


def test_what_fills_a_row_up_changes_no_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = retrofit(LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)), segment_length=SEGMENT)
    examples = task(tmp_path)
    losses = []
    for item in (examples[1], examples.__getitems__([1, 2])[0]):
        rows = {name: column[None] for name, column in item.items()}
        with torch.no_grad():
            losses.append(model(**rows, use_cache=False, loss_chunk=64).loss)
    torch.testing.assert_close(*losses)


def test_of_a_longer_document_the_middle_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = task(tmp_path), task(tmp_path, max_tokens=5 * SEGMENT)
    assert cut.cut == 3
    item, text = cut[2], MEETINGS["text"][2]
    assert len(item["input_ids"]) == 5 * SEGMENT and item["shift_labels"][-1] == 256  # full, up to its end
    assert item["shift_labels"][item["shift_labels"] != -100].tolist() == (
        whole[2]["shift_labels"][whole[2]["shift_labels"] != -100].tolist()
    )
    kept = text_of(item["input_ids"]).partition("\n\nQuery: Who spoke?\nSummary:\nBob.")[0]
    half = len(kept) // 2
    assert kept == text[: len(kept) - half] + text[-half:]


@pytest.mark.parametrize(
    ("max_tokens", "words"),
    [
        (40, r"max_tokens is 40, and rows are of whole segments of 16; give a multiple"),
        (48, r"max_tokens is 48, and a query with its summary takes \d+; give more"),
    ],
)
def test_rows_without_room_are_refused(tmp_path: Path, max_tokens: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        task(tmp_path, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({"queries": [["One?"], ["What?"], ["Who?"]]}, {}, "row 0 of .* has 1 queries and 2 summaries"),
        ({}, {"query_column": "asked"}, "has no column 'asked'; choose one of id, text, queries, summaries"),
        ({}, {"query_column": "id"}, "column 'id' in row 0 of .* is no list of texts; name another"),
        ({}, {"summary_column": "told"}, "has no column 'told'"),
    ],
    ids=str,
)
def test_columns_that_cannot_be_right_are_named(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        list(open_summaries(meetings(tmp_path, **changes), **settings))


def test_plain_text_has_no_summaries(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello.")
    with pytest.raises(ValueError, match=r"a\.txt is plain text, without rows"):
        list(open_summaries(Documents(str(tmp_path / "a.txt"))))


def test_a_tokenizer_without_an_end_and_other_documents_are_refused(tmp_path: Path) -> None:
    documents = meetings(tmp_path)
    store, lengths = tokenized(documents, ended(), tmp_path), {"segment_length": 16, "max_tokens": 512}
    with pytest.raises(ValueError, match=r"has no end-of-text token; set tokenizer\.eos_token"):
        SummariesTask(byte_tokenizer(), store, open_summaries(documents), **lengths)
    asked = list(open_summaries(documents))
    with pytest.raises(ValueError, match="the store has 2 documents, and 1 were asked about"):
        SummariesTask(ended(), store, asked[:1], **lengths)
    silent = [Asked(each.name, each.text, [], []) for each in asked]
    with pytest.raises(ValueError, match="the documents have no summaries"):
        SummariesTask(ended(), store, silent, **lengths)


def test_an_end_is_given_only_where_there_is_none() -> None:
    tokenizer = ended()
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)
    assert len(with_end(tokenizer)) == 257
