"""What `infini passkey` shows: tables for people, a heat map; the report itself gives the JSON."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.table import Table

from infini_attention.evaluation.estimates import Proportion
from infini_attention.evaluation.passkey import PasskeyReport
from infini_attention.evaluation.stream_report import require_matplotlib


def tables(report: PasskeyReport) -> list[Table]:
    """Exact match by length and depth, then each length with its intervals and the control."""
    return [_grid(report), _summary(report)]


def plot(report: PasskeyReport, path: Path) -> None:
    """Draw exact match by length and depth into the picture `path`.

    Raises ValueError with the pip command when matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    lengths, depths = report.setting.lengths, report.setting.depths
    shares = np.array(
        [[100 * report.score(length, depth).exact_match.share for length in lengths] for depth in depths]
    )
    figure = Figure(
        figsize=(max(7, 3 + len(lengths)), max(3.4, 2 + 0.36 * len(depths))), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        colour = "black" if share > 60 else "white"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the key")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="exact match, %", pad=0.02)
    figure.suptitle(f"{_task(report)}\n{_model(report)}", fontsize=10, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _grid(report: PasskeyReport) -> Table:
    depths = report.setting.depths
    table = _table(
        f"{_task(report)}: exact match by depth, %",
        f"{report.setting.samples} prompts a cell\n",
    )
    for heading in ("tokens", *(f"{depth:.0%}" for depth in depths)):
        table.add_column(heading, justify="right", no_wrap=True)
    for length in report.setting.lengths:
        scores = [report.score(length, depth) for depth in depths]
        table.add_row(f"{length:,}", *(f"{100 * score.exact_match.share:.0f}" for score in scores))
    return table


def _summary(report: PasskeyReport) -> Table:
    table = _table("all depths: %, 95 % interval", "\n".join(_remarks(report)))
    for heading in ("tokens", "exact match", "token accuracy", "exact match,\nmemory reset"):
        table.add_column(heading, justify="right", no_wrap=True)
    for length in report.setting.lengths:
        score = report.score(length)
        shares = (score.exact_match, score.token_accuracy, score.control)
        table.add_row(f"{length:,}", *map(_percent, shares))
    return table


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )


def _percent(shown: Proportion | None) -> str:
    if shown is None:
        return "-"
    return f"{100 * shown.share:.1f} ({100 * shown.low:.1f} to {100 * shown.high:.1f})"


def _remarks(report: PasskeyReport) -> Iterator[str]:
    prompts = report.setting.samples * len(report.setting.depths)
    yield f"Intervals are Wilson's, over {prompts} prompts."
    yield "Memory reset: before the question; only prompts whose key attention does not reach by itself."
    yield f"{_model(report)}; {report.setting.dtype} on {report.setting.device}; {report.seconds:,.1f} s"


def _task(report: PasskeyReport) -> str:
    setting = report.setting
    prose = f" in {setting.prose}" if setting.prose else ""
    keys = f", {setting.keys} keys" if setting.keys > 1 else ""
    rewrites = f", told {setting.rewrites + 1} times with new values" if setting.rewrites else ""
    return f"pass key, {setting.variant}{prose}{keys}{rewrites}"


def _model(report: PasskeyReport) -> str:
    setting = report.setting
    return (
        f"{setting.model} ({setting.model_type}), segments of {setting.segment_length}, "
        f"{setting.update_rule} rule, {setting.feature_map}, normalization {setting.normalization}, "
        f"local attention {setting.local_attention}"
    )
