"""Documents and scores of facts in texts and of RULER; lm-eval is not needed for them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from infini_attention.assets import find_packaged
from infini_attention.data.facts import KINDS, example
from infini_attention.evaluation import harness_tasks as made


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" kitchen", True),
        ("In the Kitchen. Then the garden.", True),  # the first sentence counts
        ("kitchen or garden", False),
        ("attic or kitchen", True),  # the question names the attic
        ("The attic.", False),
        ("garden", False),
        ("", False),
    ],
)
def test_an_answer_counts_where_no_other_candidate_is_named(said: str, right: bool) -> None:
    row = {"kind": "qa3", "question": "Where was it before it came to the attic?", "answer": "kitchen"}
    assert made.babi_result(row, [said]) == {"acc": float(right)}


def test_people_and_things_are_each_others_rivals_in_the_fifth_kind() -> None:
    row = {"kind": "qa5", "question": "What did Hugo give to Elsa?", "answer": "violin"}
    said = ("Hugo gave Elsa the violin", "violin, from Greta", "violin and candle", "violin, in the attic")
    assert [made.babi_result(row, [each])["acc"] for each in said] == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_facts_are_hidden_in_texts_up_to_a_length(kind: str, base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It rained. " * 200)
    (tmp_path / "b.txt").write_text("The sun shone. " * 200)
    asked = {"kind": kind, "samples": 3, "tokenizer": str(base_folder), "data_files": f"{tmp_path}/*.txt"}
    splits = made.babi(**asked, length=6000, version=1.0)  # type: ignore[arg-type]
    rows = [*splits["test"]]
    assert len(rows) == 3
    for index, row in enumerate(rows):
        told = example(kind, index=index)
        assert (row["question"], row["answer"]) == (told.question, told.answer)
        assert 5980 <= len(row["prompt"]) <= 6000
        assert all(fact in row["prompt"] for fact in told.facts)
        assert "It rained. " in row["prompt"]
        assert row["prompt"].endswith(f"\nQuestion: {told.question}\nAnswer:")
    shown = [*splits["examples"]]
    assert len(shown) == made.SHOWN
    assert not any("rained" in row["prompt"] for row in shown)
    assert not {row["prompt"] for row in shown} & {row["prompt"] for row in rows}


def test_facts_alone_need_no_text(base_folder: Path) -> None:
    splits = made.babi(kind="qa1", length=0, samples=1, pretrained=str(base_folder), data_files="none.txt")
    [row] = splits["test"]
    assert row["prompt"].startswith(" ".join(example("qa1").facts) + "\nQuestion: ")


def test_rows_are_made_when_they_are_read_and_once() -> None:
    seen = []

    def make(number: int) -> dict[str, str]:
        seen.append(number)
        return {"prompt": f"row {number}", "answer": "a"}

    rows = made._when_asked_for(make, 1000)
    assert len(rows) == 1000 and not seen
    assert rows[7] == {"prompt": "row 7", "answer": "a"}
    assert [row["prompt"] for _, row in zip(range(2), rows, strict=False)] == ["row 0", "row 1"]
    assert rows[7]["prompt"] == "row 7"
    assert seen == [7, 0, 1]


def test_all_of_rulers_answers_count_but_one_of_a_documents() -> None:
    row = {"kind": "vt", "answers": ["ABC", "def"]}
    assert [made.ruler_result(row, [said])["string_match"] for said in ("abc DEF", "xdefx", "")] == [
        1,
        0.5,
        0,
    ]
    row = {"kind": "qa_1", "answers": ["France", "in France"]}
    assert [made.ruler_result(row, [said])["string_match"] for said in ("france.", "Spain")] == [1, 0]


@pytest.mark.skipif(
    find_spec("long_context_eval") is None,
    reason='pip install --no-deps "nvidia-long-context-eval==26.3"',
)
def test_rulers_scores_are_those_of_its_own_package() -> None:
    import runpy

    path = find_packaged(pip_name="", package="long_context_eval", path="eval/synthetic/constants.py")
    theirs = runpy.run_path(str(path))["TASKS"]
    answers, said = ["12", "ab", "Q"], "It is AB, or 12"
    for kind, task in (("vt", "variable_tracking"), ("cwe", "common_words_extraction"), ("qa_1", "qa")):
        score = made.ruler_result({"kind": kind, "answers": answers}, [said])["string_match"]
        assert 100 * score == pytest.approx(theirs[task]["metric_fn"]([said], [answers]), abs=0.01)
