"""What `infini perplexity` shows: tables for people; the report itself gives the JSON."""

import math
from collections.abc import Iterator, Sequence

from rich.table import Table

from infini_attention.evaluation.document_perplexity import Figures, PerplexityReport
from infini_attention.evaluation.estimates import Interval
from infini_attention.evaluation.stream_report import size

MEASURES = {"token ppl": ("token_perplexity", ",.2f"), "word ppl": ("word_perplexity", ",.1f")}
MEASURES |= {"bits/byte": ("bits_per_byte", ".4f")}


def tables(report: PerplexityReport) -> list[Table]:
    """Each figure with its interval, then by position."""
    return [_summary(report), _positions(report)]


def with_interval(shown: Interval, form: str) -> str:
    """A figure, and the ends of its interval in brackets where it has one."""
    value, low, high = (format(each, form) for each in (shown.value, shown.low, shown.high))
    return value if math.isnan(shown.low) else f"{value} ({low} to {high})"


def times(factor: float) -> str:
    """How many times, with three digits or more: 3.67, 1,234."""
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.3g}"


def _summary(report: PerplexityReport) -> Table:
    setting = report.setting
    title = f"{setting.system} on {setting.documents}: {len(report.documents):,} documents"
    table = _table(f"{title}, {report.tokens:,} tokens", [], ["", *MEASURES])
    for memory in report.memories:
        figures = report.figures(memory)
        table.add_row(
            f"memory {memory}",
            *(with_interval(getattr(figures, name), form) for name, form in MEASURES.values()),
        )
    return table


def _positions(report: PerplexityReport) -> Table:
    headings = [f"{name}\n{memory}" for name in MEASURES for memory in report.memories]
    table = _table("by position", [*_remarks(report)], ["tokens", "documents", *headings])
    by_memory = {memory: report.by_position(memory) for memory in report.memories}
    for number, (start, end, _) in enumerate(by_memory["on"]):
        figures = [by_memory[memory][number][2] for memory in report.memories]
        reached = sum(document.length > start for document in report.documents)
        table.add_row(f"{start:,} to {end - 1:,}", f"{reached:,}", *_shown(figures))
    return table


def _shown(figures: Sequence[Figures]) -> Iterator[str]:
    for name, form in MEASURES.values():
        yield from (format(getattr(each, name).value, form) for each in figures)


def _remarks(report: PerplexityReport) -> Iterator[str]:
    setting = report.setting
    yield "In brackets: 95 % bootstrap intervals over documents. A document's first token is not predicted;"
    yield "words are what whitespace separates, bytes those of the text in UTF-8."
    if setting.memory_off:
        yield "Off: every gate shut, same tokens, same segments."
    held = f"{report.memory_floats:,} numbers of memory"
    if report.compression is not None:
        held += f", {times(report.compression)} times less than a full Memorizing Transformer's"
    yield f"{held}; {report.seconds:,.1f} s, at most {size(report.peak_memory_bytes)} while reading"
    yield (
        f"{setting.model} ({setting.model_type}, {setting.parameters:,} parameters), segments of "
        f"{setting.segment_length}; {setting.dtype} on {setting.device}"
    )


def _table(title: str, remarks: Sequence[str], headings: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption="\n".join(remarks) or None,
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
