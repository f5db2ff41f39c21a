"""`infini passkey`: whether a model still knows a number that it was told up to millions of tokens ago."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infini_attention.data.passkey import Draft, PasskeyPrompts, Prompt
from infini_attention.data.texts import Text, ids_of
from infini_attention.evaluation.estimates import Proportion, proportion
from infini_attention.evaluation.memory_reset import check_has_memory, with_memory_reset
from infini_attention.evaluation.progress import ReadingProgress
from infini_attention.evaluation.result_files import check_same_setting, fingerprint, write_whole
from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.provenance import Provenance, provenance

GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly however many there are
CALL_NUMBERS = 1 << 25  # on a GPU: tokens that go through the model at once, of all rows, times its width
CALL_TOKENS = 1 << 13  # elsewhere

Cell = tuple[int, float, int]  # length, depth, number of the sample


@dataclass(frozen=True)
class Setting:
    """What was asked of which model; figures of the same setting belong together.

    Attributes:
        model: as it was asked for.
        model_type: of its config.
        fingerprint: hexadecimal; changes with any weight, the config, the tokenizer and the prose.
        prose: name of the text around the keys of `varied`.
        lengths: tokens of the prompts, question included.
        depths: where the key that is asked for stands, shares from 0 to 1.
        samples: prompts for each length and depth.
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
    variant: str
    keys: int
    rewrites: int
    prose: str | None
    lengths: list[int]
    depths: list[float]
    samples: int
    exact_lengths: bool
    seed: int
    local_attention: str = "segment"  # as `local_attention_name`; older reports have none


@dataclass(frozen=True)
class Outcome:
    """How one prompt was answered.

    Attributes:
        tokens: of the answer.
        right: of them, each predicted after the right ones before it.
        right_without_memory: the same where the memory was reset before the question.
        in_reach: whether the sentence with the answer ends in the segment that the question begins in, or
            later: attention can then do without the memory.
    """

    length: int
    depth: float
    sample: int
    tokens: int
    right: int
    right_without_memory: int
    in_reach: bool


@dataclass(frozen=True)
class Score:
    """Shares over some prompts, each with Wilson's 95 % interval over prompts.

    Attributes:
        exact_match: prompts of which the whole answer is right.
        token_accuracy: answers' tokens that are right.
        control: exact match with the memory reset before the question, of the prompts whose key is out of
            attention's reach; None where there are none.
    """

    exact_match: Proportion
    token_accuracy: Proportion
    control: Proportion | None


@dataclass(frozen=True)
class PasskeyReport:
    """All that `infini passkey` shows; `seconds` is the time that reading took."""

    setting: Setting
    provenance: Provenance
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def score(self, length: int, depth: float | None = None) -> Score:
        """The score at a length, at one depth or at all; ValueError where nothing has been asked yet."""
        chosen = [each for each in self.outcomes if each.length == length and depth in (None, each.depth)]
        control = [float(each.right_without_memory == each.tokens) for each in chosen if not each.in_reach]
        return Score(
            exact_match=proportion([float(each.right == each.tokens) for each in chosen]),
            token_accuracy=proportion([each.right / each.tokens for each in chosen]),
            control=proportion(control) if control else None,
        )

    def to_json(self) -> str:
        """The whole report in one line of JSON, with the scores of lengths asked at every depth."""
        setting, asked = self.setting, {(each.length, each.depth) for each in self.outcomes}
        lengths = [
            length for length in setting.lengths if all((length, depth) in asked for depth in setting.depths)
        ]
        by_length = [{"length": length, **asdict(self.score(length))} for length in lengths]
        cells = [
            {"length": length, "depth": depth, **asdict(self.score(length, depth))}
            for length in lengths
            for depth in setting.depths
        ]
        return json.dumps(asdict(self) | {"by_length": by_length, "cells": cells}, allow_nan=False)


def passkey(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    variant: str = "paper",
    lengths: Sequence[int] = (32_768,),
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    samples: int = 10,
    exact_lengths: bool = False,
    keys: int = 1,
    rewrites: int = 0,
    prose: Text | None = None,
    seed: int = 0,
    batch_rows: int = 32,
    chunk_tokens: int | None = None,
    output: Path | None = None,
) -> PasskeyReport:
    """Ask a model for pass keys that stand in prompts of any length (section 4.2 of the paper).

    A prompt is made while it is read, some segments at a time, so that nothing grows with its length. The
    answer's tokens are given after the question, all but the last. Greedy decoding finds the whole answer
    exactly if each of them is the likeliest after those before it, so the exact match is decoding's. Each
    question is asked once more as a control, from the same state with its memory emptied; what attention
    sees of the open segment stays, and with it what that segment had read from the memory.

    The n-th prompt has the same key in the same words at every length.

    Args:
        model: an `infini_*` language model in evaluation mode.
        tokenizer: the model's, a fast one.
        variant: of the prompt; see `infini_attention.data.passkey.VARIANTS`.
        lengths: tokens of a prompt, question included.
        depths: shares of what stands around the key that come before it.
        samples: prompts for each length and depth.
        exact_lengths: every prompt has exactly its length, so that all of a length end at the same place of a
            segment. Otherwise each is shorter by another part of a segment: a question that ends with its
            segment, as at every multiple of the segment length, leaves the answer to a segment in which
            nothing can be seen, the hardest place there is.
        keys: that are told in a prompt, one of which is asked for.
        rewrites: how often that one is told before with another value.
        prose: the text around the keys, for varied.
        seed: of all that is random.
        batch_rows: prompts that are read side by side.
        chunk_tokens: of each prompt that go through the model at once; default whole segments, together some
            8,192 tokens, and on a GPU the more the narrower the model is. Changes speed and working memory.
        output: a JSON file that is written after every batch. If it holds figures of the same setting, those
            are kept and what is missing is asked.

    Raises:
        ValueError: a setting that cannot be right, lengths without room for the keys, a model in training
            mode or without memories, or an output that holds something else.
    """
    _check(model, lengths, depths, samples, batch_rows, chunk_tokens)
    ids = None if prose is None else tokens_of(prose, tokenizer)
    prompts = PasskeyPrompts(tokenizer, variant, prose=ids, seed=seed)
    drafts = [prompts.draft(n, keys=keys, rewrites=rewrites) for n in range(samples * len(depths))]
    _check_prompts(min(lengths), depths, drafts)
    setting = Setting(
        model=model.name_or_path,
        model_type=model.config.model_type,
        fingerprint=fingerprint(model, tokenizer, ids),
        segment_length=model.config.segment_length,
        update_rule=model.config.update_rule,
        feature_map=model.config.feature_map,
        normalization=model.config.normalization,
        local_attention=model.config.local_attention_name,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        variant=variant,
        keys=keys,
        rewrites=rewrites,
        prose=None if prose is None else prose.name,
        lengths=[*lengths],
        depths=[*depths],
        samples=samples,
        exact_lengths=exact_lengths,
        seed=seed,
    )
    report = PasskeyReport(setting, provenance())
    if output is not None and output.exists():
        report = _resumed(output, report)
    left = _unasked(report)
    began, earlier = time.perf_counter(), report.seconds
    with ReadingProgress(variant, sum(length for length, _, _ in left)) as progress:
        for batch in _batches(left, batch_rows):
            asked = [
                _prompt(drafts[sample * len(depths) + depths.index(depth)], setting, (length, depth, sample))
                for length, depth, sample in batch
            ]
            outcomes = [*report.outcomes, *_outcomes(model, batch, asked, chunk_tokens, progress)]
            seconds = earlier + time.perf_counter() - began
            report = replace(report, outcomes=outcomes, seconds=seconds)
            if output is not None:
                write_whole(output, report.to_json())
    return report


def chunk_length(model: Any, rows: int) -> int:
    """Tokens of each of so many rows to read at once: whole segments, as many as keep the device busy."""
    at_once = CALL_NUMBERS // model.config.hidden_size if model.device.type == "cuda" else CALL_TOKENS
    segment: int = model.config.segment_length
    return max(1, at_once // (rows * segment)) * segment


def even_depths(count: int) -> list[float]:
    """`count` depths at equal distances from 0 to 1; ValueError for fewer than 2."""
    if count < 2:
        raise ValueError(f"depths is {count}; give at least 2, the first and the last place")
    return [number / (count - 1) for number in range(count)]


def _prompt(draft: Draft, setting: Setting, cell: Cell) -> Prompt:
    """The prompt of a cell, shorter by less than a segment unless lengths are exact."""
    length, depth, sample = cell
    unused = 0
    if not setting.exact_lengths:
        room = min(setting.segment_length, length - draft.shortest + 1)
        unused = int((sample + 0.5) * GOLDEN % 1 * room)
    return draft.prompt(length=length - unused, depth=depth)


def _check(
    model: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    batch_rows: int,
    chunk_tokens: int | None,
) -> None:
    check_has_memory(model)
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes answers; call model.eval()")
    for name, values in (("lengths", lengths), ("depths", depths)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} are {[*values]}; give at least one, and each once")
    counts = {"samples": samples, "batch_rows": batch_rows, "chunk_tokens": chunk_tokens}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; give at least 1")


def _check_prompts(length: int, depths: Sequence[float], drafts: list[Draft]) -> None:
    """Raise ValueError before the first reading where a prompt would not fit, or a depth is none."""
    longest = max(drafts, key=lambda draft: draft.shortest)
    for depth in depths:
        longest.prompt(length=length, depth=depth)


def tokens_of(text: Text, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """A text's tokens, (tokens,) int32; ValueError where it has none."""
    ids = ids_of(text, tokenizer)
    if not len(ids):
        raise ValueError(f"{text.name} is empty; name a text with words in it")
    return ids


def _resumed(output: Path, report: PasskeyReport) -> PasskeyReport:
    """The report with what `output` holds of it."""
    try:
        kept = json.loads(output.read_text())
        theirs, seconds = dict(kept["setting"]), float(kept["seconds"])
        outcomes = [Outcome(**each) for each in kept["outcomes"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{output} was not written by infini passkey; name another file") from None
    check_same_setting(output, asdict(report.setting), theirs)
    return replace(report, outcomes=outcomes, seconds=seconds)


def _unasked(report: PasskeyReport) -> list[Cell]:
    """What is not in the report yet: a sample at every depth, then the next one, length by length."""
    setting, asked = report.setting, {(each.length, each.depth, each.sample) for each in report.outcomes}
    cells = product(setting.lengths, range(setting.samples), setting.depths)
    return [
        (length, depth, sample) for length, sample, depth in cells if (length, depth, sample) not in asked
    ]


def _batches(cells: list[Cell], rows: int) -> Iterator[list[Cell]]:
    """At most `rows` prompts at a time, of one length."""
    for _, alike in groupby(cells, key=itemgetter(0)):
        waiting = [*alike]
        yield from (waiting[start : start + rows] for start in range(0, len(waiting), rows))


@torch.inference_mode()
def _outcomes(
    model: Any, cells: list[Cell], prompts: list[Prompt], chunk_tokens: int | None, progress: ReadingProgress
) -> list[Outcome]:
    """Read prompts side by side, and ask."""
    segment, start = model.config.segment_length, min(prompt.question_start for prompt in prompts)
    if chunk_tokens is None:
        chunk_tokens = chunk_length(model, len(prompts))
    cache = InfiniCache(model.config)
    for first in range(0, start, chunk_tokens):
        ids = _rows(prompts, first, min(first + chunk_tokens, start)).to(model.device)
        model.base_model(ids, use_cache=True, **{CACHE_ARGUMENT: cache})
        progress.advance(ids.numel(), cache)
    right = _right(model, prompts, start, cache.copy())
    control = _right(model, prompts, start, with_memory_reset(cache))
    reach = start - start % segment  # where the open segment begins
    return [
        Outcome(*cell, len(prompt.answer), with_memory, without, in_reach=prompt.key_end > reach)
        for cell, prompt, with_memory, without in zip(cells, prompts, right, control, strict=True)
    ]


def _right(model: Any, prompts: list[Prompt], start: int, cache: InfiniCache) -> list[int]:
    """How many of each answer's tokens are the likeliest; `cache` has seen what is before `start`."""
    ids = _rows(prompts, start, max(prompt.whole for prompt in prompts) - 1).to(model.device)
    hidden = model.base_model(ids, use_cache=True, **{CACHE_ARGUMENT: cache}).last_hidden_state
    counts = []
    for prompt, row in zip(prompts, hidden, strict=True):
        last = prompt.length - 1 - start  # the question's last token, which predicts the answer's first
        likeliest = model.logits_of(row[last : last + len(prompt.answer)]).argmax(dim=-1).cpu().numpy()
        counts.append(int((likeliest == prompt.answer).sum()))
    return counts


def _rows(prompts: list[Prompt], start: int, stop: int) -> Tensor:
    """The prompts' tokens from `start` up to `stop`, (rows, tokens) int64; 0 after the end of an answer."""
    rows = [prompt.tokens(start, stop) for prompt in prompts]
    return torch.from_numpy(np.stack([np.pad(row, (0, stop - start - len(row))) for row in rows]))
