"""What `infini table lm` shows: Markdown, and a picture of perplexity by position; the table has the JSON."""

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infini_attention.evaluation.document_perplexity_report import times, with_interval
from infini_attention.evaluation.estimates import Interval
from infini_attention.evaluation.lm_table import Cell, LmTable, Position, Row
from infini_attention.evaluation.questions import short_length
from infini_attention.evaluation.stream_report import require_matplotlib, size
from infini_attention.evaluation.study_report import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTHING = "-"


def markdown(table: LmTable) -> str:
    """The table, remarks on it, each seed where there are several, and perplexity by position."""
    parts = ["\n".join(_systems(table)), "\n".join(_remarks(table))]
    if seeds := [*_seeds(table)]:
        parts.append("\n".join(["Token perplexity of each seed:", "", *seeds]))
    parts += ["\n".join(_by_position(table, documents)) for documents in table.documents]
    return "\n\n".join(parts)


def plot(table: LmTable, path: Path) -> None:
    """Draw perplexity by position into the picture `path`, and below it the difference to the reference.

    Raises ValueError with the pip command when matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    count = len(table.documents)
    # Names can be longer than a panel is wide: they stand below, and make the figure taller instead.
    width = 3 + 4.6 * count
    names = {row.name: textwrap.fill(row.name, round(11 * width)) for row in table.rows}
    lines = sum(name.count("\n") + 1 for name in names.values())
    figure = Figure(figsize=(width, 7.5 + 0.23 * lines), layout="constrained")
    panels = figure.subplots(2, count, sharex="col", squeeze=False, height_ratios=(3, 2))
    for column, documents in enumerate(table.documents):
        above, below = panels[:, column]
        for number, row in enumerate(table.rows):
            if documents in row.cells:
                _draw(above, below, row, row.cells[documents], _look(table, number))
        above.set(title=documents)
        below.axhline(0, color="black", linewidth=0.8)
        below.set(xlabel="tokens read")
        below.set_xscale("log", base=2)
        below.xaxis.set_major_formatter(lambda tokens, _: short_length(round(tokens)))
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("token perplexity")
    panels[1, 0].set_ylabel(f"to {table.reference}, %")
    drawn: dict[str, Any] = {}
    for axes in panels[0]:
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    labels = [names[name] for name in drawn]
    figure.legend(drawn.values(), labels, loc="outside lower left", frameon=False, handlelength=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _systems(table: LmTable) -> Iterator[str]:
    headings = ["system", "memory, numbers", "compression"]
    for documents in table.documents:
        headings += [f"{documents}: token ppl", f"to {table.reference}, %"]
    headings += ["tokens seen", "training, h", "peak memory, training", "peak memory, reading"]
    yield _line(headings)
    yield _line([":---", *["---:"] * (len(headings) - 1)])
    for row in table.rows:
        yield _line([row.name, _memory(row), _ratio(row), *_perplexities(table, row), *_costs(table, row)])


def _perplexities(table: LmTable, row: Row) -> Iterator[str]:
    for documents in table.documents:
        cell = row.cells.get(documents)
        yield NOTHING if cell is None else with_interval(cell.figures.token_perplexity, ",.2f")
        yield NOTHING if cell is None else _difference(cell.difference)


def _costs(table: LmTable, row: Row) -> Iterator[str]:
    """Of the trainings and of reading, one for all documents where they are alike."""
    cells = [row.cells[documents] for documents in table.documents if documents in row.cells]
    yield _together(_optional(cell.trained_tokens, _short) for cell in cells)
    yield _together(_optional(cell.trained_seconds, lambda x: f"{x / 3600:.2f}") for cell in cells)
    yield _together(_optional(cell.trained_peak_bytes, size) for cell in cells)
    yield _together(size(cell.read_peak_bytes) for cell in cells)


def _remarks(table: LmTable) -> Iterator[str]:
    yield "Token perplexity, with 95 % bootstrap intervals over documents; the difference is paired by"
    yield f"document, in % of the perplexity of {table.reference}, below 0 better. Memory: numbers held"
    yield "beside the open segment's, a row's in all layers; compression: against a full Memorizing"
    yield "Transformer of the same sizes. Tokens seen are those that the training predicted."
    if local := [row.system for row in table.rows if row.memory_floats == 0]:
        yield f"Training of {' and of '.join(local)} computes a memory and leaves it out: it could cost less."
    if len(table.documents) > 1:
        yield f"Costs that differ stand in the order of {', '.join(table.documents)}."
    if any(len(cell.seeds) > 1 for row in table.rows for cell in row.cells.values()):
        yield "Figures are of the mean loss over seeds; intervals do not cover what differs between seeds."


def _seeds(table: LmTable) -> Iterator[str]:
    for row in table.rows:
        for documents, cell in row.cells.items():
            if len(cell.seeds) > 1:
                each = ", ".join(f"{perplexity:,.2f}" for perplexity in cell.seeds)
                yield f"- {row.name} on {documents}: {each}"


def _by_position(table: LmTable, documents: str) -> Iterator[str]:
    rows = [row for row in table.rows if documents in row.cells]
    places = [{(each.start, each.end): each for each in row.cells[documents].by_position} for row in rows]
    yield f"Token perplexity by position on {documents}; in brackets, % to {table.reference}:"
    yield ""
    yield _line(["tokens", "documents", *(row.name for row in rows)])
    yield _line(["---:"] * (len(rows) + 2))
    for start, end in sorted({place for each in places for place in each}):
        found = [each.get((start, end)) for each in places]
        first = next(each for each in found if each is not None)
        yield _line([f"{start:,} to {end - 1:,}", f"{first.documents:,}", *map(_place, found)])


def _place(position: Position | None) -> str:
    if position is None:
        return NOTHING
    difference = "" if position.difference is None else f" ({position.difference.value:+.1f})"
    return f"{position.perplexity.value:,.2f}{difference}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _memory(row: Row) -> str:
    return NOTHING if row.memory_floats is None else _short(row.memory_floats)


def _ratio(row: Row) -> str:
    return NOTHING if row.compression is None else f"{times(row.compression)}x"


def _difference(shown: Interval | None) -> str:
    return NOTHING if shown is None else with_interval(shown, "+.2f")


def _optional(value: float | None, form: Callable[[float], str]) -> str:
    return NOTHING if value is None else form(value)


def _together(cells: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(cells))


def _short(count: float) -> str:
    """Numbers in thousands and millions: 65.5K, 1.59M, 300M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def _look(table: LmTable, number: int) -> tuple[str, str, str]:
    """Colour and marker by the system; dashed with its memory off."""
    row, systems = table.rows[number], [*dict.fromkeys(row.system for row in table.rows)]
    place = systems.index(row.system)
    style = "-" if row.memory == "on" else "--"
    return COLOURS[place % len(COLOURS)], style, MARKERS[place % len(MARKERS)]


def _draw(above: "Axes", below: "Axes", row: Row, cell: Cell, look: tuple[str, str, str]) -> None:
    """Perplexity of each stretch at its end, and the difference with its interval as a band."""
    colour, style, marker = look
    settings: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "markersize": 4,
        "linestyle": style,
        "linewidth": 1.6,
    }
    ends = [each.end for each in cell.by_position]
    above.plot(ends, [each.perplexity.value for each in cell.by_position], label=row.name, **settings)
    compared = [(each.end, each.difference) for each in cell.by_position if each.difference is not None]
    if compared:
        below.plot([end for end, _ in compared], [each.value for _, each in compared], **settings)
    banded = [(end, each) for end, each in compared if not math.isnan(each.low)]
    if banded:
        low, high = ([getattr(each, end) for _, each in banded] for end in ("low", "high"))
        below.fill_between([end for end, _ in banded], low, high, color=colour, alpha=0.1, linewidth=0)
