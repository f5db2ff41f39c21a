"""`infini table lm`: language modelling by several systems, like for like, as in the paper's Table 2.

Results are files of `infini perplexity`. Those of one system on the same documents are its seeds: figures are
of their mean loss, document by document.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from infini_attention.baselines.systems import LOCAL_ONLY
from infini_attention.evaluation.document_perplexity import (
    DocumentLoss,
    Figures,
    PerplexityReport,
    Stretch,
    exponential,
    figures_of,
    read_report,
    stretches_of,
)
from infini_attention.evaluation.estimates import Interval, ratio
from infini_attention.evaluation.result_files import plain

OF_TRAINING = (  # what seeds have in common
    "steps",
    "learning_rate",
    "gate_learning_rate",
    "row_tokens",
    "carried_through",
    "reset_probability",
    "read_again",
    "carried_together",
    "carried_packed",
)
CALLED_OTHERWISE = "call one of them otherwise, as NAME=FILE"  # where two files of a name are no seeds


@dataclass(frozen=True)
class Position:
    """Tokens `start` to `end` - 1 of those `documents` that reach them.

    Attributes:
        difference: see `Cell`; None also where the reference was read with another segment length.
    """

    start: int
    end: int
    documents: int
    perplexity: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Cell:
    """A system on some documents.

    Attributes:
        figures: of the mean loss over seeds, with intervals over documents.
        seeds: token perplexity of each seed by itself.
        difference: of token perplexity to the reference's on the same documents, paired, in percent of it;
            below 0 is better. None for the reference, and where it was not read.
        by_position: the same by position; stretches of N, N, 2N, 4N, ... tokens.
        trained_tokens: that the training predicted; a mean over seeds, as is the next. None where a training
            left nothing.
        trained_seconds: that it took.
        trained_peak_bytes: most memory of a GPU while training, over seeds.
        read_seconds: that reading took, with the memory on and off; a mean.
        read_peak_bytes: most memory while reading, over seeds.
    """

    figures: Figures
    seeds: list[float]
    difference: Interval | None
    by_position: list[Position]
    trained_tokens: float | None
    trained_seconds: float | None
    trained_peak_bytes: float | None
    read_seconds: float
    read_peak_bytes: int


@dataclass(frozen=True)
class Row:
    """A system; one with gates that are open has another row with all of them shut.

    Attributes:
        memory: "on" or "off".
        memory_floats: numbers that it holds at most; None for the memory off, which is no system of its own.
        compression: against a full Memorizing Transformer of the same sizes; None where nothing is held, and
            for the memory off.
        cells: by what the documents are called.
    """

    system: str
    memory: str
    parameters: int
    memory_floats: int | None
    compression: float | None
    cells: dict[str, Cell]

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return self.system if self.memory == "on" else f"{self.system}, memory off"


@dataclass(frozen=True)
class LmTable:
    """All that `infini table lm` shows: `documents` are its columns, `reference` the system compared with."""

    reference: str
    documents: list[str]
    rows: list[Row]

    def to_json(self) -> str:
        """The whole table in one line of JSON; null where a number is not finite."""
        return json.dumps(plain(asdict(self)), allow_nan=False)


def lm_table(
    paths: Sequence[Path], *, reference: str = LOCAL_ONLY, names: Mapping[Path, str] | None = None
) -> LmTable:
    """Set results side by side.

    Args:
        paths: files of `infini perplexity`.
        reference: the system that others are compared with; where it was not read there are no differences.
        names: what the systems of some files are to be called, in place of what these say.

    Raises:
        ValueError: a file of something else; documents of one name that are not the same tokens everywhere;
            one file or model twice; a name for no file; or seeds of different segment lengths or sizes, of
            trainings of different lengths, learning rates or rows, as far as files tell them, or of which
            only some were trained.
    """
    names = names or {}
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"{twice[0]} is given twice; leave one of them out")
    if strange := [path for path in names if path not in paths]:
        raise ValueError(f"names has {strange[0]}, which is not among the files; add it, or leave it out")
    reports = {path: _called(read_report(path), names.get(path)) for path in paths}
    _check(reports)
    documents = [*dict.fromkeys(report.setting.documents for report in reports.values())]
    systems = dict.fromkeys(report.setting.system for report in reports.values())
    rows = []
    for system in systems:
        own = [report for report in reports.values() if report.setting.system == system]
        for memory in own[0].memories:
            against = {name: _of(reports, reference, name) for name in documents}
            rows.append(_row(own, memory, against, is_reference=system == reference and memory == "on"))
    return LmTable(reference, documents, rows)


def paired_difference(documents: Sequence[DocumentLoss], reference: Sequence[DocumentLoss]) -> Interval:
    """How much token perplexity differs from the reference's, in percent of it, over the same documents.

    exp(d) - 1, d being the difference of nats in sum over the number of tokens. The bootstrap draws
    documents, each with both of its losses, so that what makes a document hard for both is no doubt about the
    difference. Raises ValueError where there are not as many.
    """
    pairs = [*zip(documents, reference, strict=True)]
    return _percent([ours.loss().nats - theirs.loss().nats for ours, theirs in pairs], documents)


def _called(report: PerplexityReport, name: str | None) -> PerplexityReport:
    """The report with its system's name replaced by another one, if there is one."""
    return report if name is None else replace(report, setting=replace(report.setting, system=name))


def _of(reports: dict[Path, PerplexityReport], system: str, documents: str) -> list[DocumentLoss]:
    """The mean losses of a system on some documents; none where it was not read."""
    found = [
        report
        for report in reports.values()
        if (report.setting.system, report.setting.documents) == (system, documents)
    ]
    return _mean(found, "on") if found else []


def _row(
    own: list[PerplexityReport], memory: str, against: dict[str, list[DocumentLoss]], *, is_reference: bool
) -> Row:
    held = max(own, key=lambda report: report.memory_floats)
    by_name: dict[str, list[PerplexityReport]] = {}
    for report in own:
        by_name.setdefault(report.setting.documents, []).append(report)
    return Row(
        system=held.setting.system,
        memory=memory,
        parameters=held.setting.parameters,
        memory_floats=held.memory_floats if memory == "on" else None,
        compression=held.compression if memory == "on" else None,
        cells={
            name: _cell(reports, memory, [] if is_reference else against[name])
            for name, reports in by_name.items()
        },
    )


def _cell(reports: list[PerplexityReport], memory: str, reference: list[DocumentLoss]) -> Cell:
    documents = _mean(reports, memory)
    return Cell(
        figures=figures_of([document.loss() for document in documents]),
        seeds=[report.figures(memory).token_perplexity.value for report in reports],
        difference=paired_difference(documents, reference) if reference else None,
        by_position=_positions(documents, reference),
        trained_tokens=_mean_trained(reports, "tokens"),
        trained_seconds=_mean_trained(reports, "seconds"),
        trained_peak_bytes=max(_trained(reports, "peak_memory_bytes"), default=None),
        read_seconds=sum(report.seconds for report in reports) / len(reports),
        read_peak_bytes=max(report.peak_memory_bytes for report in reports),
    )


def _mean(reports: list[PerplexityReport], memory: str) -> list[DocumentLoss]:
    """Every document with the mean of some seeds' losses, in an order that depends on the documents alone."""
    of_seeds = [sorted(report.documents, key=lambda document: document.digest) for report in reports]
    means = []
    for document, *others in zip(*of_seeds, strict=True):
        parts = zip(*(each.by_position for each in (document, *others)), strict=True)
        means.append(replace(document, by_position=[_mean_stretch(part, memory) for part in parts]))
    return means


def _mean_stretch(stretches: Sequence[Stretch], memory: str) -> Stretch:
    nats = sum(stretch.loss(memory).nats for stretch in stretches) / len(stretches)
    return replace(stretches[0], nats=nats, nats_memory_off=None)


def _positions(documents: list[DocumentLoss], reference: list[DocumentLoss]) -> list[Position]:
    ours, theirs = stretches_of(documents), stretches_of(reference)
    alike = [*ours] == [*theirs]
    return [
        Position(
            start=start,
            end=max(each.end for each in stretches),
            documents=len(stretches),
            perplexity=figures_of([each.loss() for each in stretches]).token_perplexity,
            difference=_of_stretches(stretches, theirs[start]) if alike else None,
        )
        for start, stretches in ours.items()
    ]


def _of_stretches(ours: list[Stretch], theirs: list[Stretch]) -> Interval:
    return _percent([one.nats - other.nats for one, other in zip(ours, theirs, strict=True)], ours)


def _percent(nats: list[float], read: Sequence[DocumentLoss] | Sequence[Stretch]) -> Interval:
    """What differences of nats come to in perplexity, in percent."""
    factor = exponential(ratio(nats, [each.loss().tokens for each in read]))
    return Interval(*(100 * (each - 1) for each in (factor.value, factor.low, factor.high)))


def _mean_trained(reports: list[PerplexityReport], name: str) -> float | None:
    found = _trained(reports, name)
    return sum(found) / len(found) if found else None


def _trained(reports: list[PerplexityReport], name: str) -> list[float]:
    """A figure of the trainings that have it."""
    trainings: list[dict[str, Any]] = [report.trained or {} for report in reports]
    return [training[name] for training in trainings if training.get(name) is not None]


def _check(reports: dict[Path, PerplexityReport]) -> None:
    """Raise ValueError where figures would not be of the same documents, or not of several models."""
    seen: dict[tuple[str, str, str], Path] = {}
    first: dict[str, tuple[Path, list[str]]] = {}
    trainings: dict[tuple[str, str], tuple[Path, bool]] = {}
    makings: dict[tuple[str, str, str], tuple[Path, Any]] = {}
    for path, report in reports.items():
        setting = report.setting
        model = setting.system, setting.documents, setting.fingerprint
        if model in seen:
            raise ValueError(f"{seen[model]} and {path} are of the same model; leave one of them out")
        seen[model] = path
        read = sorted(document.digest for document in report.documents)
        other, theirs = first.setdefault(setting.documents, (path, read))
        if read != theirs:
            raise ValueError(
                f"{other} and {path} call their documents {setting.documents!r} and have read different "
                f"tokens ({len(theirs)} documents and {len(read)}, {len({*read} & {*theirs})} alike); let "
                "infini perplexity finish, with the same tokenizer and max_tokens, or give another --name"
            )
        trained = report.trained is not None
        another, theirs_trained = trainings.setdefault((setting.system, setting.documents), (path, trained))
        if theirs_trained != trained:
            raise ValueError(
                f"{another} and {path} are both of {setting.system}, and only one of them has its training "
                f"beside it, so they are no two seeds; {CALLED_OTHERWISE}"
            )
        for (documents, what), ours in _made(report).items():
            another, theirs = makings.setdefault((setting.system, documents, what), (path, ours))
            if theirs != ours:
                raise ValueError(
                    f"{another} and {path} are both of {setting.system}, with {what} {_text(theirs)} and "
                    f"{_text(ours)}, so they are no two seeds; {CALLED_OTHERWISE}"
                )


def _made(report: PerplexityReport) -> dict[tuple[str, str], Any]:
    """What is the same for all seeds of a system on some documents ("" for any), as far as files tell."""
    setting, trained = report.setting, report.trained or {}
    of_documents = {"parameters": setting.parameters} | {name: trained.get(name) for name in OF_TRAINING}
    of_any = {"segment_length": setting.segment_length, "memory_off": setting.memory_off}
    made = {(setting.documents, what): value for what, value in of_documents.items() if value is not None}
    return made | {("", what): value for what, value in of_any.items()}


def _text(value: Any) -> str:
    return str(value) if isinstance(value, bool | str) else f"{value:,}"
