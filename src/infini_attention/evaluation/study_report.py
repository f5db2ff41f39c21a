"""What `infini study` shows: a table of answers, one of trainings, a picture; the report has the JSON."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from infini_attention.evaluation.stream_report import require_matplotlib
from infini_attention.evaluation.study import Answer, Arm, StudyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES, MARKERS = ("-", "--", ":", "-."), "os^vDPX*"


def tables(report: StudyReport) -> list[Table]:
    """Exact match by arm, question and length; what the trainings came to; what else there is to say.

    Between them, where others' figures are to stand beside ours, token accuracy in the form of the paper's
    table 3.
    """
    published = [_by_depth(report, name) for name in report.study.ask] if report.study.published else []
    return [_answers(report), *published, _trainings(report), _remarks(report)]


def plot(report: StudyReport, path: Path) -> None:
    """Draw exact match by length into the picture `path`: a panel a question, a line an arm.

    Raises ValueError with the pip command when matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    questions = report.study.ask
    figure = Figure(figsize=(3 + 4.2 * len(questions), 5), layout="constrained")
    panels = figure.subplots(1, len(questions), sharey=True, squeeze=False)[0]
    for axes, (name, question) in zip(panels, questions.items(), strict=True):
        for arm in report.arms:
            _draw(axes, report, arm, name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(question.lengths, map(_length, question.lengths))
        axes.minorticks_off()
        axes.set(title=name, xlabel="tokens", ylim=(-3, 103))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("exact match, %")
    handles, labels = panels[0].get_legend_handles_labels()
    names = ", ".join(report.arms[0].factors)
    figure.legend(handles, labels, title=names, loc="outside center right", frameon=False, handlelength=4)
    figure.suptitle(report.study.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _answers(report: StudyReport) -> Table:
    table = _table(report, f"{report.study.title}: exact match, %")
    cells = [(name, length) for name, question in report.study.ask.items() for length in question.lengths]
    for name, length in cells:
        table.add_column(f"{name}\n{_length(length)}", justify="right")
    for arm in report.arms:
        shares = ([100 * score.exact_match.share for score in report.scores(arm, *cell)] for cell in cells)
        table.add_row(*arm.factors.values(), *(_range(each, ".0f") for each in shares))
    return table


def _by_depth(report: StudyReport, question: str) -> Table:
    """Token accuracy by depth, from start to end, means over seeds; then what others published."""
    table = _table(report, f"{question}: token accuracy by depth of the key, from start to end, %")
    lengths = report.study.ask[question].lengths
    for length in lengths:
        table.add_column(_length(length), justify="right", no_wrap=True)
    for arm in report.arms:
        answers = [report.answers(arm, question, length) for length in lengths]
        table.add_row(*arm.factors.values(), *map(_depths, answers))
    for name, figures in report.study.published.items():
        empty = [""] * (len(report.arms[0].factors) - 1)
        table.add_row(name, *empty, *(figures.get(length, "-") for length in lengths))
    return table


def _depths(answers: Sequence[Answer]) -> str:
    """The means of some seeds' token accuracies, such as 97/99/100."""
    of_seeds = ([100 * score.token_accuracy.share for score in each.by_depth] for each in answers)
    return "/".join(_mean(shares, ".0f") for shares in zip(*of_seeds, strict=True)) or "-"


def _trainings(report: StudyReport) -> Table:
    table = _table(report, "trainings")
    figures = {"loss": ".3f", "gate_mean": ".3f", "gate_max": ".3f", "seconds": ",.0f"}
    for heading in ("loss", "mean gate", "greatest gate", "seconds", "seconds\nof asking"):
        table.add_column(heading, justify="right")
    for arm in report.arms:
        results = report.results_of(arm)
        trained = [result.trained for result in results if result.trained is not None]
        shown = [
            _mean([each[name] for each in trained if name in each], form) for name, form in figures.items()
        ]
        asking = _mean([result.seconds for result in results if result.answers], ",.0f")
        table.add_row(*arm.factors.values(), *shown, asking)
    return table


def _table(report: StudyReport, title: str) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    for factor in report.arms[0].factors:
        table.add_column(factor, no_wrap=True)
    return table


def _remarks(report: StudyReport) -> Table:
    table = Table(box=None, show_header=False)
    if len(report.study.seeds) > 1:
        table.add_row(f"Means of {len(report.study.seeds)} seeds, in brackets the lowest and the highest.")
    table.add_row("Losses and gates are those that were logged last.")
    if report.interrupted:
        table.add_row("The study was interrupted; the same command goes on.")
    for result in report.results:
        if result.failed is not None:
            table.add_row(f"Failed: {result.arm}, seed {result.seed}: {result.failed}")
    return table


def _mean(figures: Sequence[float], form: str) -> str:
    return format(statistics.fmean(figures), form) if figures else "-"


def _range(figures: Sequence[float], form: str) -> str:
    """The mean, with the lowest and the highest in brackets where they differ."""
    lowest, highest = (_mean([end(figures)] if figures else [], form) for end in (min, max))
    return _mean(figures, form) + (f" [{lowest}, {highest}]" if lowest != highest else "")


def _length(tokens: int) -> str:
    """32768 as 32K, 1048576 as 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def _draw(axes: "Axes", report: StudyReport, arm: Arm, question: str) -> None:
    """The mean of the seeds, and each of them as a point; one seed alone has its interval as a band."""
    scores = {
        length: [score.exact_match for score in report.scores(arm, question, length)]
        for length in report.study.ask[question].lengths
    }
    reached = [length for length, shares in scores.items() if shares]
    colour, style, marker = _look(report, arm)
    axes.plot(
        reached,
        [100 * statistics.fmean(each.share for each in scores[length]) for length in reached],
        style,
        color=colour,
        marker=marker,
        markersize=5,
        label=", ".join(arm.factors.values()) or arm.name,
    )
    if len(report.study.seeds) > 1:
        places = [length for length in reached for _ in scores[length]]
        shares = [100 * each.share for length in reached for each in scores[length]]
        axes.plot(places, shares, "o", color=colour, markersize=2.5, alpha=0.6)
        return
    low, high = ([100 * getattr(scores[length][0], end) for length in reached] for end in ("low", "high"))
    axes.fill_between(reached, low, high, color=colour, alpha=0.07, linewidth=0)


def _look(report: StudyReport, arm: Arm) -> tuple[str, str, str]:
    """Colour by the first factor, style and marker by the others."""
    factors = {each.name: tuple(each.factors.values()) for each in report.arms}
    firsts = [*dict.fromkeys(values[:1] for values in factors.values())]
    others = [*dict.fromkeys(values[1:] for values in factors.values())]
    colour, other = firsts.index(factors[arm.name][:1]), others.index(factors[arm.name][1:])
    other += len(others) * (colour // len(COLOURS))  # where colours come again
    return COLOURS[colour % len(COLOURS)], STYLES[other % len(STYLES)], MARKERS[other % len(MARKERS)]
