"""What `infini study` shows: a table of answers, one of trainings, a picture; the report has the JSON."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from infini_attention.evaluation.document_perplexity_report import with_interval
from infini_attention.evaluation.estimates import Interval
from infini_attention.evaluation.questions import (
    Answer,
    Cell,
    Measure,
    PasskeyAnswer,
    PasskeyQuestion,
    Question,
    RecallAnswer,
    RecallQuestion,
    short_length,
)
from infini_attention.evaluation.stream_report import require_matplotlib
from infini_attention.evaluation.study import Arm, StudyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES, MARKERS = ("-", "--", ":", "-."), "os^vDPX*<>phdH8"
ABREAST = 4  # panels of a picture in one row


def tables(report: StudyReport) -> list[Table]:
    """Answers by arm and question, a table a measure; what the trainings came to; what else there is to say.

    Between them, where others' figures are to stand beside ours, token accuracy in the form of the paper's
    table 3; and what stands beside the answers, such as controls.
    """
    study = report.study
    names = [name for name, question in study.ask.items() if isinstance(question, PasskeyQuestion)]
    published = [_by_depth(report, name) for name in names] if study.published else []
    measures = dict.fromkeys(question.measure for question in study.ask.values())
    answers = [
        _figures(report, measure, f"{study.title}: {measure.name}", lambda answer: answer.shown)
        for measure in measures
    ]
    beside = [table for measure in measures for table in _beside(report, measure)]
    return [*answers, *published, *beside, _trainings(report), _remarks(report)]


def plot(report: StudyReport, path: Path) -> None:
    """Draw the answers into the picture `path`.

    Exact match of pass keys by length: a panel a question, a line an arm. Recall by bytes of state: a panel a
    cell, a mark an arm. Perplexity and ROUGE: a panel a question, a mark an arm, its control a hollow one.

    Raises ValueError with the pip command when matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels = [
        (question.measure, panel)
        for name, question in report.study.ask.items()
        for panel in _panels(report, name)
    ]
    columns, rows = min(ABREAST, len(panels)), ceil(len(panels) / ABREAST)
    figure = Figure(figsize=(3 + 4.2 * columns, 0.5 + 4.5 * rows), layout="constrained")
    for number, (measure, draw) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw(axes)
        axes.minorticks_off()
        if measure.share:
            axes.set_ylim(-3, 103)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if number % columns == 0 or measure != panels[number - 1][0]:
            axes.set_ylabel(measure.name)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    names = ", ".join(report.arms[0].factors)
    figure.legend(handles, labels, title=names, loc="outside right center", frameon=False, handlelength=4)
    figure.suptitle(report.study.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _figures(
    report: StudyReport, measure: Measure, title: str, figure: Callable[[Answer], Interval | None]
) -> Table:
    """A figure by arm, and by question and cell of one measure."""
    table, cells = _table(report, title), []
    for name, question in _questions(report, measure).items():
        for cell, label in question.columns().items():
            table.add_column(f"{name}\n{label}", justify="right")
            cells.append((name, cell))
    for arm in report.arms:
        of_cells = ([figure(answer) for answer in report.answers(arm, *cell)] for cell in cells)
        shown = ([each for each in of_seeds if each is not None] for of_seeds in of_cells)
        table.add_row(*arm.factors.values(), *(_of_seeds(each, measure) for each in shown))
    return table


def _beside(report: StudyReport, measure: Measure) -> list[Table]:
    """What there is beside the answers to questions of a measure, a table a title."""
    asked = _questions(report, measure)
    answers = [each for result in report.results for each in result.answers if each.question in asked]
    titles = dict.fromkeys(title for answer in answers for title in answer.beside)

    def figure(title: str, answer: Answer) -> Interval | None:
        return answer.beside[title]

    return [
        _figures(report, measure, title, partial(figure, title))
        for title in titles
        if any(figure(title, answer) is not None for answer in answers)
    ]


def _questions(report: StudyReport, measure: Measure) -> dict[str, Question]:
    return {name: question for name, question in report.study.ask.items() if question.measure == measure}


def _by_depth(report: StudyReport, question: str) -> Table:
    """Token accuracy by depth, from start to end, means over seeds; then what others published."""
    table = _table(report, f"{question}: token accuracy by depth of the key, from start to end, %")
    columns = report.study.ask[question].columns()
    for label in columns.values():
        table.add_column(label, justify="right", no_wrap=True)
    for arm in report.arms:
        table.add_row(
            *arm.factors.values(), *(_depths(report.answers(arm, question, cell)) for cell in columns)
        )
    for name, figures in report.study.published.items():
        empty = [""] * (len(report.arms[0].factors) - 1)
        table.add_row(name, *empty, *(figures.get(length, "-") for (length,) in columns))
    return table


def _depths(answers: Sequence[Answer]) -> str:
    """The means of some seeds' token accuracies, such as 97/99/100."""
    of_seeds = (
        [100 * score.token_accuracy.share for score in each.by_depth]
        for each in answers
        if isinstance(each, PasskeyAnswer)
    )
    return "/".join(_mean(shares, ".0f") for shares in zip(*of_seeds, strict=True)) or "-"


def _trainings(report: StudyReport) -> Table:
    table = _table(report, "trainings")
    figures = {"loss": ".3f", "gate_mean": ".3f", "gate_max": ".3f", "seconds": ",.0f"}
    of_arms = {arm.name: report.results_of(arm) for arm in report.arms}
    sizes = {
        name: _state_bytes([answer for result in results for answer in result.answers])
        for name, results in of_arms.items()
    }
    headings = ["loss", "mean gate", "greatest gate", "seconds", "seconds\nof asking"]
    for heading in headings + ["bytes\nof state"] * any(sizes.values()):
        table.add_column(heading, justify="right")
    for arm in report.arms:
        results = of_arms[arm.name]
        trained = [result.trained for result in results if result.trained is not None]
        shown = [
            _mean([each[name] for each in trained if name in each], form) for name, form in figures.items()
        ]
        asking = _mean([result.seconds for result in results if result.answers], ",.0f")
        state = [f"{sizes[arm.name]:,}" if sizes[arm.name] else "-"] * any(sizes.values())
        table.add_row(*arm.factors.values(), *shown, asking, *state)
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
    if not all(question.measure.share for question in report.study.ask.values()):
        table.add_row("Of one seed, in parentheses: 95 % bootstrap intervals over documents.")
    table.add_row("Losses and gates are those that were logged last.")
    if report.interrupted:
        table.add_row("The study was interrupted; the same command goes on.")
    for result in report.results:
        if result.failed is not None:
            table.add_row(f"Failed: {result.arm}, seed {result.seed}: {result.failed}")
    return table


def _mean(figures: Sequence[float], form: str) -> str:
    return format(statistics.fmean(figures), form) if figures else "-"


def _of_seeds(figures: Sequence[Interval], measure: Measure) -> str:
    """The mean, with the lowest and the highest in brackets where they differ; one alone with its interval.

    Intervals of shares, which follow from how many were asked, are left to the picture.
    """
    if len(figures) == 1 and not measure.share:
        return with_interval(figures[0], measure.form)
    values = [each.value for each in figures]
    lowest, highest = (_mean([end(values)] if values else [], measure.form) for end in (min, max))
    return _mean(values, measure.form) + (f" [{lowest}, {highest}]" if lowest != highest else "")


def _panels(report: StudyReport, question: str) -> list[Callable[["Axes"], None]]:
    """What draws a question's panels."""
    asked = report.study.ask[question]
    if isinstance(asked, PasskeyQuestion):
        return [partial(_draw_by_length, report=report, question=question)]
    if isinstance(asked, RecallQuestion):
        cells = asked.columns()
        return [partial(_draw_by_state, report=report, question=question, cell=cell) for cell in cells]
    return [partial(_draw_by_arm, report=report, question=question)]


def _draw_by_length(axes: "Axes", report: StudyReport, question: str) -> None:
    """The mean of the seeds, and each of them as a point; one seed alone has its interval as a band."""
    columns = report.study.ask[question].columns()
    for arm in report.arms:
        shares = {
            length: [answer.shown for answer in report.answers(arm, question, (length,))]
            for (length,) in columns
        }
        shares = {length: of_seeds for length, of_seeds in shares.items() if of_seeds}
        colour, style, marker = _look(report, arm)
        axes.plot(
            [*shares],
            [_mean_value(of_seeds) for of_seeds in shares.values()],
            style,
            color=colour,
            marker=marker,
            markersize=5,
            label=_legend(arm),
        )
        if len(report.study.seeds) > 1:
            for length, of_seeds in shares.items():
                _draw_seeds(axes, length, of_seeds, colour)
            continue
        low, high = ([getattr(of_seeds[0], end) for of_seeds in shares.values()] for end in ("low", "high"))
        axes.fill_between([*shares], low, high, color=colour, alpha=0.07, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks([length for (length,) in columns], [*columns.values()])
    axes.set(title=question, xlabel="tokens")


def _draw_by_state(axes: "Axes", report: StudyReport, question: str, cell: Cell) -> None:
    """A mark an arm, at the bytes of its state."""
    for arm in report.arms:
        answers = report.answers(arm, question, cell)
        _draw_mark(axes, report, arm, _state_bytes(answers), [answer.shown for answer in answers])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: short_length(round(size)))
    axes.set(title=f"{question}: {report.study.ask[question].columns()[cell]}", xlabel="bytes of state")


def _draw_by_arm(axes: "Axes", report: StudyReport, question: str) -> None:
    """A mark an arm, one beside the other, and a hollow one for each control."""
    controls: dict[str, None] = {}
    for place, arm in enumerate(report.arms):
        answers = report.answers(arm, question, ())
        _draw_mark(axes, report, arm, place, [answer.shown for answer in answers])
        for title, control in (each for answer in answers for each in answer.beside.items()):
            if control is not None:
                controls[title] = None
                colour, _, marker = _look(report, arm)
                axes.plot(place, control.value, marker, color=colour, markersize=9, markerfacecolor="none")
    axes.set_xticks([])
    axes.set_xlim(-0.5, len(report.arms) - 0.5)
    axes.set(title=question, xlabel="\n".join(f"hollow: {title}" for title in controls))


def _draw_mark(
    axes: "Axes", report: StudyReport, arm: Arm, place: float, figures: Sequence[Interval]
) -> None:
    """The mean of the seeds, and each of them as a point; one seed alone has its interval as a bar."""
    colour, _, marker = _look(report, arm)
    mean = [_mean_value(figures)] if figures else []
    axes.plot([place] * len(mean), mean, marker, color=colour, markersize=6, label=_legend(arm))
    if len(report.study.seeds) > 1:
        _draw_seeds(axes, place, figures, colour)
    elif figures:
        axes.vlines(place, figures[0].low, figures[0].high, color=colour, alpha=0.5)


def _draw_seeds(axes: "Axes", place: float, figures: Sequence[Interval], colour: str) -> None:
    values = [each.value for each in figures]
    axes.plot([place] * len(values), values, "o", color=colour, markersize=2.5, alpha=0.6)


def _state_bytes(answers: Sequence[Answer]) -> int:
    """The most that a model carries to the end of what it was asked; 0 where nothing is known of that."""
    return max((each.score.state_bytes for each in answers if isinstance(each, RecallAnswer)), default=0)


def _mean_value(figures: Sequence[Interval]) -> float:
    return statistics.fmean(each.value for each in figures)


def _legend(arm: Arm) -> str:
    return ", ".join(arm.factors.values()) or arm.name


def _look(report: StudyReport, arm: Arm) -> tuple[str, str, str]:
    """Colour by the first factor, style and marker by the others."""
    factors = {each.name: tuple(each.factors.values()) for each in report.arms}
    firsts = [*dict.fromkeys(values[:1] for values in factors.values())]
    others = [*dict.fromkeys(values[1:] for values in factors.values())]
    colour, other = firsts.index(factors[arm.name][:1]), others.index(factors[arm.name][1:])
    other += len(others) * (colour // len(COLOURS))  # where colours come again
    return COLOURS[colour % len(COLOURS)], STYLES[other % len(STYLES)], MARKERS[other % len(MARKERS)]
