"""What `infini gates` shows: tables for people, heat maps; the report itself gives the JSON."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from infini_attention.evaluation.gates import GatesReport
from infini_attention.evaluation.stream_report import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

HEADS_ACROSS = 12  # columns of a table of gates
ACROSS = 14.0  # inches that heat maps may take side by side
WRITTEN_HEADS = 16  # up to which heat maps have numbers
WRITTEN_CELL, CELL = (0.33, 0.22), (0.14, 0.14)  # inches of a head and of a layer, with and without numbers
WITHOUT = "#d9d9d9"  # a layer without memory


def tables(report: GatesReport) -> list[Table]:
    """The gates by layer and head, the memory's share by layer and kind of token, and the loss by kind."""
    heads = range(len(report.gates[0]))
    parts = [heads[start : start + HEADS_ACROSS] for start in range(0, len(heads), HEADS_ACROSS)]
    return [*(_gate_table(report, part) for part in parts), _share_table(report), _loss_table(report)]


def plot(report: GatesReport, path: Path) -> None:
    """Draw the gates, and the memory's share for each kind of token, by layer and head, into `path`.

    Raises ValueError with the pip command when matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    maps = {"gate": _every_layer(report, report.gates)}
    maps |= {f"share, {name}": share for name, share in _shares(report).items()}
    layers, heads = maps["gate"].shape
    cell = WRITTEN_CELL if heads <= WRITTEN_HEADS else CELL
    width, height = max(1.6, 0.5 + cell[0] * heads), max(1.3, 0.6 + cell[1] * layers)
    columns = max(1, min(len(maps), int(ACROSS / width)))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(max(7.5, columns * width + 1.2), rows * height + 0.9), layout="constrained")
    places = [figure.add_subplot(rows, columns, number) for number in range(1, len(maps) + 1)]
    images = [_draw(axes, *each) for axes, each in zip(places, maps.items(), strict=True)]
    figure.supxlabel("head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    bar = figure.colorbar(images[0], ax=places, shrink=1 / rows, anchor=(0, 1), pad=0.02, format="{x:.0%}")
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        "\n".join([_source(report), _model(report), *_without_memory(report)]), fontsize=9, wrap=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw(axes: "Axes", title: str, values: np.ndarray) -> "AxesImage":
    """A heat map of (layers, heads), with numbers in per cent where there is room for them."""
    layers, heads = values.shape
    axes.set_facecolor(WITHOUT)
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    if heads <= WRITTEN_HEADS:
        for (layer, head), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            colour = "black" if value > 0.6 else "white"
            number = axes.text(head, layer, f"{100 * value:.0f}", color=colour, fontsize=6)
            number.set(ha="center", va="center", in_layout=False)  # else laying out takes most of the time
    every = 1 if heads <= WRITTEN_HEADS else 4
    axes.set_xticks(range(0, heads, every))
    axes.set_yticks(range(0, layers, every))
    axes.set_title(title, fontsize=9)
    axes.tick_params(length=0, labelsize=6)
    axes.spines[:].set_visible(False)
    return image


def _gate_table(report: GatesReport, heads: range) -> Table:
    table = _table("gates, %", _without_memory(report))
    _add_columns(table, ["layer", *map(str, heads)])
    for layer, gates in enumerate(_every_layer(report, report.gates)):
        table.add_row(str(layer), *_percents(gates[head] for head in heads))
    return table


def _share_table(report: GatesReport) -> Table:
    shares = _shares(report)
    table = _table("share, %, mean of heads", [])
    _add_columns(table, ["layer", *shares])
    for layer in range(report.layer_count):
        table.add_row(str(layer), *_percents(share[layer].mean() for share in shares.values()))
    table.add_section()
    table.add_row("all", *_percents(np.nanmean(share) for share in shares.values()), style="bold")
    table.add_row("largest head", *_percents(np.nanmax(share) for share in shares.values()))
    return table


def _loss_table(report: GatesReport) -> Table:
    remarks = [
        "Share: the memory's part in a head's output, after the first segment;",
        "|g A_mem| / (|g A_mem| + |(1 - g) A_dot|), mean over tokens.",
        "Loss: of the tokens of that kind, each predicted from those before it.",
        "Off: every gate shut, same tokens, same segments.",
        _source(report),
        f"{_model(report)}; {report.setting.dtype} on {report.setting.device}; {report.seconds:,.1f} s",
    ]
    table = _table("loss, nats a token, memory on and off", remarks)
    _add_columns(
        table, ["kind", "tokens", "after the\nfirst segment", "loss\non", "loss\noff", "off\nminus on"]
    )
    for kind in report.kinds:
        losses = (kind.loss, kind.loss_memory_off)
        table.add_row(
            kind.name,
            f"{kind.tokens:,}",
            f"{kind.with_memory:,}",
            *(f"{loss:.3f}" for loss in losses),
            f"{kind.memory_gain:+.3f}",
        )
    return table


def _table(title: str, remarks: Iterable[str]) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption="\n".join(remarks) + "\n",
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )


def _add_columns(table: Table, headings: list[str]) -> None:
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def _percents(shares: Iterable[float]) -> Iterator[str]:
    return ("-" if np.isnan(share) else f"{100 * share:.1f}" for share in shares)


def _shares(report: GatesReport) -> dict[str, np.ndarray]:
    """(layers, heads) of those kinds of tokens that had a memory to read, by name."""
    return {kind.name: _every_layer(report, kind.share) for kind in report.kinds if kind.share is not None}


def _every_layer(report: GatesReport, rows: list[list[float]]) -> np.ndarray:
    """(layers, heads), NaN in layers without a memory."""
    values = np.full((report.layer_count, len(rows[0])), np.nan)
    values[report.layers] = rows
    return values


def _without_memory(report: GatesReport) -> Iterator[str]:
    if without := sorted(set(range(report.layer_count)) - set(report.layers)):
        yield f"Without memory: layers {', '.join(map(str, without))}."


def _source(report: GatesReport) -> str:
    setting = report.setting
    if setting.prompts is None:
        return f"{setting.text}, {setting.length:,} tokens"
    prompts = setting.prompts
    prose = f" in {prompts.prose}" if prompts.prose else ""
    keys = f", {prompts.keys} keys" if prompts.keys > 1 else ""
    rewrites = f", told {prompts.rewrites + 1} times with new values" if prompts.rewrites else ""
    return (
        f"pass key, {prompts.variant}{prose}{keys}{rewrites}; prompts: {prompts.samples}, "
        f"of {setting.length:,} tokens"
    )


def _model(report: GatesReport) -> str:
    setting = report.setting
    return (
        f"{setting.model} ({setting.model_type}), segments of {setting.segment_length}, "
        f"{setting.update_rule} rule, {setting.feature_map}, normalization {setting.normalization}, "
        f"local attention {setting.local_attention}"
    )
