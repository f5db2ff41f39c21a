"""`infini perplexity`: whole documents are read as streams; what predicting them costs, system by system.

Any model with a memory of the past can read: `infini_*` models, with their memory on and off, and baselines.
What it carries goes on from a document's first token to its last, and nothing is read twice for context.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infini_attention.baselines import compression, memory_floats
from infini_attention.baselines.systems import has_open_gates, is_local, system_name
from infini_attention.data.documents import CORPORA, Document, Documents, digest, open_documents
from infini_attention.data.texts import SHAKESPEARE, TokenBlock, first_tokens, token_blocks
from infini_attention.evaluation.estimates import Interval, ratio
from infini_attention.evaluation.passkey import chunk_length
from infini_attention.evaluation.perplexity import Loss, LossReader, PositionSums
from infini_attention.evaluation.progress import ReadingProgress
from infini_attention.evaluation.result_files import check_same_setting, fingerprint, plain, write_whole
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.provenance import Provenance, provenance
from infini_attention.training.checkpoints import SUMMARY

MEMORIES = ("on", "off")


@dataclass(frozen=True)
class Setting:
    """What read which documents; figures of the same setting belong together.

    Attributes:
        model: as it was asked for.
        model_type: of its config.
        system: what it is called in tables.
        fingerprint: hexadecimal; changes with any weight, the config and the tokenizer.
        parameters: how many the model has.
        documents: what they are called in tables.
        source: hexadecimal; changes with the documents.
        max_tokens: read of each document; None for all.
        memory_off: whether they were also read with every gate shut.
    """

    model: str
    model_type: str
    system: str
    fingerprint: str
    parameters: int
    segment_length: int
    dtype: str
    device: str
    documents: str
    source: str
    max_tokens: int | None
    memory_off: bool


@dataclass(frozen=True)
class Stretch:
    """Tokens `start` to `end` - 1 of a document, and what predicting them has cost.

    Attributes:
        tokens: that were predicted: all but a document's first, which has nothing before it.
        words: that begin there; a word is what whitespace separates, as PG19 counts.
        bytes: of the text in UTF-8, from where the first token begins to where the next stretch does.
        nats: negative log-likelihood of the tokens, in sum.
        nats_memory_off: the same with every gate shut; None where that was not read.
    """

    start: int
    end: int
    tokens: int
    words: int
    bytes: int
    nats: float
    nats_memory_off: float | None

    def loss(self, memory: str = "on") -> Loss:
        """The loss with the memory "on" or "off"; ValueError where it was not read with it off."""
        nats = self.nats if memory == "on" else self.nats_memory_off
        if nats is None:
            raise ValueError("the documents were not read with the memory off; there are no figures of it")
        return Loss(nats, self.tokens, self.words, self.bytes)


@dataclass(frozen=True)
class DocumentLoss:
    """One document, read from its beginning.

    Attributes:
        number: among the documents, from 0.
        digest: hexadecimal, of the tokens that were read: where it is the same, so was what was read.
        by_position: stretches of N, N, 2N, 4N, ... tokens, N being the segment length.
    """

    number: int
    digest: str
    by_position: list[Stretch]

    @property
    def length(self) -> int:
        """Tokens that were read."""
        return self.by_position[-1].end

    def loss(self, memory: str = "on") -> Loss:
        """That of the whole document."""
        return sum_of(stretch.loss(memory) for stretch in self.by_position)


@dataclass(frozen=True)
class Figures:
    """Over some documents together, each figure with its bootstrap interval over documents (`ratio`).

    Attributes:
        token_perplexity: exp(nats / tokens).
        word_perplexity: exp(nats / words); inf or NaN where there are too few words.
        bits_per_byte: nats / ln 2 / bytes.
    """

    token_perplexity: Interval
    word_perplexity: Interval
    bits_per_byte: Interval


@dataclass(frozen=True)
class PerplexityReport:
    """All that `infini perplexity` shows.

    Attributes:
        setting: what read what.
        provenance: versions, command and machine.
        trained: the figures of the training that made the model, where they lie beside it, as `infini train`
            leaves them; None elsewhere.
        documents: those that have been read, in the order in which they ended.
        seconds: that reading took, with the memory on and off.
        peak_memory_bytes: most that torch held of the GPU while reading, weights included; on a CPU, most
            that the process held.
        memory_floats: numbers that the system holds of the longest document beside its open segment's, a
            row's in all layers (`baselines.memory_floats`); 0 for local attention alone.
        compression: how many times less that is than a full Memorizing Transformer's of the same sizes with
            65,536 pairs (`baselines.compression`); None where nothing is held.
        whole: whether all documents have been read; older reports do not say.
    """

    setting: Setting
    provenance: Provenance
    trained: dict[str, Any] | None = None
    documents: list[DocumentLoss] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    memory_floats: int = 0
    compression: float | None = None
    whole: bool = False

    @property
    def memories(self) -> Sequence[str]:
        """What was read with: the memory "on", or "on" and "off"."""
        return MEMORIES if self.setting.memory_off else MEMORIES[:1]

    @property
    def tokens(self) -> int:
        """Tokens of all documents that have been read."""
        return sum(document.length for document in self.documents)

    def figures(self, memory: str = "on") -> Figures:
        """Those of all documents."""
        return figures_of([document.loss(memory) for document in self.documents])

    def by_position(self, memory: str = "on") -> list[tuple[int, int, Figures]]:
        """Start and end of each stretch, and its figures over the documents that reach it."""
        return [
            (
                start,
                max(each.end for each in stretches),
                figures_of([each.loss(memory) for each in stretches]),
            )
            for start, stretches in stretches_of(self.documents).items()
        ]

    def to_json(self) -> str:
        """The whole report in one line of JSON, at its end with its figures; null where one is not finite."""
        figures: dict[str, Any] = {}
        if self.whole:  # intervals take long to draw, and this is written after every document
            figures = {memory: asdict(self.figures(memory)) for memory in self.memories}
        return json.dumps(plain(asdict(self) | {"figures": figures}), allow_nan=False)


def document_perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    *,
    name: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    memory_off: bool = True,
    batch_rows: int = 8,
    chunk_tokens: int | None = None,
    output: Path | None = None,
) -> PerplexityReport:
    """Stream whole documents through a model, several side by side, and add up what predicting them costs.

    Every token but a document's first is predicted once, from all before it that the system still knows. No
    special tokens are added. Documents of fewer than two tokens are left out. What is held is the tokens of
    `batch_rows` documents and the states of as many.

    Args:
        model: an `infini_*` language model or a baseline, in evaluation mode.
        tokenizer: the model's, a fast one.
        documents: which ones.
        name: what to call them in tables; default their source.
        system: what to call the model in tables; default by its kind, as `system_name` has it, and what
            its training has said of `gate_init` and `stop_gradient`.
        max_tokens: read of each document at most.
        memory_off: read everything also with every gate shut, where an `infini_*` model has some that are
            open. What other systems hold besides goes on without their gates.
        batch_rows: documents side by side.
        chunk_tokens: of each that go through the model at once; default whole segments, as many as keep the
            device busy. Changes speed and working memory; full attention compares each of them with all
            tokens before.
        output: a JSON file that is written after every document. If it holds figures of the same setting,
            those are kept and what is missing is read.

    Raises:
        ValueError: a setting that cannot be right, a model in training mode or without a memory, documents
            without text, or an output that holds something else.
    """
    _check(model, max_tokens, batch_rows, chunk_tokens)
    trained = _trained(model.name_or_path)
    setting = Setting(
        model=model.name_or_path,
        model_type=model.config.model_type,
        system=_system(model, trained) if system is None else system,
        fingerprint=fingerprint(model, tokenizer),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        segment_length=model.config.segment_length,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        documents=documents.source if name is None else name,
        source=digest(documents),
        max_tokens=max_tokens,
        memory_off=memory_off and isinstance(model.config, InfiniConfigMixin) and has_open_gates(model),
    )
    report = PerplexityReport(setting, provenance(), trained)
    if output is not None and output.exists():
        report = _resumed(output, report)
    read = {document.number for document in report.documents}
    texts = ((number, text) for number, text in enumerate(open_documents(documents)) if number not in read)
    tokens = _with_tokens(texts, tokenizer, max_tokens)
    report = _measured(model, report, tokens, batch_rows, chunk_tokens, output)
    if not report.documents:
        raise ValueError(
            f"{documents.source} holds no document of two tokens; check the source and the split"
        )
    report = replace(report, whole=True)
    if output is not None:
        write_whole(output, report.to_json())
    return report


def evaluation_documents(source: str, split: str | None = None, **settings: Any) -> Documents:
    """The documents of `source`; where it has splits and none is named, those of "test"."""
    if split is None and source in (*CORPORA, SHAKESPEARE):
        split = "test"
    return Documents(source, **settings) if split is None else Documents(source, split=split, **settings)


def read_report(path: Path) -> PerplexityReport:
    """The report in a file of `infini perplexity`; ValueError where it is none."""
    try:
        kept = json.loads(path.read_text())
        kept.pop("figures")
        kept["setting"] = Setting(**kept["setting"])
        kept["provenance"] = Provenance(**kept["provenance"])
        kept["documents"] = [
            DocumentLoss(**each | {"by_position": [Stretch(**part) for part in each["by_position"]]})
            for each in kept["documents"]
        ]
        return PerplexityReport(**kept)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); name a file of infini perplexity") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} was not written by infini perplexity; name another file") from None


def stretches_of(documents: Iterable[DocumentLoss]) -> dict[int, list[Stretch]]:
    """By its start, each stretch of all documents that reach it, positions in their order."""
    found: dict[int, list[Stretch]] = {}
    for document in documents:
        for stretch in document.by_position:
            found.setdefault(stretch.start, []).append(stretch)
    return dict(sorted(found.items()))


def figures_of(losses: Sequence[Loss]) -> Figures:
    """The figures of some documents, or of some of their stretches, by what each has cost."""
    nats = [loss.nats for loss in losses]
    bits = [loss.nats / math.log(2) for loss in losses]
    return Figures(
        exponential(ratio(nats, [loss.tokens for loss in losses])),
        exponential(ratio(nats, [loss.words for loss in losses])),
        ratio(bits, [loss.bytes for loss in losses]),
    )


def sum_of(losses: Iterable[Loss]) -> Loss:
    """The loss of some texts together."""
    rows = [(loss.nats, loss.tokens, loss.words, loss.bytes) for loss in losses]
    nats, *counts = (sum(column) for column in zip(*rows, strict=True))
    return Loss(nats, *map(int, counts))


def exponential(shown: Interval) -> Interval:
    """exp of a figure and of its interval's ends."""
    ends = (math.exp(each) if not each > 709 else math.inf for each in (shown.value, shown.low, shown.high))
    return Interval(*ends)


def _check(model: Any, max_tokens: int | None, batch_rows: int, chunk_tokens: int | None) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes the loss; call model.eval()")
    memory_floats(model.config, 1)  # refuses models without a memory, in words
    counts = {"max_tokens": (max_tokens, 2), "batch_rows": (batch_rows, 1), "chunk_tokens": (chunk_tokens, 1)}
    for name, (count, least) in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name} is {count}; give at least {least}")


def _trained(model: str) -> dict[str, Any] | None:
    """What `infini train` has left beside the folder `model`."""
    summary = Path(model).parent / SUMMARY
    if not Path(model).is_dir() or not summary.is_file():
        return None
    figures: dict[str, Any] = json.loads(summary.read_text())
    return figures


def _system(model: Any, trained: dict[str, Any] | None) -> str:
    """What to call the model: its kind, and how it was trained where that makes another system of it."""
    trained = trained or {}
    names = [system_name(model)]
    if trained.get("gate_init") is not None:
        names.append(f"gates from {trained['gate_init']:g}")
    if trained.get("stop_gradient"):
        names.append("stopped gradient")
    if trained.get("carried_through"):
        ways = [way for way in ("together", "packed") if trained.get(f"carried_{way}")]
        names.append(", ".join([f"carried through {trained['carried_through']}", *ways]))
    if trained.get("reset_probability"):
        names.append(f"reset with probability {trained['reset_probability']:g}")
    if trained.get("read_again") is not None:
        names.append("read again" if trained["read_again"] else "not read again")
    return ", ".join(names)


def _resumed(output: Path, report: PerplexityReport) -> PerplexityReport:
    """The report with what `output` holds of it."""
    kept = read_report(output)
    check_same_setting(output, asdict(report.setting), asdict(kept.setting))
    return replace(kept, provenance=report.provenance, trained=report.trained)


@dataclass(frozen=True)
class _Tokens:
    """A document's tokens, with their words and bytes; its number, and the tokens' digest."""

    number: int
    digest: str
    block: TokenBlock

    def __len__(self) -> int:
        return len(self.block)


def _with_tokens(
    texts: Iterable[tuple[int, Document]], tokenizer: Any, max_tokens: int | None
) -> Iterator[_Tokens]:
    """The tokens of each document that has two."""
    for number, text in texts:
        blocks = [*first_tokens(token_blocks(text.pieces, tokenizer), max_tokens)]
        if sum(map(len, blocks)) >= 2:
            block = TokenBlock.cat(blocks)
            yield _Tokens(number, hashlib.sha256(block.ids.numpy().tobytes()).hexdigest()[:16], block)


def _measured(
    model: Any,
    report: PerplexityReport,
    tokens: Iterator[_Tokens],
    batch_rows: int,
    chunk_tokens: int | None,
    output: Path | None,
) -> PerplexityReport:
    """The report with all documents that were left, written after each."""
    began, earlier = time.perf_counter(), report.seconds
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with ReadingProgress(report.setting.documents, None) as progress:
        while batch := [*islice(tokens, batch_rows)]:
            chunk = chunk_length(model, len(batch)) if chunk_tokens is None else chunk_tokens
            for loss in _losses(model, batch, report.memories, chunk, progress):
                seconds = earlier + time.perf_counter() - began
                peak = max(report.peak_memory_bytes, _peak(model, progress))
                report = replace(
                    report, documents=[*report.documents, loss], seconds=seconds, peak_memory_bytes=peak
                )
                report = _with_sizes(report, model)
                if output is not None:
                    write_whole(output, report.to_json())
    return report


def _with_sizes(report: PerplexityReport, model: Any) -> PerplexityReport:
    """The report with what the system holds of the longest document."""
    if is_local(model):
        return report
    longest = max(document.length for document in report.documents)
    less = compression(model.config, longest)
    return replace(
        report,
        memory_floats=memory_floats(model.config, longest),
        compression=less if math.isfinite(less) else None,
    )


def _peak(model: Any, progress: ReadingProgress) -> int:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    return progress.peak_resident_bytes


def _losses(
    model: Any, batch: list[_Tokens], memories: Sequence[str], chunk: int, progress: ReadingProgress
) -> Iterator[DocumentLoss]:
    """Read documents side by side, the longest first, so that those that end leave the others in place."""
    batch = sorted(batch, key=len, reverse=True)
    readers = [LossReader(model, shut=memory == "off") for memory in memories]
    sums = [PositionSums(model.config.segment_length, columns=len(readers) + 3) for _ in batch]
    rows = len(batch)
    for start in range(0, len(batch[0]), chunk):
        going_on = sum(len(tokens) > start for tokens in batch)
        if going_on < rows:
            rows = going_on
            for reader in readers:
                reader.keep(rows)
        end = min(start + chunk, len(batch[0]))
        ids = _rows(batch[:rows], start, end)
        nats = torch.stack([reader.read(ids) for reader in readers], dim=-1)
        progress.advance(ids.numel(), readers[0].cache)
        for tokens, row, added in zip(batch, nats, sums, strict=False):
            added.add(start, _numbers(tokens.block, row, start, end))
            if len(tokens) <= end:
                yield DocumentLoss(tokens.number, tokens.digest, _stretches(added, len(tokens)))


def _rows(batch: list[_Tokens], start: int, end: int) -> Tensor:
    """Tokens from `start` up to `end` of each document, (rows, tokens); 0 after the end of one."""
    ids = torch.zeros(len(batch), end - start, dtype=torch.int64)
    for row, tokens in zip(ids, batch, strict=True):
        part = tokens.block.ids[start:end]
        row[: len(part)] = part
    return ids


def _numbers(block: TokenBlock, nats: Tensor, start: int, end: int) -> Tensor:
    """What is added up of tokens from `start` up to `end`, or the text's; columns as `_stretches` reads."""
    words, size = block.words[start:end], block.bytes[start:end]
    predicted = torch.ones_like(words)
    if start == 0:
        predicted[0] = 0
    counts = torch.stack([predicted, words, size], dim=1).double()
    return torch.cat([counts, nats[: len(counts)]], dim=1)


def _stretches(sums: PositionSums, length: int) -> list[Stretch]:
    found = []
    for start, end, (tokens, words, size, on, *off) in sums.rows(length):
        counts = int(tokens), int(words), int(size)
        found.append(Stretch(start, end, *counts, nats=on, nats_memory_off=off[0] if off else None))
    return found
