"""What `infini summaries` shows: tables for people; the report itself gives the JSON and all texts."""

from collections.abc import Iterator

from rich.table import Table

from infini_attention.evaluation.document_perplexity_report import with_interval
from infini_attention.evaluation.summaries import Scores, SummariesReport

NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
NAMES |= {"overall": "mean of the three", "rougeLsum": "ROUGE-Lsum"}


def tables(report: SummariesReport) -> list[Table]:
    """Each score with its interval, with the memory and by a window; then by the documents' length."""
    return [_summary(report), _lengths(report)]


def _summary(report: SummariesReport) -> Table:
    scores = report.scores()
    title = f"summaries of {report.setting.documents}: {scores.documents:,} documents"
    headings = ["F1, %", "whole\ndocument", f"{_window(report)}\nonly", "difference"]
    table = _table(f"{title}, {scores.queries:,} queries", "", headings)
    for name, shown in NAMES.items():
        table.add_row(shown, *_of_each(scores, name))
    return table


def _lengths(report: SummariesReport) -> Table:
    headings = ["tokens", "documents", "queries", "whole\ndocument", f"{_window(report)}\nonly", "difference"]
    table = _table("mean of the three, by length", "\n".join(_remarks(report)), headings)
    for least, below, scores in report.by_length():
        table.add_row(
            f"{least:,} to {below - 1:,}",
            f"{scores.documents:,}",
            f"{scores.queries:,}",
            *_of_each(scores, "overall"),
        )
    return table


def _of_each(scores: Scores, name: str) -> Iterator[str]:
    """One kind of score of the whole documents, of their windows, and the difference."""
    for row, form in ((scores.summary, ".2f"), (scores.windowed, ".2f"), (scores.difference, "+.2f")):
        yield with_interval(row[name], form)


def _remarks(report: SummariesReport) -> Iterator[str]:
    setting, decoding = report.setting, report.setting.decoding
    yield "In brackets: 95 % bootstrap intervals over documents; differences are paired."
    yield "ROUGE is rouge-score's, without a stemmer; the mean is geometric, of ROUGE-1, 2 and L."
    drawn = f"temperature {decoding.temperature}, top-p {decoding.top_p}, seed {decoding.seed}"
    said = "greedy" if decoding.greedy else drawn
    yield f"{said}; at most {decoding.max_new_tokens:,} tokens; {report.seconds:,.1f} s"
    yield (
        f"{setting.model} ({setting.model_type}), segments of {setting.segment_length}, "
        f"{setting.update_rule} rule, {setting.feature_map}, normalization {setting.normalization}, "
        f"local attention {setting.local_attention}; "
        f"{setting.dtype} on {setting.device}"
    )


def _window(report: SummariesReport) -> str:
    which = {"end": "last", "start": "first"}[report.setting.window_at]
    return f"{which} {report.setting.window:,} tokens"


def _table(title: str, caption: str, headings: list[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption or None,
        caption_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for heading in headings:
        table.add_column(heading, justify="right")  # wrapped where a terminal is narrow: no figure is cut
    return table
