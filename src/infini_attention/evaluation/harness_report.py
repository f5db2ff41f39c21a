"""What `infini eval` shows: one table; the report itself gives the JSON."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from infini_attention.evaluation.harness import HarnessReport

COLUMNS = ("task", "version", "shots", "samples", "metric", "value", "standard error")


def tables(report: HarnessReport) -> list[Table]:
    """Every metric of every task, with its standard error."""
    table = Table(
        title=f"{report.setting.model}, by lm-eval {report.lm_eval}",
        title_justify="left",
        title_style="bold",
        caption="\n".join(_remarks(report)),
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for column in COLUMNS:
        if column in ("task", "metric"):
            table.add_column(column, overflow="fold")  # a narrow terminal cuts nothing short
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for each in report.figures:
        counts = map(_shown, (each.version, each.shots, each.samples))
        table.add_row(each.task, *counts, each.metric, f"{each.value:,.4f}", _shown(each.stderr))
    return [table]


def _remarks(report: HarnessReport) -> Iterator[str]:
    setting = report.setting
    if setting.memory_reset:
        yield "The memory was emptied before every continuation."
    if setting.limit is not None:
        yield f"Limited to {setting.limit:g} of each task's documents: for trying out, not to be quoted."
    yield (
        f"{setting.system} ({setting.model_type}), segments of {setting.segment_length}; {setting.dtype} on "
        f"{setting.device}; {report.seconds:,.1f} s"
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4f}" if isinstance(value, float) else str(value)
