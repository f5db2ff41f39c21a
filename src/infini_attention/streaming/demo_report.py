"""What `infini demo` shows: the pass key and its answer, and what reading took on the way."""

from collections.abc import Iterator

from rich.table import Table

from infini_attention.evaluation.stream_report import size
from infini_attention.streaming.demo import Demo


def tables(demo: Demo) -> list[Table]:
    """What was hidden, asked and answered; then memory by tokens read."""
    return [_story(demo), _memory(demo)]


def _story(demo: Demo) -> Table:
    table = Table(title=f"A pass key in {demo.text}", title_justify="left", title_style="bold", box=None)
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column()
    for row in _scenes(demo):
        table.add_row(*row)
    return table


def _scenes(demo: Demo) -> Iterator[tuple[str, str]]:
    verdict = "right" if demo.found else f"wrong: it is {demo.key}"
    last = demo.samples[-1]
    yield f"after {demo.told_at:,} tokens", f"it is told: {demo.told}"
    yield f"after {demo.asked_at:,} tokens", f"it is asked: {demo.asked}"
    yield "the answer", f"{demo.answer} ({verdict})"
    yield "reading", f"{last.seconds:.0f} s, {last.tokens / last.seconds:,.0f} tokens a second"


def _memory(demo: Demo) -> Table:
    table = Table(title="\nMemory while it reads", title_justify="left", title_style="bold", box=None)
    for heading in ("tokens", "state carried", "resident memory", "key/value cache, computed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for sample in demo.samples:
        cache = size(sample.tokens * demo.cache_bytes_per_token)
        table.add_row(f"{sample.tokens:,}", size(sample.state_bytes), size(sample.resident_bytes), cache)
    return table
