import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.cli import main
from infini_attention.data.answers import ABOUT, GENERAL, Passages, Sampling, answered, written
from infini_attention.data.documents import Documents
from infini_attention.data.facts import KINDS, candidates
from infini_attention.data.summaries import Asked, open_summaries, with_end
from infini_attention.data.tokenizers import byte_tokenizer

EACH = 8
BYTES = with_end(byte_tokenizer())
PROSE = " ".join(f"The {number}th wave came in and went out again." for number in range(200))
NOTED = re.compile(r"The code of the (\w+) is (\d+)\.")


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    (tmp_path / "a.txt").write_text(PROSE)
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text(PROSE[::-1])
    return Documents(str(tmp_path / "*.txt"))


class Speaker:
    """Says the same to everything, and keeps what it was asked."""

    device = torch.device("cpu")

    def __init__(self, words: str = "Waves.", *, window: int = 10_000, ends: bool = True) -> None:
        self.config = SimpleNamespace(max_position_embeddings=window)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.said = BYTES(words)["input_ids"] + [BYTES.eos_token_id] * ends
        self.asked: list[str] = []

    def generate(self, ids: Tensor, *, attention_mask: Tensor, **options: Any) -> Tensor:
        for row, mask in zip(ids, attention_mask.bool(), strict=True):
            assert row[~mask].eq(BYTES.eos_token_id).all() and mask[-1]
            self.asked.append(BYTES.decode(row[mask]))
        return torch.cat([ids, torch.tensor([self.said] * len(ids))], dim=1)


def passages(documents: Documents, model: Any, **settings: Any) -> list[Asked]:
    drawn = Passages(**{"least_tokens": 100, "most_tokens": 900, "each": EACH} | settings)
    return list(answered(model, BYTES, documents, drawn, Sampling(batch_rows=3)))


def test_what_is_told_is_asked_for_and_answered(documents: Documents) -> None:
    model = Speaker()
    found = passages(documents, model, told=1.0, told_tokens=2_000)
    assert len(found) == 2 * EACH and not model.asked
    words = {word for kind in KINDS for word in candidates(kind)}
    notes = 0
    for each in found:
        codes = dict(NOTED.findall(each.text))
        for query, answer in zip(each.queries, each.summaries, strict=True):
            what = re.fullmatch(r"What is the code of the (\w+)\?", query)
            notes += what is not None
            assert answer == codes[what[1]] if what else answer in words and answer in each.text
    assert notes > 0 and any(len(each.text) > 900 for each in found)


def test_passages_are_of_all_lengths_and_are_the_documents_words(documents: Documents) -> None:
    found = passages(documents, Speaker(), told=0.0, each=24)
    lengths = [len(each.text) for each in found]
    assert max(lengths) <= 900 and 0 < min(lengths) < 250 and max(lengths) > 600
    sentences = {f"The {number}th wave came in and went out again." for number in range(200)}
    assert {part + "." for part in found[0].text.rstrip(".").split(". ")} <= sentences


def test_a_model_sees_the_passage_that_it_is_asked_about(documents: Documents) -> None:
    model = Speaker()
    found = passages(documents, model, told=0.0)
    asked = [(each.text, query) for each in found for query in each.queries]
    assert all(answer == "Waves." for each in found for answer in each.summaries)
    for (text, query), prompt in zip(asked, model.asked, strict=True):
        assert query in prompt and (text in prompt) == (query not in GENERAL)
    assert 0 < sum(query in GENERAL for _, query in asked) < len(asked) / 2


def test_an_answer_without_an_end_is_left_out(documents: Documents) -> None:
    assert passages(documents, Speaker(ends=False), told=0.0) == []
    assert passages(documents, Speaker(" "), told=0.0) == []
    assert 0 < len(passages(documents, Speaker(ends=False), told=0.5)) < 2 * EACH


def test_a_seed_decides_all(documents: Documents) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=4_096, **sizes)).eval()
    settings = {"each": 4, "most_tokens": 300, "told": 0.3}
    first, again = (passages(documents, model, **settings, seed=1) for _ in range(2))
    assert first == again != passages(documents, model, **settings, seed=2)


def test_a_line_of_the_file_is_a_document_with_queries(documents: Documents, tmp_path: Path) -> None:
    found = passages(documents, Speaker(), told=0.5)
    assert list(written(found, tmp_path / "answers.jsonl")) == found
    read = list(open_summaries(Documents(str(tmp_path / "answers.jsonl"))))
    assert [(x.text, x.queries, x.summaries) for x in read] == [
        (x.text, x.queries, x.summaries) for x in found
    ]
    with pytest.raises(ValueError, match=r"answers.jsonl is there already; name a new file"):
        list(written(found, tmp_path / "answers.jsonl"))
    assert list(written(found, tmp_path / "new" / "answers.jsonl")) == found
    with pytest.raises(ValueError, match="cannot be written: File exists; name another place"):
        list(written(found, tmp_path / "a.txt" / "answers.jsonl"))


def test_what_fails_in_reading_is_not_said_of_the_file(tmp_path: Path) -> None:
    def failing() -> Iterator[Asked]:
        yield Asked("a", "Waves.", ["What?"], ["Waves."])
        raise ConnectionError("no network")

    with pytest.raises(ConnectionError, match="no network"):
        list(written(failing(), tmp_path / "answers.jsonl"))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_where_no_sentence_has_room_there_is_no_passage(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("wave" * 5_000)
    documents = Documents(str(tmp_path / "one.txt"))
    assert passages(documents, Speaker(), told=0.0) == []
    told = passages(documents, Speaker(), told=1.0)
    assert len(told) == EACH and all("wave" not in each.text for each in told)


def test_a_passage_goes_on_as_its_document_does(documents: Documents) -> None:
    for each in passages(documents, Speaker(), told=0.0):
        numbers = [int(number) for number in re.findall(r"The (\d+)th", each.text)]
        assert numbers == [*range(numbers[0], numbers[0] + len(numbers))] if numbers else "ehT" in each.text


def test_a_turn_may_end_with_another_token(documents: Documents) -> None:
    model = Speaker("Waves.~", ends=False)
    model.generation_config.eos_token_id = [BYTES("~")["input_ids"][0]]
    found = passages(documents, model, told=0.0)
    assert found and all(answer == "Waves." for each in found for answer in each.summaries)


def test_the_window_has_room_for_a_templates_own_words(documents: Documents) -> None:
    tokenizer = with_end(byte_tokenizer())
    tokenizer.chat_template = (
        "{{ 'You help. ' * 30 }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    model, sampling = Speaker(window=2_000), Sampling(max_new_tokens=100)
    with pytest.raises(ValueError, match="give at most") as refused:
        answered(model, tokenizer, documents, Passages(most_tokens=1_900), sampling)
    most = int(str(refused.value).rsplit(" ", 1)[1])
    list(answered(model, tokenizer, documents, Passages(most_tokens=most, told=0.0), sampling))
    assert max(map(len, model.asked)) + 100 <= 2_000


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"each": 0}, "each is 0; give at least 1"),
        ({"least_tokens": 10}, "least_tokens is 10; give at least 64"),
        ({"told": 1.5}, "told is 1.5; give a share from 0 to 1"),
        ({"most_tokens": 99}, "most_tokens is 99; give at least least_tokens, 100"),
        ({"told_tokens": 99}, "told_tokens is 99; give at least least_tokens, 100"),
        ({"most_tokens": 9_900}, r"most_tokens is 9900: with question and answer .*; give at most 97\d\d"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(
    documents: Documents, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        passages(documents, Speaker(), **settings)


def test_sampling_that_cannot_be_right_is_refused() -> None:
    for settings, words in (
        ({"temperature": 0.0}, "temperature is 0.0; give a number above 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"batch_rows": 0}, "batch_rows is 0; give at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Sampling(**settings)  # type: ignore[arg-type]


def test_the_command_writes_what_a_model_says(
    documents: Documents, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=4_096, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    BYTES.save_pretrained(tmp_path / "model")
    few = ["--least_tokens", "100", "--most_tokens", "300", "--told", "0.5", "--each", "6"]
    output = tmp_path / "answers.jsonl"
    main(["answers", documents.source, "--model", str(tmp_path / "model"), "-o", str(output), *few])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    asked = sum(len(row["queries"]) for row in rows)
    assert capsys.readouterr().out == f"{output}: {len(rows)} passages with {asked} questions and answers\n"
    by_model = [row for row in rows if set(row["queries"]) & {*ABOUT, *GENERAL}]
    assert 0 < len(by_model) < len(rows)
