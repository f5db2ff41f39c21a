"""Associative recall (MQAR): how many of a row's pairs a model knows, and in how many bytes of state."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infini_attention.baselines.systems import has_open_gates, is_local, system_name
from infini_attention.data.associative_recall import AssociativeRecall, RecallExample
from infini_attention.evaluation.estimates import Proportion, proportion
from infini_attention.evaluation.result_files import check_same_setting, fingerprint, write_whole
from infini_attention.models import memory_off
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.loss import IGNORED
from infini_attention.ops import MemoryState
from infini_attention.provenance import Provenance, provenance

SHARES = ("accuracy", "control", "rewritten", "old")
HELD_OUT_SEED = 1_000_000  # by default, so that nothing is asked that was trained on


@dataclass(frozen=True)
class Setting:
    """What was asked of which model; figures of the same setting belong together.

    Attributes:
        model: as it was asked for.
        system: what it is, see `baselines.systems.system_name`.
        fingerprint: hexadecimal; changes with any weight and the config.
        grid: cells, each tokens in a row and pairs to know.
        examples: rows of each cell.
    """

    model: str
    system: str
    fingerprint: str
    segment_length: int
    dtype: str
    device: str
    grid: list[list[int]]
    examples: int
    vocab_size: int
    power_a: float
    across_segments: bool
    rewrites: float
    seed: int


@dataclass(frozen=True)
class RecallScore:
    """Shares of the keys asked in one cell, each with Wilson's 95 % interval over rows.

    Keys of one row are not independent; an interval over rows is rather too wide than too narrow.

    Attributes:
        length: tokens in a row.
        pairs: to know.
        state_bytes: that the model carries to a row's last token, in all layers; see `state_bytes`.
        accuracy: keys whose value is the likeliest token.
        control: the same with every gate shut; None where there are none that are open.
        rewritten: keys that were told anew whose newest value is the likeliest; None where there are none.
        old: of these, keys to which the value is given that they had before.
    """

    length: int
    pairs: int
    state_bytes: int
    accuracy: Proportion
    control: Proportion | None
    rewritten: Proportion | None
    old: Proportion | None

    @classmethod
    def of(cls, figures: dict[str, Any]) -> "RecallScore":
        """A score as a report's JSON has it."""
        shares = {name: figures[name] and Proportion(**figures[name]) for name in SHARES}
        return cls(**figures | shares)


@dataclass(frozen=True)
class RecallReport:
    """What came of a model; `seconds` is the time that it took."""

    setting: Setting
    provenance: Provenance
    scores: list[RecallScore]
    seconds: float

    def to_json(self) -> str:
        """The whole report in one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)


def associative_recall(
    model: Any,
    *,
    grid: Sequence[Sequence[int]],
    examples: int = 1000,
    power_a: float = 0.01,
    across_segments: bool = False,
    rewrites: float = 0.0,
    seed: int = HELD_OUT_SEED,
    batch_rows: int = 64,
    output: Path | None = None,
) -> RecallReport:
    """Ask for the values of all keys in rows of `data.associative_recall`, with the memory on and off.

    The vocabulary is the model's.

    Args:
        model: an `infini_*` language model or a baseline, in evaluation mode.
        grid: cells, each tokens in a row and pairs to know.
        examples: rows of each cell.
        power_a: 1 asks anywhere, near 0 mostly soon after the pairs.
        across_segments: every key is asked in a later segment of the model than it was told in.
        rewrites: share of the keys that are told a second time, with another value.
        seed: of the rows; another one than that of the training.
        batch_rows: rows that are read side by side.
        output: a JSON file for the report. If it holds one of the same setting, that is what is returned.

    Raises:
        ValueError: a setting that cannot be right, a model in training mode, or an output that holds
            something else.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes answers; call model.eval()")
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; give at least 1")
    cells = [(length, pairs) for length, pairs in grid]
    task = AssociativeRecall(
        examples,
        grid=cells,
        vocab_size=model.config.vocab_size,
        power_a=power_a,
        segment_length=model.config.segment_length if across_segments else None,
        rewrites=rewrites,
        seed=seed,
    )
    setting = Setting(
        model=model.name_or_path,
        system=system_name(model),
        fingerprint=fingerprint(model),
        segment_length=model.config.segment_length,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        grid=[[*cell] for cell in cells],
        examples=examples,
        vocab_size=model.config.vocab_size,
        power_a=power_a,
        across_segments=across_segments,
        rewrites=rewrites,
        seed=seed,
    )
    if output is not None and output.exists():
        return _kept(output, setting)
    began = time.perf_counter()
    scores = [_score(model, task, *cell, batch_rows) for cell in cells]
    report = RecallReport(setting, provenance(), scores, time.perf_counter() - began)
    if output is not None:
        write_whole(output, report.to_json())
    return report


@torch.inference_mode()
def state_bytes(model: Any, length: int) -> int:
    """Bytes that a model carries from token to token of one row, as it is held before token `length`.

    All that its cache has: memories and the open segment's sums for them in fp32, and what attention still
    sees, in the model's dtype. Where `length` ends a segment this is the most that there is. Memories that
    gates shut off for good do not count.
    """
    ids = torch.zeros(1, length - 1, dtype=torch.int64, device=model.device)
    cache = model.model.cache_class(model.config)
    model.base_model(ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    unused = sum(map(_memory_bytes, cache.layers)) if is_local(model) else 0
    size: int = cache.nbytes
    return size - unused


def _memory_bytes(layer: Any) -> int:
    """Of the memory in a layer of an InfiniCache, its sums and those of the open segment."""
    state = getattr(layer, "state", None)
    if not isinstance(state, MemoryState):
        return 0
    sums = state.memory, state.normalizer, state.pending_memory, state.pending_normalizer
    return sum(tensor.nbytes for tensor in sums)


def _score(model: Any, task: AssociativeRecall, length: int, pairs: int, batch_rows: int) -> RecallScore:
    rows = [task.example(number, length, pairs) for number in range(len(task))]
    inputs, labels, old_labels = (
        torch.stack([getattr(row, column.name) for row in rows]) for column in fields(RecallExample)
    )
    asked, told_anew = labels != IGNORED, old_labels != IGNORED
    answers, control = _answers(model, inputs, asked, batch_rows), None
    if has_open_gates(model):
        with memory_off(model):
            control = _share(_answers(model, inputs, asked, batch_rows) == labels, asked)
    accuracy = _share(answers == labels, asked)
    assert accuracy is not None
    return RecallScore(
        length=length,
        pairs=pairs,
        state_bytes=state_bytes(model, length),
        accuracy=accuracy,
        control=control,
        rewritten=_share(answers == labels, told_anew),
        old=_share(answers == old_labels, told_anew),
    )


@torch.inference_mode()
def _answers(model: Any, inputs: Tensor, asked: Tensor, batch_rows: int) -> Tensor:
    """The likeliest token after each place that is asked, (rows, length) int64; -100 elsewhere."""
    answers = torch.full_like(inputs, IGNORED)
    for rows in torch.arange(len(inputs)).split(batch_rows):
        hidden = model.base_model(inputs[rows].to(model.device), use_cache=False).last_hidden_state
        logits = model.logits_of(hidden[asked[rows].to(hidden.device)])
        answers[rows] = answers[rows].masked_scatter(asked[rows], logits.argmax(dim=-1).cpu())
    return answers


def _share(right: Tensor, asked: Tensor) -> Proportion | None:
    """Of the places that are asked, row by row, those that are right; None where none are."""
    if not asked.any():
        return None
    return proportion(((right & asked).sum(dim=1) / asked.sum(dim=1)).tolist())


def _kept(output: Path, setting: Setting) -> RecallReport:
    """The report in `output`."""
    try:
        kept = json.loads(output.read_text())
        theirs = dict(kept["setting"])
        scores = [RecallScore.of(each) for each in kept["scores"]]
        report = RecallReport(setting, Provenance(**kept["provenance"]), scores, float(kept["seconds"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{output} holds no report of associative recall; name another file, or delete it"
        ) from None
    check_same_setting(output, asdict(setting), theirs)
    return report
