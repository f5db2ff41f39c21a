"""What a study asks the models that it trains: for pass keys, or for associative recall."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from infini_attention.data.associative_recall import AssociativeRecall
from infini_attention.data.texts import open_text
from infini_attention.evaluation.associative_recall import HELD_OUT_SEED, RecallScore, associative_recall
from infini_attention.evaluation.estimates import Proportion
from infini_attention.evaluation.passkey import Score, even_depths, passkey
from infini_attention.models import load_tokenizer
from infini_attention.training.models import segment_length_of
from infini_attention.training.recipe import Recipe

Cell = tuple[int, ...]  # what a question is asked at: a length, or a length and how many pairs


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
    def right(self) -> Proportion:
        """What tables and pictures show first."""
        return self.score.exact_match


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
    def right(self) -> Proportion:
        """What tables and pictures show first."""
        return self.score.accuracy


@dataclass(frozen=True)
class PasskeyQuestion:
    """The settings of `passkey`, `prose` by name and depths by number."""

    measure: ClassVar[str] = "exact match"

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

    measure: ClassVar[str] = "recall"

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


Question = PasskeyQuestion | RecallQuestion
Answer = PasskeyAnswer | RecallAnswer


def short_length(tokens: int) -> str:
    """32768 as 32K, 1048576 as 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"


def _by_depth(report: dict[str, Any], length: int) -> list[Score]:
    return [_score(cell) for cell in report["cells"] if cell["length"] == length]


def _score(cell: dict[str, Any]) -> Score:
    names = [each.name for each in fields(Score)]
    return Score(**{name: cell[name] and Proportion(**cell[name]) for name in names})
