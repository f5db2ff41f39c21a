"""`infini study`: from the file to its arms, runs and report, with tiny models on the CPU."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

pytest.importorskip("accelerate", reason="needs accelerate: pip install 'infini-attention[train]'")

from infini_attention.cli import main
from infini_attention.evaluation import document_perplexity, summaries
from infini_attention.evaluation import study as module
from infini_attention.evaluation.document_perplexity_report import with_interval
from infini_attention.evaluation.estimates import Interval
from infini_attention.evaluation.passkey import Outcome, PasskeyReport, Setting
from infini_attention.evaluation.study import Run, StudyReport, arms_of, plan, read_study, run_study
from infini_attention.evaluation.study_report import _look, plot, tables
from infini_attention.provenance import provenance
from infini_attention.training import material

STUDIES = Path(__file__).parents[2] / "recipes" / "studies"
RECIPE = {
    "model": {
        "sizes": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "segment_length": 64,
    },
    "data": {"tokenizer": "bytes", "passkey": {"examples": 8, "least_segments": 4, "most_segments": 4}},
    "training": {
        "output_dir": "nowhere",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
    },
}
STUDY = {
    "title": "What is it?",
    "recipe": "recipe.yaml",
    "ask": {
        "paper": {"lengths": [400, 800], "depths": 2, "samples": 2},
        "four keys": {"keys": 4, "lengths": [640], "depths": 2, "samples": 1},
    },
}
RECALL = {
    "model": RECIPE["model"] | {"segment_length": 8},
    "data": {"associative_recall": {"examples": 8, "grid": [[24, 3]], "vocab_size": 16}},
    "training": RECIPE["training"] | {"per_device_eval_batch_size": 64},
}
RECALLED = {
    "arms": {
        "memory": {},
        "no memory": {"model.memory": False},
        "linear": {"model.baseline": "linear_attention"},
    },
    "ask": {
        "usual": {"grid": [[24, 3], [32, 4]], "examples": 4},
        "rewritten": {"grid": [[32, 4]], "examples": 4, "rewrites": 0.5, "across_segments": True},
    },
}
TALKS = [
    {"text": "Ann: We ship in May. Bob: Too late. " * 2, "queries": ["When?"], "summaries": ["In May."]},
    {"text": "Cat: The roof leaks. Dan: Since when?", "queries": ["What?"], "summaries": ["The roof leaks."]},
    {"text": "Nobody came, and so nothing was said.", "queries": ["Who came?"], "summaries": ["Nobody."]},
]
ASKED_ABOUT = {"source": "talks.jsonl", "max_documents": 2}
READ = {
    "arms": {"memory": {}, "no memory": {"model.memory": False}},
    "ask": {
        "read": {"perplexity_of": ASKED_ABOUT, "max_tokens": 48},
        "told": {"summaries_of": ASKED_ABOUT, "decoding": {"max_new_tokens": 8}},
    },
}
BROKEN = {"arms": {"whole": {}, "broken": {"model.sizes": {"hidden_size": 15, "num_attention_heads": 2}}}}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """What writes a study with some of its keys changed, beside its recipe."""

    def written(recipe_of: dict[str, Any] = RECIPE, **changes: Any) -> Path:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of))
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
        return path

    return written


class AtOnce:
    """In place of a process: the run is over when it is made."""

    def __init__(self, run: Run, place: str | None) -> None:
        self.sentinel, writing = os.pipe()
        os.close(writing)  # what is waited for is ready
        self.exitcode = 0
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            module.perform(run)
        except Exception as error:
            self.exitcode = 1
            (run.folder / module.LOG).write_text(f"Traceback\n{type(error).__name__}: {error}\n")

    def join(self) -> None:
        os.close(self.sentinel)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take place in this process, one after the other."""
    monkeypatch.setattr(module, "_started", AtOnce)
    monkeypatch.setattr(material, "HELD_OUT_PROMPTS", 2)
    monkeypatch.setattr(material, "HELD_OUT", 2)


def test_the_arms_are_all_combinations(write: Write) -> None:
    vary = {"model.feature_map": ["elu1", "exp"], "training.bf16": [False, True]}
    arms = arms_of(read_study(write(vary=vary, set={"training.max_steps": 9})))
    assert [arm.name for arm in arms] == [
        f"feature_map={sigma},bf16={bf16}" for sigma in ("elu1", "exp") for bf16 in ("false", "true")
    ]
    assert arms[1].factors == {"feature_map": "elu1", "bf16": "true"}
    assert arms[1].settings == {
        "training.max_steps": 9,
        "model.feature_map": "elu1",
        "training.bf16": True,
    }


def test_named_arms_come_in_every_combination(write: Write) -> None:
    arms = {"no memory": {"model.memory": False}, "plain": {}}
    found = arms_of(read_study(write(arms=arms, vary={"model.update_rule": ["linear", "delta"]})))
    assert [arm.name for arm in found] == [
        "no_memory,update_rule=linear",
        "no_memory,update_rule=delta",
        "plain,update_rule=linear",
        "plain,update_rule=delta",
    ]
    assert found[1].settings == {"model.memory": False, "model.update_rule": "delta"}


def test_combinations_are_left_out(write: Write) -> None:
    vary = {"model.feature_map": ["elu1", "identity"], "model.update_rule": ["linear", "delta"]}
    partial = {"model.feature_map": "identity", "model.update_rule": "delta"}
    arms = arms_of(read_study(write(vary=vary, leave_out=[partial])))
    assert len(arms) == 3 and partial not in [arm.settings for arm in arms]


def test_names_are_whole_where_short_ones_would_be_the_same(write: Write) -> None:
    vary = {"data.passkey.least_segments": [3], "training.least_segments": [None]}
    (arm,) = arms_of(read_study(write(vary=vary)))
    assert arm.name == "data.passkey.least_segments=3,training.least_segments=null"


def test_all_arms_of_a_seed_come_before_the_next(write: Write, tmp_path: Path) -> None:
    study = read_study(write(vary={"model.feature_map": ["elu1", "exp"]}, seeds=[3, 1]))
    runs = plan(study, tmp_path / "out")
    assert [run.folder.relative_to(tmp_path / "out").as_posix() for run in runs] == [
        f"feature_map={sigma}/seed-{seed}" for seed in (3, 1) for sigma in ("elu1", "exp")
    ]
    recipe = runs[1].read().recipe
    assert (recipe.model.feature_map, recipe.training.seed) == ("exp", 3)
    assert recipe.training.output_dir == str(runs[1].folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"varies": 3}, "is no study: Option 'varies' is not accepted"),
        ({"title": None}, "title"),
        ({"ask": {"paper": {"length": [400]}}}, "Option 'length' is not accepted"),
        ({"ask": {"paper": {"lengths": 400}}}, "lengths"),
        ({"ask": {"paper": {"depths": 1}}}, "depths is 1; give at least 2"),
        ({"ask": {"a/b": {}}}, "the question 'a/b'"),
        ({"ask": {}}, "give at least one"),
        ({"seeds": [1, 1]}, "seeds of"),
        ({"vary": {"model.feature_map": []}}, "arms are []; give at least one"),
        ({"arms": {"a b": {}, "a_b": {}}}, "each another name"),
        ({"leave_out": [{"model.memory": False}]}, "which is no arm's"),
        ({"set": {"model.feature": "exp"}}, "model.feature is no setting of a recipe"),
        ({"set": {"max_steps": 3}}, "max_steps is no setting of a recipe"),
        ({"set": {"data.passkey.most": 3}}, "Option 'most' is not accepted"),
        ({"set": {"training.max_steps": "many"}}, "Got value: many"),
        ({"set": {"training.repeat_ceiling": 0}}, "cannot be trained as recipe: repeat_ceiling is 0"),
        ({"recipe": "other.yaml"}, "there is no recipe"),
        ({"ask": {"usual": {"grid": [[24, 3]]}}}, "the recipe has no data.associative_recall; set it"),
        ({"recipe_of": RECALL}, "pass keys are asked for, and the recipe's data has no text"),
        (
            {"recipe_of": RECALL, "ask": {"usual": {"grid": [[12, 3]], "across_segments": True}}},
            "3 pairs in 12 tokens, and to tell and to ask them in segments of 8 takes 14",
        ),
        (
            {"recipe_of": RECALL, "ask": READ["ask"]},
            "talks.jsonl is asked about, and the recipe's data has no",
        ),
        (
            {"set": {"data.passkey": None, "data.documents": {"source": "talks.jsonl"}}, "ask": READ["ask"]},
            "talks.jsonl is asked about, and trained on; name others, or another split",
        ),
        (
            {"set": {"model.baseline": "full"}, "ask": {"told": READ["ask"]["told"]}},
            "summaries are asked for, and model.baseline is 'full'",
        ),
        ({"ask": {"told": {"summaries_of": ASKED_ABOUT, "decoding": {"top_p": 2}}}}, "top_p is 2"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_run(
    changes: dict[str, Any], words: str, write: Write, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        plan(read_study(write(**changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"jobs": 0}, "jobs is 0; give at least 1"), ({"devices": [-1]}, "devices has -1, and there are")],
    ids=str,
)
def test_jobs_and_devices_must_be_there(
    settings: dict[str, Any], words: str, write: Write, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        run_study(read_study(write()), tmp_path / "out", **settings)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_the_recipes_can_be_planned(path: Path, tmp_path: Path) -> None:
    study = replace(read_study(path), seeds=[0])
    assert len(plan(study, tmp_path)) == len(arms_of(study))


@pytest.mark.usefixtures("at_once")
def test_what_is_done_is_not_done_again(write: Write, tmp_path: Path, capsys: Any) -> None:
    output, vary = tmp_path / "out", {"model.feature_map": ["elu1", "exp"]}
    first = run_study(read_study(write(vary=vary)), output)
    assert [result.done for result in first.results] == [True, True]
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != module.REPORT}
    (output / "feature_map=exp" / "seed-0" / "paper.json").unlink()
    second = run_study(read_study(write(vary=vary)), output)
    assert second.results[0] == first.results[0]
    assert second.results[1].answers == first.results[1].answers
    changed = {path for path, before in times.items() if path.stat().st_mtime_ns != before}
    assert {path.name for path in changed if path.is_file()} == {"paper.json"}
    assert "2 runs, 1 of them to do" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("checkpoint", [True, False], ids=["with a checkpoint", "from the start"])
def test_a_run_without_weights_is_trained_anew_if_it_is_to_be_asked(
    checkpoint: bool, write: Write, tmp_path: Path
) -> None:
    study, output = read_study(write()), tmp_path / "out"
    (first,) = run_study(study, output).results
    folder = output / "recipe" / "seed-0"
    (weights,) = (folder / "model").glob("*.safetensors")
    before = weights.read_bytes()
    weights.unlink()
    if not checkpoint:
        shutil.rmtree(folder / "checkpoint-2")
    other = folder / "four keys.json"  # what other weights answered
    other.write_text(other.read_text().replace('"fingerprint": "', '"fingerprint": "other '))
    assert run_study(study, output).results[0].done and not weights.exists()  # nothing is left to ask
    (folder / "paper.json").unlink()
    (second,) = run_study(study, output).results
    assert second.failed is None and second.answers == first.answers
    assert weights.read_bytes() == before and "other" not in other.read_text()


@pytest.mark.usefixtures("at_once")
def test_a_run_that_fails_does_not_stop_the_others(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(arms=dict(reversed(BROKEN["arms"].items())))
    with pytest.raises(SystemExit) as ended:
        main(["study", str(path), "-o", str(tmp_path / "out")])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "Failed: broken, seed 0: ValueError: The hidden size (15) is not" in flat(printed.out)
    assert "whole, seed 0" in printed.err
    broken, whole = json.loads((tmp_path / "out" / "study.json").read_text())["results"]
    assert (broken["done"], broken["trained"], broken["answers"]) == (False, None, [])
    assert whole["done"] and whole["failed"] is None
    assert {"loss", "gate_mean", "gate_max", "seconds", "provenance"} <= set(whole["trained"])


@pytest.mark.usefixtures("at_once")
def test_other_recipes_and_other_questions_are_not_mixed_in(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_study(read_study(write()), output)
    with pytest.raises(ValueError, match="has a run of another recipe; name another output"):
        run_study(read_study(write(set={"training.max_steps": 3})), output)
    other = {"paper": {"lengths": [400], "depths": 2, "samples": 2}}
    (result,) = run_study(read_study(write(ask=other)), output).results
    assert result.answers == [] and "lengths is [400, 800] there" in (result.failed or "")
    moved = output.rename(tmp_path / "moved")
    assert run_study(read_study(write()), moved).results[0].failed is None


def test_runs_are_processes_with_logs(write: Write, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = run_study(read_study(write(**BROKEN)), output, jobs=2)
    whole, broken = report.results
    assert whole.done and broken.failed is not None
    assert "ValueError: The hidden size (15) is not" in broken.failed
    assert "Traceback" in (output / "broken" / "seed-0" / module.LOG).read_text()
    assert "step 2/2" in (output / "whole" / "seed-0" / module.LOG).read_text()


@pytest.mark.usefixtures("at_once")
def test_an_interrupted_study_shows_what_there_is(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    perform, before = module.perform, signal.getsignal(signal.SIGTERM)

    def told_to_end(run: Run) -> None:
        if "exp" in run.arm:
            signal.raise_signal(signal.SIGTERM)
        perform(run)

    monkeypatch.setattr(module, "perform", told_to_end)
    path = write(vary={"model.feature_map": ["elu1", "exp"]})
    with pytest.raises(SystemExit) as ended:
        main(["study", str(path), "-o", str(tmp_path / "out"), "--json"])
    assert ended.value.code == 130 and signal.getsignal(signal.SIGTERM) is before
    content = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert content["interrupted"]
    assert [(each["done"], each["failed"]) for each in content["results"]] == [(True, None), (False, None)]


@pytest.mark.parametrize("place", ["7", None])
def test_a_process_sees_its_own_gpu_only(place: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Process:
        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None:
            seen.append(os.environ.get(module.VISIBLE))

    monkeypatch.setattr(module, "get_context", lambda method: SimpleNamespace(Process=Process))
    for before in ("2,7", None):
        monkeypatch.delenv(module.VISIBLE, raising=False)
        if before is not None:
            monkeypatch.setenv(module.VISIBLE, before)
        module._started(Run("arm", 0, Path(), Path(), [], {}), place)
        assert os.environ.get(module.VISIBLE) == before
    assert seen == (["2,7", None] if place is None else [place, place])


def test_devices_are_counted_among_the_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv(module.VISIBLE, "4,5,7")
    assert module._places(None) == ["4", "5", "7"]
    assert module._places([2, 0]) == ["7", "4"]
    monkeypatch.delenv(module.VISIBLE)
    assert module._places([1]) == ["1"]
    with pytest.raises(ValueError, match="devices has 3, and there are 3 GPUs"):
        module._places([3])


@pytest.fixture
def known(write: Write, tmp_path: Path) -> StudyReport:
    """A study of two arms and two seeds whose files were written by hand."""
    path = write(vary={"model.update_rule": ["linear", "delta"]}, seeds=[0, 1])
    study, output = read_study(path), tmp_path / "out"
    for number, run in enumerate(plan(study, output)):
        (run.folder / "checkpoint-2").mkdir(parents=True)
        logs = {"log_history": [{"loss": 9.0}, {"loss": number, "gate_mean": 0.25, "gate_max": 0.5}]}
        (run.folder / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(logs))
        (run.folder / module.SUMMARY).write_text(json.dumps({"seconds": 100.0, "gate_max": 0.75}))
        for name in study.ask:
            (run.folder / f"{name}.json").write_text(answered(run, name, number).to_json())
    return run_study(study, output)


def answered(run: Run, name: str, right: int) -> PasskeyReport:
    """Of the prompts at each length so many are answered right."""
    asked = run.ask[name].asked()
    setting = {each.name: "" for each in fields(Setting)} | asked
    cells = [(depth, sample) for sample in range(asked["samples"]) for depth in asked["depths"]]
    outcomes = [
        Outcome(length, *cell, tokens=4, right=4 * (number < right), right_without_memory=0, in_reach=False)
        for length in asked["lengths"]
        for number, cell in enumerate(cells)
    ]
    return PasskeyReport(Setting(**setting), provenance(), outcomes, 2.5)


def test_the_scores_are_those_of_the_pass_key_reports(known: StudyReport, tmp_path: Path) -> None:
    runs = plan(known.study, tmp_path / "out")
    for number, (run, result) in enumerate(zip(runs, known.results, strict=True)):
        for answer in result.answers:
            assert answer.score == answered(run, answer.question, number).score(answer.length)
        assert [(each.question, each.length) for each in result.answers] == [
            ("paper", 400),
            ("paper", 800),
            ("four keys", 640),
        ]
        assert result.done and result.seconds == 5.0
        assert result.trained == {"seconds": 100.0, "loss": number, "gate_mean": 0.25, "gate_max": 0.5}


def test_the_tables_show_means_and_ranges_over_seeds(known: StudyReport) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        for table in tables(known):
            console.print(table)
    shown = flat(capture.get())
    assert "What is it?: exact match, %" in shown
    assert "linear 25 [0, 50] 25 [0, 50] 50 [0, 100]" in shown
    assert "delta 50 [25, 75] 50 [25, 75] 75 [50, 100]" in shown
    assert "linear 1.000 0.250 0.500 100 5" in shown
    assert "Means of 2 seeds" in shown


def test_published_figures_stand_below_ours_by_depth(known: StudyReport) -> None:
    published = {"theirs, 1B": {400: "14/13/98"}}
    report = replace(known, study=replace(known.study, published=published))
    console = Console(width=120)
    with console.capture() as capture:
        for table in tables(report):
            console.print(table)
    shown = flat(capture.get())
    assert "linear 25/25 25/25" in shown and "delta 75/25 75/25" in shown
    assert "paper: token accuracy by depth of the key, from start to end, %" in shown
    assert "theirs, 1B 14/13/98 -" in shown
    assert "theirs" not in flat("".join(str(table.title) for table in tables(known)))


@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=str)
def test_the_picture_is_written_where_asked(known: StudyReport, seeds: list[int], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'infini-attention[eval]'")
    results = [result for result in known.results if result.seed in seeds]
    results[0] = replace(results[0], answers=[])  # an arm that has not got there
    path = tmp_path / "new" / "study.png"
    plot(replace(known, study=replace(known.study, seeds=seeds), results=results), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_arm_of_many_has_a_look_of_its_own(write: Write, known: StudyReport) -> None:
    sigmas, rules = [*map(str, range(9))], ["linear", "delta"]
    arms = arms_of(read_study(write(vary={"model.feature_map": sigmas, "model.update_rule": rules})))
    looks = [_look(replace(known, arms=arms), arm) for arm in arms]
    assert len({*looks}) == len(arms) == 18
    assert looks[0][0] == looks[1][0] != looks[2][0]
    assert looks[0][1:] == looks[2][1:] != looks[1][1:]


@pytest.mark.usefixtures("at_once")
def test_systems_are_asked_for_associative_recall_and_what_their_states_hold(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'infini-attention[eval]'")
    path, picture = write(RECALL, **RECALLED), tmp_path / "study.png"
    main(["study", str(path), "-o", str(tmp_path / "out"), "--plot", str(picture)])
    shown = flat(capsys.readouterr().out)
    assert "What is it?: recall, % usual usual rewritten arm 3 in 24 4 in 32 4 in 32 memory" in shown
    for title in ("recall with every gate shut", "recall of keys told anew", "by their old value"):
        assert title in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = run_study(read_study(path), tmp_path / "out")
    sizes = [{answer.score.state_bytes for answer in result.answers} for result in report.results]
    states, token = 2 * 8 * 9 * 4, 2 * 2 * 8 * 4  # one layer, two heads of 8: sums, and keys and values
    assert sizes == [{2 * states + 7 * token + 8}, {7 * token + 8}, {states}]
    assert f"{states:,}" in shown
    assert [result.done for result in report.results] == [True] * 3
    assert "3 runs, 0 of them to do" in capsys.readouterr().err


@pytest.fixture
def talks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `READ` asks about."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    return path


@pytest.mark.usefixtures("at_once", "talks")
def test_models_are_asked_for_perplexity_and_summaries_of_documents(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'infini-attention[eval]'")
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'infini-attention[eval]'")
    output, picture = tmp_path / "out", tmp_path / "study.png"
    main(["study", str(write(**READ)), "-o", str(output), "--plot", str(picture)])
    shown = flat(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    folders = [output / arm / "seed-0" for arm in ("memory", "no_memory")]
    read = [document_perplexity.read_report(folder / "read.json").figures() for folder in folders]
    told = [summaries.read_report(folder / "told.json").scores() for folder in folders]
    of_arms = zip(("memory", "no memory"), read, strict=True)
    perplexities = [f"{arm} {with_interval(each.token_perplexity, ',.2f')}" for arm, each in of_arms]
    assert f"What is it?: token perplexity read arm talks.jsonl, 48 of each {' '.join(perplexities)}" in shown
    assert "(" in perplexities[0]
    for title, kind in (("", "summary"), (" by a window alone", "windowed")):
        scores = [with_interval(getattr(each, kind)["overall"], ".2f") for each in told]
        rows = f"memory {scores[0]} no memory {scores[1]}"
        assert f"ROUGE geometric mean{title}, % told arm talks.jsonl {rows}" in shown
    off = document_perplexity.read_report(folders[0] / "read.json").figures("off").token_perplexity
    assert f"shut read arm talks.jsonl, 48 of each memory {with_interval(off, '.2f')} no memory -" in shown
    assert "in parentheses: 95 % bootstrap intervals over documents" in shown


def test_a_window_s_score_stands_beside_that_of_whole_documents(write: Write) -> None:
    question = read_study(write(ask=READ["ask"])).ask["told"]
    one_document = {"low": None, "high": None}  # in JSON; no interval
    scores = {"summary": {"overall": {"value": 20.0, "low": 15.0, "high": 25.0}}}
    scores["windowed"] = {"overall": {"value": 10.0, **one_document}}
    (answer,) = question.answers("told", {"scores": scores})
    (windowed,) = answer.beside.values()
    assert answer.shown == Interval(20.0, 15.0, 25.0)
    assert windowed is not None and with_interval(windowed, ".2f") == "10.00"


@pytest.mark.usefixtures("at_once", "talks")
@pytest.mark.parametrize("name", ["read", "told"])
def test_documents_that_were_not_read_to_the_last_are_no_answer(
    name: str, write: Write, tmp_path: Path
) -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'infini-attention[eval]'")
    study, output = read_study(write(ask=READ["ask"])), tmp_path / "out"
    before = run_study(study, output)
    path = output / "recipe" / "seed-0" / f"{name}.json"
    cut_off = json.loads(path.read_text())
    cut_off |= {"documents": cut_off["documents"][:1], "whole": False}
    cut_off.pop("scores", None)
    path.write_text(json.dumps(cut_off))
    (run,) = plan(study, output)
    assert not run.done() and run.ask[name].answers(name, run.report(name) or {}) == []
    after = run_study(study, output)
    assert after.results[0].done and after.results[0].answers == before.results[0].answers


@pytest.mark.usefixtures("at_once")
def test_answers_about_other_documents_are_not_mixed_in(write: Write, tmp_path: Path, talks: Path) -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'infini-attention[eval]'")
    study = read_study(write(ask=READ["ask"]))
    run_study(study, tmp_path / "out")
    (run,) = plan(study, tmp_path / "out")
    assert run.report("read") is not None and run.report("told") is not None
    talks.write_text(talks.read_text().replace("May", "June"))
    assert run.report("read") is None and run.report("told") is None


@pytest.mark.usefixtures("at_once")
def test_pass_keys_and_recall_stand_in_one_picture(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'infini-attention[eval]'")
    report = run_study(read_study(write(RECALL, ask=RECALLED["ask"], seeds=[0, 1])), tmp_path / "out")
    ask = report.study.ask | read_study(write()).ask  # of the latter nothing is known
    plot(replace(report, study=replace(report.study, ask=ask)), tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)
