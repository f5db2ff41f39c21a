import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from infini_attention.evaluation import bindings as experiment
from infini_attention.evaluation import bindings_report as show
from infini_attention.evaluation.bindings import (
    CONDITIONS,
    BindingsReport,
    Measurement,
    Setting,
    measure,
    rules_and_maps,
)
from infini_attention.evaluation.bindings import bindings_report as make_report
from infini_attention.evaluation.estimates import Estimate

TRIALS = 4


def measured(**changes: object) -> Measurement:
    return measure(replace(Setting(), **changes), trials=TRIALS, seed=0)


@pytest.mark.parametrize("feature_map", [name for rule, name in rules_and_maps() if rule == "linear"])
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_a_single_binding_comes_back_exactly(update_rule: str, feature_map: str) -> None:
    cell = measured(update_rule=update_rule, feature_map=feature_map, bindings=1)
    assert cell.relative_error.mean < 1e-5
    assert cell.cosine.mean == pytest.approx(1, abs=1e-5)
    assert cell.recall.mean == 1


@pytest.mark.parametrize(("update_rule", "feature_map"), rules_and_maps())
def test_error_grows_with_the_number_of_bindings(update_rule: str, feature_map: str) -> None:
    cells = [measured(update_rule=update_rule, feature_map=feature_map, bindings=n) for n in (1, 8, 64, 512)]
    errors = [cell.relative_error.mean for cell in cells]
    assert errors == sorted(errors)
    assert cells[-1].recall.mean < cells[0].recall.mean


def test_a_wider_head_recalls_more() -> None:
    narrow, wide = (measured(feature_map="dpfp", bindings=128, head_dim=width) for width in (16, 128))
    assert wide.recall.mean - wide.recall.interval > narrow.recall.mean + narrow.recall.interval


def test_the_linear_rule_does_not_care_where_segments_are_cut() -> None:
    one, many = (measured(bindings=64, segments=segments) for segments in (1, 64))
    assert one.cosine.mean == pytest.approx(many.cosine.mean, abs=1e-5)


def test_the_delta_rule_is_the_linear_rule_within_one_segment() -> None:
    linear, delta = (measured(bindings=64, segments=1, update_rule=rule) for rule in ("linear", "delta"))
    assert delta.cosine.mean == pytest.approx(linear.cosine.mean, abs=1e-6)


@pytest.mark.parametrize("feature_map", ["elu1", "exp", "dpfp"])
def test_the_delta_rule_replaces_rewritten_values_where_the_linear_rule_mixes_them(feature_map: str) -> None:
    linear, delta = (
        measured(condition="rewritten", update_rule=rule, feature_map=feature_map, bindings=16)
        for rule in ("linear", "delta")
    )
    assert delta.recall.mean > linear.recall.mean
    assert delta.cosine.mean > linear.cosine.mean
    assert delta.stale_recall is not None
    assert linear.stale_recall is not None
    assert delta.stale_recall.mean < linear.stale_recall.mean


def test_a_key_rewritten_once_reads_the_mean_or_half_of_the_new_value() -> None:
    # linear: (old + new) / 2. delta: M holds the new value alone, but z has counted the key twice.
    delta = measured(condition="rewritten", update_rule="delta", bindings=1)
    linear = measured(condition="rewritten", update_rule="linear", bindings=1, head_dim=512)
    assert delta.cosine.mean == pytest.approx(1, abs=1e-5)
    assert delta.relative_error.mean == pytest.approx(0.5, abs=1e-5)
    assert linear.cosine.mean == pytest.approx(math.sqrt(0.5), abs=0.03)


def test_closer_keys_collide_more() -> None:
    recalls = [
        measured(condition=condition, feature_map="dpfp", bindings=32).recall.mean
        for condition in ("random", "colliding", "near-duplicate")
    ]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[0] > recalls[2]


@pytest.mark.parametrize("condition", ["colliding", "near-duplicate"])
def test_pairs_have_the_cosine_they_are_named_for(condition: str) -> None:
    setting = Setting(condition=condition, bindings=64, head_dim=512)
    keys, values = experiment._draw(setting, 2, torch.Generator().manual_seed(0))
    first, second = keys.chunk(2, dim=1)
    cosine = torch.cosine_similarity(first, second, dim=-1).mean()
    assert keys.shape == values.shape == (2, 64, 512)
    assert float(cosine) == pytest.approx(experiment.PAIR_COSINES[condition], abs=0.01)
    assert float(keys.std()) == pytest.approx(1, abs=0.02)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others() -> None:
    setting = Setting(bindings=32)
    assert measure(setting, trials=2, seed=1) == measure(setting, trials=2, seed=1)
    assert measure(setting, trials=2, seed=1) != measure(setting, trials=2, seed=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bindings": 40, "segments": 16}, "40 bindings cannot be cut into 16 equal segments"),
        ({"bindings": 0}, "bindings is 0"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"segments": -1}, "segments is -1"),
        ({"condition": "shuffled"}, "condition is 'shuffled'"),
        ({"feature_map": "cosine"}, "'cosine' is not registered"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured(**change)


def test_no_trials_are_refused() -> None:
    with pytest.raises(ValueError, match="trials is 0"):
        measure(Setting(), trials=0, seed=0)


@pytest.fixture(scope="module")
def report() -> BindingsReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "SWEEP_BINDINGS", 16)
        patch.setattr(experiment, "SWEEP_HEAD_DIMS", (4, 8))
        patch.setattr(experiment, "SWEEP_SEGMENTS", (1, 16))
        return make_report(bindings=(1, 4, 16, 32, 64, 128, 256), head_dim=8, trials=2)


def test_the_report_covers_every_condition_rule_and_map(report: BindingsReport) -> None:
    combinations = {
        (m.setting.condition, m.setting.update_rule, m.setting.feature_map) for m in report.by_bindings
    }
    assert combinations == {(condition, *pair) for condition in CONDITIONS for pair in rules_and_maps()}


def test_tables_fit_eighty_columns(report: BindingsReport) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    for table in show.tables(report):
        console.print(table)
    lines = console.export_text().splitlines()
    rows = [line for line in lines if line.startswith(("linear", "delta"))]
    assert len(rows) == (len(CONDITIONS) + 3) * len(rules_and_maps())
    assert "near-duplicate keys, by number of bindings" in {line.rstrip() for line in lines}
    assert "…" not in "".join(lines)


def test_one_trial_makes_tables_without_intervals(report: BindingsReport) -> None:
    bare = Estimate(0.5, math.nan)
    cells = [replace(cell, relative_error=bare, recall=bare) for cell in report.by_bindings]
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(show.tables(replace(report, by_bindings=cells))[0])
    assert "±nan" in console.export_text()


def test_json_is_one_strict_line(report: BindingsReport) -> None:
    line = show.to_json(report)
    assert "\n" not in line
    decoded = json.loads(line, parse_constant=pytest.fail)
    assert decoded["by_bindings"][0]["setting"]["condition"] == "random"
    assert len(decoded["by_bindings"]) == len(report.by_bindings)


def test_the_plot_is_a_picture(report: BindingsReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the extra `eval`")
    path = tmp_path / "new folder" / "bindings.png"
    show.plot(report, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_holds_the_command(
    report: BindingsReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'infini-attention\[eval\]'"):
        show.plot(report, tmp_path / "bindings.png")
