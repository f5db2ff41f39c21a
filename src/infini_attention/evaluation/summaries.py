"""`infini summaries`: documents of any length are read as streams, summarised, and scored with ROUGE.

Each document is read once, however long it is; every query goes on from the same state. Beside it, as a
control, stands what the same model says who has seen no more than a window of the document (section 4.3 and
Table 4 of the paper, with ROUGE as Lin has defined it in 2004).
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TemperatureLogitsWarper, TopPLogitsWarper

from infini_attention.data.documents import Documents, digest, pinned
from infini_attention.data.summaries import GENERAL, Asked, open_summaries, question_ids, question_text
from infini_attention.data.texts import token_blocks
from infini_attention.evaluation.estimates import Interval, figures_of_sums
from infini_attention.evaluation.passkey import chunk_length
from infini_attention.evaluation.progress import ReadingProgress
from infini_attention.evaluation.result_files import check_same_setting, fingerprint, plain, write_whole
from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.decoder import Decoder
from infini_attention.models.rows import Rows
from infini_attention.provenance import Provenance, provenance

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
OVERALL = ROUGE[:3]  # whose geometric mean is taken
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

WindowAt = Literal["start", "end"]


@dataclass(frozen=True)
class Decoding:
    """How summaries are generated; by default as in the paper.

    Attributes:
        greedy: always the likeliest token; the next two then mean nothing.
        temperature: of the draw, above 0.
        top_p: draw from the likeliest that together have this probability.
        max_new_tokens: of a summary.
        seed: of the draws; those of a summary depend on it, the document's number and the query's alone.
    """

    greedy: bool = False
    temperature: float = 0.5
    top_p: float = 0.95
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0, or greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number above 0 and up to 1")
        for name, least in (("max_new_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}")


@dataclass(frozen=True)
class Setting:
    """What was asked of which model about which documents; figures of the same setting belong together.

    Attributes:
        model: as it was asked for.
        model_type: of its config.
        fingerprint: hexadecimal; changes with any weight, the config and the tokenizer.
        documents: their source.
        source: hexadecimal; changes with the documents.
        columns: `query_column`, `summary_column` and `query` of `open_summaries`.
        prompt: the words around a query.
        window: tokens of a document that the control sees,
        window_at: those at its "start" or its "end".
    """

    model: str
    model_type: str
    fingerprint: str
    segment_length: int
    update_rule: str
    feature_map: str
    normalization: str
    dtype: str
    device: str
    documents: str
    source: str
    columns: dict[str, str | None]
    prompt: str
    decoding: Decoding
    window: int
    window_at: WindowAt
    local_attention: str = "segment"  # as `local_attention_name`; older reports have none


@dataclass(frozen=True)
class Summary:
    """What the model has said, and its ROUGE F1 against what a person has, from 0 to 1."""

    text: str
    rouge: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """A query, what a person has answered, what the model did, and what it did by its window alone."""

    query: str
    reference: str
    summary: Summary
    windowed: Summary


@dataclass(frozen=True)
class SummarizedDocument:
    """One document: its number among those with text, from 0, and how many tokens it has."""

    number: int
    tokens: int
    answers: list[Answer]


@dataclass(frozen=True)
class Scores:
    """F1 in percent over some documents, each with its bootstrap interval over documents.

    Attributes:
        documents: how many.
        queries: in sum; each counts the same.
        summary: by name, the four kinds of ROUGE and "overall", the geometric mean of the first three means.
        windowed: of the control.
        difference: of the two, paired by document.
    """

    documents: int
    queries: int
    summary: dict[str, Interval]
    windowed: dict[str, Interval]
    difference: dict[str, Interval]


@dataclass(frozen=True)
class SummariesReport:
    """All that `infini summaries` shows; `seconds` is the time that reading and writing took."""

    setting: Setting
    provenance: Provenance
    documents: list[SummarizedDocument] = field(default_factory=list)
    seconds: float = 0.0

    def scores(self) -> Scores:
        """Those of all documents."""
        return scores_of(self.documents)

    def by_length(self) -> list[tuple[int, int, Scores]]:
        """For lengths from a power of two up to the next, in tokens: both ends, and the scores."""
        found: dict[int, list[SummarizedDocument]] = {}
        for document in self.documents:
            found.setdefault(document.tokens.bit_length() - 1, []).append(document)
        return [(1 << power, 2 << power, scores_of(found[power])) for power in sorted(found)]

    def to_json(self) -> str:
        """The whole report in one line of JSON, with its scores; null where a number is not finite."""
        by_length = [
            {"least": least, "below": below, **asdict(scores)} for least, below, scores in self.by_length()
        ]
        figures = {"scores": asdict(self.scores()), "by_length": by_length}
        return json.dumps(plain(asdict(self) | figures), allow_nan=False)


def summaries(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    *,
    query_column: str | None = None,
    summary_column: str | None = None,
    query: str = GENERAL,
    chat: bool = False,
    decoding: Decoding = Decoding(),
    window: int | None = None,
    window_at: WindowAt = "end",
    chunk_tokens: int | None = None,
    output: Path | None = None,
) -> SummariesReport:
    """Have a model summarise long documents in answer to queries, and score the summaries with ROUGE.

    A document is read whole, some segments at a time, and once for all its queries. For the control the model
    begins afresh and reads a window of it only. ROUGE is the package rouge-score's, without a stemmer; for
    rougeLsum sentences end with a full stop, a question mark or an exclamation mark before a space.

    Args:
        model: an `infini_*` language model in evaluation mode.
        tokenizer: the model's, a fast one; a summary ends with its end-of-text token, if it has one.
        documents: which ones; those without text or queries are left out.
        query_column: see `infini_attention.data.summaries.open_summaries`.
        summary_column: see there.
        query: see there.
        chat: put queries as `infini ask` does, as turns of the tokenizer's chat template.
        decoding: how summaries are generated.
        window: tokens of a document that the control sees; default half a segment. The other half is for the
            query and the summary, which attention then reads beside all that is left of the document.
        window_at: whether those are the last tokens of the document, at its "end", or the first, at its
            "start".
        chunk_tokens: that go through the model at once; default whole segments, as many as keep the device
            busy. Changes speed and working memory.
        output: a JSON file that is written after every document. If it holds figures of the same setting,
            those are kept and what is missing is read.

    Raises:
        ValueError: a setting that cannot be right, a model in training mode or without a memory, documents
            without queries, an output that holds something else, or rouge-score is not installed.
    """
    window = max(1, model.config.segment_length // 2) if window is None else window
    _check(model, window, window_at, chunk_tokens)
    rouge, documents = rouge_scorer(), pinned(documents)
    columns = {"query_column": query_column, "summary_column": summary_column, "query": query}
    setting = Setting(
        model=model.name_or_path,
        model_type=model.config.model_type,
        fingerprint=fingerprint(model, tokenizer),
        segment_length=model.config.segment_length,
        update_rule=model.config.update_rule,
        feature_map=model.config.feature_map,
        normalization=model.config.normalization,
        local_attention=model.config.local_attention_name,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        documents=documents.source,
        source=digest(documents),
        columns=columns,
        prompt=question_text(tokenizer, "{query}", chat=chat),
        decoding=decoding,
        window=window,
        window_at=window_at,
    )
    report = SummariesReport(setting, provenance())
    if output is not None and output.exists():
        report = _resumed(output, report)
    asked = open_summaries(documents, query_column=query_column, summary_column=summary_column, query=query)
    began, earlier = time.perf_counter(), report.seconds
    with ReadingProgress(documents.source, None) as progress:
        writer = _Writer(model, tokenizer, decoding, chunk_tokens, progress, chat=chat)
        for number, each in _left(asked, report):
            document = _summarized(writer, rouge, setting, number, each)
            seconds = earlier + time.perf_counter() - began
            report = replace(report, documents=[*report.documents, document], seconds=seconds)
            if output is not None:
                write_whole(output, json.dumps(asdict(report)))  # scores take their time: at the end
    if not report.documents:
        raise ValueError(f"{documents.source} holds no document with queries; check the source and the split")
    if output is not None:
        write_whole(output, report.to_json())
    return report


def rouge_scorer() -> Callable[[str, str], dict[str, float]]:
    """Return a function of a reference and a summary that gives the F1 of each kind of ROUGE, from 0 to 1.

    Raises ValueError with the pip command when rouge-score is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ValueError(
            "summaries are scored with rouge-score; install it with: pip install 'infini-attention[eval]'"
        ) from error
    scorer = RougeScorer(ROUGE, use_stemmer=False)

    def score(reference: str, summary: str) -> dict[str, float]:
        # rougeLsum takes a line for a sentence; the others see no difference between a line end and a space.
        lines = [SENTENCE_END.sub("\n", text) for text in (reference, summary)]
        return {name: float(score.fmeasure) for name, score in scorer.score(*lines).items()}

    return score


def scores_of(documents: Sequence[SummarizedDocument]) -> Scores:
    """The scores of some documents."""
    queries = np.array([len(document.answers) for document in documents], float)[:, None]
    sums = np.stack([_sums(document) for document in documents])  # (documents, summary and windowed, ROUGE)
    units = np.concatenate([queries, sums.reshape(len(documents), -1)], axis=1)

    figures = figures_of_sums(units, _percents)
    names = (*ROUGE, "overall")
    summary, windowed, difference = (
        dict(zip(names, figures[start : start + len(names)], strict=True))
        for start in range(0, len(figures), len(names))
    )
    return Scores(len(documents), int(queries.sum()), summary, windowed, difference)


def read_report(path: Path) -> SummariesReport:
    """The report in a file of `infini summaries`; ValueError where it is none."""
    try:
        kept = json.loads(path.read_text())
        setting = kept["setting"] | {"decoding": Decoding(**kept["setting"]["decoding"])}
        return SummariesReport(
            Setting(**setting),
            Provenance(**kept["provenance"]),
            [_document(**each) for each in kept["documents"]],
            float(kept["seconds"]),
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); name a file of infini summaries") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} was not written by infini summaries; name another file") from None


def _document(number: int, tokens: int, answers: list[dict[str, Any]]) -> SummarizedDocument:
    made = [
        Answer(each["query"], each["reference"], Summary(**each["summary"]), Summary(**each["windowed"]))
        for each in answers
    ]
    return SummarizedDocument(number, tokens, made)


def _check(model: Any, window: int, window_at: str, chunk_tokens: int | None) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes answers; call model.eval()")
    InfiniCache(model.config)  # refuses models without a memory, in words
    for name, count in (("window", window), ("chunk_tokens", chunk_tokens)):
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; give at least 1")
    if window_at not in ("start", "end"):
        raise ValueError(f"window_at is {window_at!r}; give start or end")


def _resumed(output: Path, report: SummariesReport) -> SummariesReport:
    """The report with what `output` holds of it."""
    kept = read_report(output)
    check_same_setting(output, asdict(report.setting), asdict(kept.setting))
    return replace(kept, provenance=report.provenance)


def _left(asked: Iterable[Asked], report: SummariesReport) -> Iterator[tuple[int, Asked]]:
    """The documents with queries that are not in the report yet, with their numbers."""
    there = {document.number for document in report.documents}
    return ((number, each) for number, each in enumerate(asked) if each.queries and number not in there)


def _summarized(
    writer: "_Writer",
    rouge: Callable[[str, str], dict[str, float]],
    setting: Setting,
    number: int,
    asked: Asked,
) -> SummarizedDocument:
    """A document's answers, and those of the control, with the same random numbers."""
    ids = writer.tokens(asked.text)
    seen = ids[-setting.window :] if setting.window_at == "end" else ids[: setting.window]
    answers = [
        Answer(query, reference, *(Summary(text, rouge(reference, text)) for text in texts))
        for query, reference, *texts in zip(
            asked.queries,
            asked.summaries,
            writer.summaries(ids, asked.queries, number),
            writer.summaries(seen, asked.queries, number),
            strict=True,
        )
    ]
    return SummarizedDocument(number, len(ids), answers)


class _Writer:
    """A model that reads documents and says what it is asked for."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        chunk_tokens: int | None,
        progress: ReadingProgress,
        *,
        chat: bool,
    ) -> None:
        self._model, self._tokenizer, self._decoding, self._chat = model, tokenizer, decoding, chat
        self._chunk_tokens = chunk_length(model, 1) if chunk_tokens is None else chunk_tokens
        self._progress = progress
        self._decoder: Decoder | None = None

    def tokens(self, text: str) -> Tensor:
        """Those of a document, (tokens,) int64, as a training has them."""
        blocks = [block.ids for block in token_blocks([text], self._tokenizer)]
        return torch.cat([torch.empty(0, dtype=torch.int64), *blocks])

    @torch.inference_mode()
    def summaries(self, ids: Tensor, queries: Sequence[str], number: int) -> list[str]:
        """The answers to all queries about one document, which is read once; `number` is the document's."""
        cache = InfiniCache(self._model.config)
        for chunk in ids.split(self._chunk_tokens):
            self._call(chunk[None], cache)
        questions = [question_ids(self._tokenizer, query, chat=self._chat) for query in queries]
        choose = _chooser(self._decoding, number, len(queries))
        said = self._generated(cache, questions, choose)
        return [text.strip() for text in self._tokenizer.batch_decode(said, skip_special_tokens=True)]

    def _generated(
        self, cache: InfiniCache, questions: list[list[int]], choose: Callable[[Tensor], Tensor]
    ) -> list[list[int]]:
        """The tokens after each question, which all go on from `cache`, up to the end-of-text token."""
        logits, rows = self._asked(cache, questions)
        said: list[list[int]] = [[] for _ in questions]
        fed = dict.fromkeys(range(len(questions)), 0)
        for number in range(self._decoding.max_new_tokens):
            if number:
                logits = rows.step(fed)
                self._progress.advance(len(fed), cache)
            chosen = choose(logits).tolist()
            fed = {row: chosen[row] for row in fed if chosen[row] != self._tokenizer.eos_token_id}
            for row, token in fed.items():
                said[row].append(token)
            if not fed:
                break
        return said

    def _asked(self, cache: InfiniCache, questions: list[list[int]]) -> tuple[Tensor, Rows]:
        """The logits after each question, (questions, vocabulary), and the rows that go on from there."""
        caches = [cache.copy() for _ in questions]
        pairs = zip(questions, caches, strict=True)
        last = torch.cat([self._call(torch.tensor([ids]), own) for ids, own in pairs])
        return self._model.logits_of(last), Rows(self._model, caches, self._decoder_of(len(questions)))

    def _decoder_of(self, rows: int) -> Decoder | None:
        """One of so many rows, the last one if it has them; None where layers have no memory."""
        if self._model.config.layers_without_memory:
            return None
        if self._decoder is None or self._decoder.rows != rows:
            self._decoder = None  # its buffers go before others come
            self._decoder = Decoder(self._model, rows)
        return self._decoder

    def _call(self, ids: Tensor, cache: InfiniCache) -> Tensor:
        """Read on; the last hidden state of each row, (rows, hidden_size)."""
        output = self._model.base_model(ids.to(self._model.device), use_cache=True, **{CACHE_ARGUMENT: cache})
        self._progress.advance(ids.numel(), cache)
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden


def _chooser(decoding: Decoding, document: int, rows: int) -> Callable[[Tensor], Tensor]:
    """What picks the next token of each row, (rows,) int64, by logits (rows, vocabulary).

    A row has random numbers of its own, so that no other row and no interruption changes what it says.
    """
    if decoding.greedy:
        return lambda logits: logits.argmax(dim=-1).cpu()
    warpers = TemperatureLogitsWarper(float(decoding.temperature)), TopPLogitsWarper(float(decoding.top_p))
    randoms = [np.random.default_rng((decoding.seed, document, row)) for row in range(rows)]

    def choose(logits: Tensor) -> Tensor:
        scores = logits.float()
        for warper in warpers:
            scores = warper(None, scores)
        sums = scores.softmax(dim=-1).double().cumsum(dim=-1)
        drawn = torch.tensor([[random.random()] for random in randoms], dtype=sums.dtype, device=sums.device)
        return torch.searchsorted(sums, drawn * sums[:, -1:], right=True)[:, 0].cpu()

    return choose


def _sums(document: SummarizedDocument) -> np.ndarray:
    """Sums over a document's answers, (summary and windowed, ROUGE) fp64."""
    rows = [
        [[each.rouge[name] for name in ROUGE] for each in (a.summary, a.windowed)] for a in document.answers
    ]
    return np.array(rows).sum(axis=0)


def _percents(draws: np.ndarray) -> np.ndarray:
    """Percents by sums (draws, queries and all ROUGE): summary, windowed, difference, each with its overall.

    The result is (draws, 3 times ROUGE and overall).
    """
    means = 100 * (draws[:, 1:] / draws[:, :1]).reshape(len(draws), 2, len(ROUGE))
    overall = means[:, :, : len(OVERALL)].prod(axis=2, keepdims=True) ** (1 / len(OVERALL))
    both = np.concatenate([means, overall], axis=2)
    difference = both[:, :1] - both[:, 1:]
    return np.concatenate([both, difference], axis=1).reshape(len(draws), -1)
