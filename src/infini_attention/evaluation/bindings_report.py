"""What `infini bindings` shows: tables for people, a line of JSON for programs, a picture for both."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from infini_attention.evaluation.bindings import (
    CONDITIONS,
    BindingsReport,
    Measurement,
    Setting,
    rules_and_maps,
)
from infini_attention.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Axis = Callable[[Setting], int]
Metric = Callable[[Measurement], Estimate]

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = {"linear": "-", "delta": "--"}


def tables(report: BindingsReport) -> list[Table]:
    """One table a condition, one more for old values of rewritten keys, then head size and segments."""
    count = report.by_head_dim[0].setting.bindings
    by_condition = [
        _table(f"{condition} keys, by number of bindings", _condition(report, condition), _bindings)
        for condition in CONDITIONS
    ]
    stale = [
        replace(cell, relative_error=cell.stale_error, recall=cell.stale_recall)
        for cell in report.by_bindings
        if cell.stale_error is not None and cell.stale_recall is not None
    ]
    return [
        *by_condition,
        _table("rewritten keys, the value written first", stale, _bindings),
        _table(f"{count} random keys, by head size", report.by_head_dim, _head_dim),
        _table(f"{count} random keys, by number of segments", report.by_segments, _segments),
    ]


def to_json(report: BindingsReport) -> str:
    """The whole report in one line of JSON; six significant digits, null where a number is not finite."""
    return json.dumps(_plain(asdict(report)), allow_nan=False)


def plot(report: BindingsReport, path: Path) -> None:
    """Draw the report into the picture `path`: error over recall, a column a condition, sweeps below.

    Raises ValueError with the pip command when matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ValueError(
            "a plot needs matplotlib; install it with: pip install 'infini-attention[eval]'"
        ) from missing

    figure = Figure(figsize=(15, 11), layout="constrained")
    grid = figure.add_gridspec(3, len(CONDITIONS))
    for column, condition in enumerate(CONDITIONS):
        cells = _condition(report, condition)
        label = "bindings, each written twice" if condition == "rewritten" else "bindings"
        error, recall = (figure.add_subplot(grid[row, column]) for row in (0, 1))
        _draw(error, cells, _bindings, lambda cell: cell.relative_error)
        _draw(recall, cells, _bindings, lambda cell: cell.recall)
        error.set(title=f"{condition} keys", xlabel=label, ylabel="relative error")
        recall.set(xlabel=label, ylabel="share recalled exactly")
    count = report.by_head_dim[0].setting.bindings
    sweeps = [(report.by_head_dim, _head_dim, "head size"), (report.by_segments, _segments, "segments")]
    for half, (cells, axis, label) in enumerate(sweeps):
        recall = figure.add_subplot(grid[2, 2 * half : 2 * half + 2])
        _draw(recall, cells, axis, lambda cell: cell.recall)
        recall.set(title=f"{count} random keys, by {label}", xlabel=label, ylabel="share recalled exactly")
    handles, labels = error.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) // 2, frameon=False)
    setting = report.by_bindings[0].setting
    figure.suptitle(
        f"What the memory alone gives back: head size {setting.head_dim}, written in at most "
        f"{setting.segments} segments; mean and 95 % interval of {report.trials} trials",
        fontsize=14,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _condition(report: BindingsReport, condition: str) -> list[Measurement]:
    return [cell for cell in report.by_bindings if cell.setting.condition == condition]


def _bindings(setting: Setting) -> int:
    return setting.bindings


def _head_dim(setting: Setting) -> int:
    return setting.head_dim


def _segments(setting: Setting) -> int:
    return setting.segments


def _table(title: str, cells: list[Measurement], axis: Axis) -> Table:
    widest_error = max((cell.relative_error.interval for cell in cells), key=_known)
    widest_recall = max((cell.recall.interval for cell in cells), key=_known)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption="relative error, percent recalled exactly; "
        f"95 % intervals up to ±{widest_error:.2f}, ±{100 * widest_recall:.0f}\n",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("rule")
    table.add_column("map")
    for column in sorted({axis(cell.setting) for cell in cells}):
        table.add_column(f"{column:,}", justify="right")
    for rule, sigma in rules_and_maps():
        table.add_row(rule, sigma, *map(_error_and_percent, _row(cells, axis, rule, sigma)))
    return table


def _error_and_percent(cell: Measurement) -> str:
    return f"{cell.relative_error.mean:.2f} {100 * cell.recall.mean:3.0f}"


def _known(interval: float) -> float:
    return interval if math.isfinite(interval) else -1.0


def _row(cells: list[Measurement], axis: Axis, rule: str, sigma: str) -> list[Measurement]:
    row = [cell for cell in cells if (cell.setting.update_rule, cell.setting.feature_map) == (rule, sigma)]
    return sorted(row, key=lambda cell: axis(cell.setting))


def _draw(axes: "Axes", cells: list[Measurement], axis: Axis, metric: Metric) -> None:
    """One line a rule and map, with its interval as a band."""
    colours = dict(zip(dict.fromkeys(sigma for _, sigma in rules_and_maps()), COLOURS, strict=False))
    for rule, sigma in rules_and_maps():
        row = _row(cells, axis, rule, sigma)
        places = [axis(cell.setting) for cell in row]
        estimates = [metric(cell) for cell in row]
        axes.plot(
            places,
            [each.mean for each in estimates],
            LINE_STYLES[rule],
            color=colours[sigma],
            label=f"{sigma}, {rule}",
            marker="o",
            markersize=3,
        )
        axes.fill_between(
            places,
            [each.mean - each.interval for each in estimates],
            [each.mean + each.interval for each in estimates],
            color=colours[sigma],
            alpha=0.12,
            linewidth=0,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, map(str, places))
    axes.set_ylim(-0.03, 1.05)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
