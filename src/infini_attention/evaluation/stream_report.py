"""What `infini stream` shows: tables for people, a line of JSON for programs, a picture for both."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from infini_attention.evaluation.perplexity import Loss, Stretch
from infini_attention.evaluation.result_files import plain
from infini_attention.evaluation.stream import StreamReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with any kind of colour vision.
ON, OFF, CACHE = "#0072B2", "#D55E00", "#000000"
DERIVED = ("tokens_per_second", "state_bytes", "full_cache_bytes")


def tables(report: StreamReport) -> list[Table]:
    """The loss by position and in whole, then what the reading took."""
    return [_loss_table(report), _cost_table(report)]


def to_json(report: StreamReport) -> str:
    """The whole report in one line of JSON; null where a number is not finite."""
    losses = {
        "total": report.total.to_dict(),
        "by_position": [stretch.to_dict() for stretch in report.by_position],
        "curve": [stretch.to_dict() for stretch in report.curve],
    }
    everything = asdict(report) | {name: getattr(report, name) for name in DERIVED} | losses
    return json.dumps(plain(everything), allow_nan=False)


def plot(report: StreamReport, path: Path) -> None:
    """Draw the report into the picture `path`: loss by position, and what is carried along.

    Raises ValueError with the pip command when matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    loss = figure.add_subplot(grid[0, 0])
    _draw_loss(loss, report)
    _draw_difference(figure.add_subplot(grid[1, 0], sharex=loss), report)
    loss.tick_params(labelbottom=False)
    _draw_sizes(figure.add_subplot(grid[:, 1]), report)
    setting = report.setting
    figure.suptitle(
        f"{report.text}, {report.total.end:,} tokens, read by {setting.model}: segments of "
        f"{setting.segment_length}, {setting.update_rule} rule, {setting.feature_map}, "
        f"normalization {setting.normalization}, local attention {setting.local_attention}"
        + (", untrained gates" if setting.retrofitted else ""),
        wrap=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def require_matplotlib() -> None:
    """Raise ValueError with the pip command when matplotlib is missing, best before a long reading."""
    if find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib; install it with: pip install 'infini-attention[demo]'")


def _loss_table(report: StreamReport) -> Table:
    table = Table(
        title=f"{report.text}: {report.total.end:,} tokens, memory on and off",
        title_justify="left",
        title_style="bold",
        caption="\n".join(_remarks(report)) + "\n",
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    measures = ("token ppl", "word ppl", "bits/byte")
    for heading in ("tokens", *(f"{name}\n{memory}" for name in measures for memory in ("on", "off"))):
        table.add_column(heading, justify="right", no_wrap=True)
    for stretch in report.by_position:
        table.add_row(f"{stretch.start:,} to {stretch.end - 1:,}", *_figures(stretch))
    table.add_section()
    table.add_row("all", *_figures(report.total), style="bold")
    return table


def _figures(stretch: Stretch) -> Iterator[str]:
    for name, form in (("token_perplexity", ",.2f"), ("word_perplexity", ",.1f"), ("bits_per_byte", ".4f")):
        for loss in (stretch.on, stretch.off):
            yield format(getattr(loss, name), form)


def _remarks(report: StreamReport) -> Iterator[str]:
    if report.ending == "interrupted":
        yield "Reading was interrupted; these are the figures up to there."
    if report.ending == "max_tokens":
        yield "Reading stopped at max_tokens; the text may go on."
    yield "Off: every gate shut, same tokens, same segments. The first token has nothing to predict it from."
    if report.setting.retrofitted:
        share = f"{report.setting.gate_share:.1%}"
        yield (
            f"The memory was added just now. Its gates are untrained and give it {share} of every head's "
            "output, so expect little of it, for better or worse, before training."
        )


def _cost_table(report: StreamReport) -> Table:
    table = Table(title="what it took", title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for row in _costs(report):
        table.add_row(*row)
    return table


def _costs(report: StreamReport) -> Iterator[tuple[str, str]]:
    setting, first, last = report.setting, report.samples[1], report.samples[-1]
    yield (
        "state carried",
        f"{_state_range(report)}, measured: the memories, and keys and values of the open segment",
    )
    yield (
        "key/value cache",
        f"{size(report.full_cache_bytes)} at this length, computed from the model's config",
    )
    yield (
        "resident memory",
        f"{size(report.samples[0].resident_bytes)} before reading, {size(first.resident_bytes)} after "
        f"{first.tokens:,} tokens, {size(last.resident_bytes)} at the end; "
        f"peak {size(report.peak_resident_bytes)}",
    )
    yield (
        "time",
        f"{report.load_seconds:.1f} s to load, {report.read_seconds:.1f} s to read twice (on and off): "
        f"{report.tokens_per_second:,.0f} tokens a second",
    )
    yield (
        "model",
        f"{setting.model} ({setting.model_type}), {setting.dtype} on {setting.device}; segments of "
        f"{setting.segment_length}, {setting.update_rule} rule, {setting.feature_map}, "
        f"normalization {setting.normalization}, local attention {setting.local_attention}",
    )


def _draw_loss(axes: "Axes", report: StreamReport) -> None:
    for name, colour, label in (("off", OFF, "memory off"), ("on", ON, "memory on")):
        ends = [stretch.end for stretch in report.curve]
        losses = [_nats_per_token(getattr(stretch, name)) for stretch in report.curve]
        axes.plot(ends, losses, color=colour, linewidth=0.7, alpha=0.3)
        axes.plot(ends, _smooth(losses), color=colour, linewidth=2, label=label)
    axes.set(ylabel="loss, nats a token", title="Loss by position")
    axes.margins(y=0.15)
    axes.legend(frameon=False, ncols=2, loc="upper right")
    _tidy(axes)


def _draw_difference(axes: "Axes", report: StreamReport) -> None:
    ends = [stretch.end for stretch in report.curve]
    gains = [_nats_per_token(stretch.off) - _nats_per_token(stretch.on) for stretch in report.curve]
    axes.axhline(0, color=CACHE, linewidth=0.8)
    axes.plot(ends, gains, color=ON, linewidth=0.7, alpha=0.35)
    axes.plot(ends, _smooth(gains), color=ON, linewidth=2)
    axes.set(xlabel="tokens read", ylabel="off minus on")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _tidy(axes)


def _draw_sizes(axes: "Axes", report: StreamReport) -> None:
    samples = report.samples[1:]
    tokens = [sample.tokens for sample in samples]
    cache = [count * report.setting.cache_bytes_per_token for count in tokens]
    state = [sample.state_bytes for sample in samples]
    axes.plot(tokens, cache, color=CACHE, linestyle="--", linewidth=2)
    axes.plot(tokens, state, color=ON, linewidth=2, marker="o", markersize=3)
    labels = (
        (f"key/value cache, computed: {size(cache[-1])}", max(cache), CACHE),
        (f"our state, measured: {_state_range(report)}", max(state), ON),
    )
    for text, height, colour in labels:
        place = (tokens[-1], height)
        axes.annotate(text, place, (0, 8), textcoords="offset points", ha="right", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="tokens read", title="What is carried along")
    axes.set_ylim(min(state) / 3, max(cache + state) * 3)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda height, _: size(height))
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: list[float]) -> list[float]:
    """Means over a tenth of the curve around each point, less at its ends."""
    half = max(1, len(values) // 20)
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _nats_per_token(loss: Loss) -> float:
    return loss.nats / loss.tokens if loss.tokens else math.nan


def _state_range(report: StreamReport) -> str:
    """What was carried from chunk to chunk: the size, or the smallest and the largest where it varied."""
    sizes = [sample.state_bytes for sample in report.samples[1:]]
    return " to ".join(dict.fromkeys((size(min(sizes)), size(max(sizes)))))


def size(count: float) -> str:
    """Bytes in decimal units: 3.0 MB, 1.41 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
