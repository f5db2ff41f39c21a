"""What a study asks the models that it trains: pass keys, associative recall, perplexity or summaries."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from infini_attention.data.associative_recall import AssociativeRecall
from infini_attention.data.documents import Documents, digest
from infini_attention.data.summaries import GENERAL
from infini_attention.data.texts import open_text
from infini_attention.evaluation.associative_recall import HELD_OUT_SEED, RecallScore, associative_recall
from infini_attention.evaluation.document_perplexity import document_perplexity
from infini_attention.evaluation.estimates import Interval, Proportion
from infini_attention.evaluation.passkey import Score, even_depths, passkey
from infini_attention.evaluation.summaries import Decoding, WindowAt, summaries
from infini_attention.models import load_tokenizer
from infini_attention.training.models import segment_length_of
from infini_attention.training.recipe import Recipe

Cell = tuple[int, ...]  # what a question is asked at: a length, a length and how many pairs, or nothing


@dataclass(frozen=True)
class Measure:
    """What is shown first of a question's answers.

    Attributes:
        name: with its unit, as tables and pictures call it.
        form: of its figures in tables.
        share: whether it is a share of what was asked: pictures show 0 to 100 %.
    """

    name: str
    form: str = ".0f"
    share: bool = True


@dataclass(frozen=True)
class PasskeyAnswer:
    """How a model answered a question at one length, at all depths and at each of them."""

    question: str
    length: int
    score: Score
    by_depth: list[Score]

    @property
    def cell(self) -> Cell:
        """What it was asked at."""
        return (self.length,)

    @property
    def shown(self) -> Interval:
        """What tables and pictures show first, in the unit of the question's measure."""
        return _percent(self.score.exact_match)

    @property
    def beside(self) -> dict[str, Interval | None]:
        """What has tables of its own, by title; None where it was not measured."""
        return {}


@dataclass(frozen=True)
class RecallAnswer:
    """How a model answered a question in one cell of the grid."""

    question: str
    score: RecallScore

    @property
    def cell(self) -> Cell:
        """What it was asked at."""
        return (self.score.length, self.score.pairs)

    @property
    def shown(self) -> Interval:
        """What tables and pictures show first, in the unit of the question's measure."""
        return _percent(self.score.accuracy)

    @property
    def beside(self) -> dict[str, Interval | None]:
        """What has tables of its own, by title; None where it was not measured."""
        shares = {
            "recall with every gate shut, %": self.score.control,
            "recall of keys told anew, %": self.score.rewritten,
            "keys told anew that are answered by their old value, %": self.score.old,
        }
        return {title: None if share is None else _percent(share) for title, share in shares.items()}


@dataclass(frozen=True)
class DocumentsAnswer:
    """What came of a question about whole documents: what is shown first, and beside it by title."""

    cell: ClassVar[Cell] = ()

    question: str
    shown: Interval
    beside: dict[str, Interval | None]


@dataclass(frozen=True)
class PasskeyQuestion:
    """The settings of `passkey`, `prose` by name and depths by number."""

    measure: ClassVar[Measure] = Measure("exact match, %")

    variant: str = "paper"
    lengths: list[int] = field(default_factory=lambda: [32_768])
    depths: int = 11
    samples: int = 10
    exact_lengths: bool = False
    keys: int = 1
    rewrites: int = 0
    prose: str | None = None
    seed: int = 0
    batch_rows: int = 32

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError where a model of the recipe could not be asked."""
        even_depths(self.depths)
        if recipe.data.makes_tokens:
            raise ValueError("pass keys are asked for, and the recipe's data has no text; ask with a grid")

    def asked(self) -> dict[str, Any]:
        """What decides the answers, as the setting of a `PasskeyReport` has it."""
        prose = None if self.prose is None else Path(self.prose).name
        settings = asdict(self) | {"depths": even_depths(self.depths), "prose": prose}
        del settings["batch_rows"]
        return settings

    def ask(self, model: Any, folder: str, output: Path) -> None:
        """Have a model, whose folder has its tokenizer, write its report into the file `output`."""
        prose = None if self.prose is None else open_text(self.prose)
        settings = asdict(self) | {"depths": even_depths(self.depths), "prose": prose}
        passkey(model, load_tokenizer(folder), **settings, output=output)

    def is_whole(self, report: dict[str, Any]) -> bool:
        """Whether a report has all answers."""
        return len(report["outcomes"]) == len(self.lengths) * self.depths * self.samples

    def columns(self) -> dict[Cell, str]:
        """What each cell is called."""
        return {(length,): short_length(length) for length in self.lengths}

    def answers(self, name: str, report: dict[str, Any]) -> list[PasskeyAnswer]:
        """Those in a report, by length."""
        return [
            PasskeyAnswer(name, whole["length"], _score(whole), _by_depth(report, whole["length"]))
            for whole in report["by_length"]
        ]


@dataclass(frozen=True)
class RecallQuestion:
    """The settings of `associative_recall`."""

    measure: ClassVar[Measure] = Measure("recall, %")

    grid: list[tuple[int, int]]
    examples: int = 1000
    power_a: float = 0.01
    across_segments: bool = False
    rewrites: float = 0.0
    seed: int = HELD_OUT_SEED
    batch_rows: int = 64

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError where a model of the recipe could not be asked."""
        trained = recipe.data.associative_recall
        if trained is None:
            raise ValueError("a grid is asked for, and the recipe has no data.associative_recall; set it")
        AssociativeRecall(
            self.examples,
            grid=self.grid,
            vocab_size=trained.vocab_size,
            power_a=self.power_a,
            segment_length=segment_length_of(recipe.model) if self.across_segments else None,
            rewrites=self.rewrites,
        )

    def asked(self) -> dict[str, Any]:
        """What decides the answers, as the setting of a `RecallReport` has it."""
        settings = asdict(self) | {"grid": [[*cell] for cell in self.grid]}
        del settings["batch_rows"]
        return settings

    def ask(self, model: Any, folder: str, output: Path) -> None:
        """Have a model write its report into the file `output`."""
        associative_recall(model, **asdict(self), output=output)

    def is_whole(self, report: dict[str, Any]) -> bool:
        """Whether a report has all answers: it is written when it has."""
        return True

    def columns(self) -> dict[Cell, str]:
        """What each cell is called."""
        return {(length, pairs): f"{pairs} in {short_length(length)}" for length, pairs in self.grid}

    def answers(self, name: str, report: dict[str, Any]) -> list[RecallAnswer]:
        """Those in a report, by cell."""
        return [RecallAnswer(name, RecallScore.of(each)) for each in report["scores"]]


@dataclass(frozen=True)
class PerplexityQuestion:
    """The settings of `document_perplexity`; the documents are those that perplexity is of."""

    measure: ClassVar[Measure] = Measure("token perplexity", ",.2f", share=False)

    perplexity_of: Documents
    max_tokens: int | None = None
    batch_rows: int = 8

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError where a model of the recipe could not be asked, or has learnt the documents."""
        _check_documents(self.perplexity_of, recipe)

    def asked(self) -> dict[str, Any]:
        """What decides the answers, as the setting of a `PerplexityReport` has it."""
        return {"source": digest(self.perplexity_of), "max_tokens": self.max_tokens}

    def ask(self, model: Any, folder: str, output: Path) -> None:
        """Have a model, whose folder has its tokenizer, write its report into the file `output`."""
        document_perplexity(
            model,
            load_tokenizer(folder),
            self.perplexity_of,
            max_tokens=self.max_tokens,
            batch_rows=self.batch_rows,
            output=output,
        )

    def is_whole(self, report: dict[str, Any]) -> bool:
        """Whether a report has all documents."""
        return bool(report["whole"])

    def columns(self) -> dict[Cell, str]:
        """What the documents are called."""
        read = "" if self.max_tokens is None else f", {short_length(self.max_tokens)} of each"
        return {(): f"{Path(self.perplexity_of.source).name}{read}"}

    def answers(self, name: str, report: dict[str, Any]) -> list[DocumentsAnswer]:
        """That of a whole report."""
        if not self.is_whole(report):
            return []
        on, off = (
            figures and _interval(figures["token_perplexity"])
            for figures in (report["figures"]["on"], report["figures"].get("off"))
        )
        return [DocumentsAnswer(name, on, {"token perplexity with every gate shut": off})]


@dataclass(frozen=True)
class SummariesQuestion:
    """The settings of `summaries`; the documents are those that summaries are of."""

    measure: ClassVar[Measure] = Measure("ROUGE geometric mean, %", ".2f", share=False)

    summaries_of: Documents
    query_column: str | None = None
    summary_column: str | None = None
    query: str = GENERAL
    decoding: Decoding = field(default_factory=Decoding)
    window: int | None = None
    window_at: WindowAt = "end"

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError where a model of the recipe could not be asked, or has learnt the documents."""
        _check_documents(self.summaries_of, recipe)
        if recipe.model.baseline is not None:
            raise ValueError(
                f"summaries are asked for, and model.baseline is {recipe.model.baseline!r}; leave it out"
            )

    def asked(self) -> dict[str, Any]:
        """What decides the answers, as the setting of a `SummariesReport` has it."""
        columns = {name: getattr(self, name) for name in ("query_column", "summary_column", "query")}
        window = {} if self.window is None else {"window": self.window}  # else it depends on the model
        return window | {
            "source": digest(self.summaries_of),
            "columns": columns,
            "decoding": asdict(self.decoding),
            "window_at": self.window_at,
        }

    def ask(self, model: Any, folder: str, output: Path) -> None:
        """Have a model, whose folder has its tokenizer, write its report into the file `output`."""
        settings = {each.name: getattr(self, each.name) for each in fields(self)}
        documents = settings.pop("summaries_of")
        summaries(model, load_tokenizer(folder), documents, **settings, output=output)

    def is_whole(self, report: dict[str, Any]) -> bool:
        """Whether a report has all documents: it has scores when it has."""
        return "scores" in report

    def columns(self) -> dict[Cell, str]:
        """What the documents are called."""
        return {(): Path(self.summaries_of.source).name}

    def answers(self, name: str, report: dict[str, Any]) -> list[DocumentsAnswer]:
        """That of a whole report."""
        if not self.is_whole(report):
            return []
        whole, windowed = (_interval(report["scores"][name]["overall"]) for name in ("summary", "windowed"))
        return [DocumentsAnswer(name, whole, {"ROUGE geometric mean by a window alone, %": windowed})]


Question = PasskeyQuestion | RecallQuestion | PerplexityQuestion | SummariesQuestion
Answer = PasskeyAnswer | RecallAnswer | DocumentsAnswer


def short_length(tokens: int) -> str:
    """32768 as 32K, 1048576 as 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def _check_documents(documents: Documents, recipe: Recipe) -> None:
    """Raise ValueError where the recipe's models know no text, or are trained on these very documents."""
    data = recipe.data
    if data.makes_tokens:
        raise ValueError(f"{documents.source} is asked about, and the recipe's data has no text")
    trained = [data.documents, *data.more_documents, data.summaries and data.summaries.documents]
    if replace(documents, max_documents=None) in [
        each and replace(each, max_documents=None) for each in trained
    ]:
        raise ValueError(f"{documents.source} is asked about, and trained on; name others, or another split")


def _percent(share: Proportion) -> Interval:
    return Interval(*(100 * each for each in (share.share, share.low, share.high)))


def _interval(figure: dict[str, float | None]) -> Interval:
    """A figure as JSON has it, which knows no NaN."""
    return Interval(**{name: math.nan if value is None else value for name, value in figure.items()})


def _by_depth(report: dict[str, Any], length: int) -> list[Score]:
    return [_score(cell) for cell in report["cells"] if cell["length"] == length]


def _score(cell: dict[str, Any]) -> Score:
    names = [each.name for each in fields(Score)]
    return Score(**{name: cell[name] and Proportion(**cell[name]) for name in names})
