"""`infini gates`: what the gates let through, and what the memory does for tokens of each kind."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infini_attention.data.passkey import PasskeyPrompts, Prompt
from infini_attention.data.texts import ids_of, open_text
from infini_attention.models import InfiniCache, memory_off
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.observe import gate_logits, token_shares
from infini_attention.provenance import Provenance, provenance

CHUNK_TOKENS = 1 << 13
LOSS_TOKENS = 512  # whose logits exist at once

KINDS = ("filler", "heading", "key", "question", "digits", "echo", "answer")
"""Kinds of tokens, in the order of `data.passkey.BACKGROUND` to `ANSWER`. The first is called prose where
the background is real text."""


@dataclass(frozen=True)
class Prompts:
    """Pass key prompts to read; see `data.passkey`. Their keys stand at even depths.

    Attributes:
        variant: a name of `data.passkey.VARIANTS`.
        samples: how many there are.
        keys: that are told in each.
        rewrites: how often the one asked for is told before with another value.
        prose: the text around the keys of varied: a file, - for standard input, or an alias such as hamlet.
        seed: of all that is random.
    """

    variant: str = "paper"
    samples: int = 4
    keys: int = 1
    rewrites: int = 0
    prose: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """Which model read what.

    Attributes:
        model: as it was asked for.
        model_type: of its config.
        text: name of the text that was read; None where it was `prompts`.
        length: tokens of it, or of a prompt, question included and answer not.
    """

    model: str
    model_type: str
    segment_length: int
    update_rule: str
    feature_map: str
    normalization: str
    dtype: str
    device: str
    text: str | None
    prompts: Prompts | None
    length: int
    local_attention: str = "segment"  # as `local_attention_name`; older reports have none


@dataclass(frozen=True)
class Kind:
    """What the memory does for one kind of token.

    Attributes:
        name: one of `KINDS`, or "prose".
        tokens: that were read.
        with_memory: of them, those after the first segment, whose memory is not empty.
        share: (layers with a memory, heads) mean over those of the memory's part in what attention puts out
            there, ||g A_mem|| / (||g A_mem|| + ||(1 - g) A_dot||); None where there are none.
        predicted: tokens that were predicted, each from those before it; all but the first of a text.
        loss: mean over those, in nats.
        loss_memory_off: the same with every gate shut.
    """

    name: str
    tokens: int
    with_memory: int
    share: list[list[float]] | None
    predicted: int
    loss: float
    loss_memory_off: float

    @property
    def memory_gain(self) -> float:
        """What the memory takes off the loss, in nats a token."""
        return self.loss_memory_off - self.loss


@dataclass(frozen=True)
class GatesReport:
    """All that `infini gates` shows.

    Attributes:
        layer_count: layers of the model.
        layers: numbers of those that have a memory.
        gates: (layers with a memory, heads) sigmoid of the gates' logits, g.
        kinds: those that occur.
        seconds: that the reading took.
    """

    setting: Setting
    provenance: Provenance
    layer_count: int
    layers: list[int]
    gates: list[list[float]]
    kinds: list[Kind]
    seconds: float

    def to_json(self) -> str:
        """The whole report in one line of JSON."""
        return json.dumps(asdict(self), allow_nan=False)


def gates(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | None = None,
    prompts: Prompts = Prompts(),
    length: int = 8192,
    chunk_tokens: int | None = None,
) -> GatesReport:
    """Say how far the gates of a model are open, and what its memory does for tokens of each kind.

    An open gate says little by itself, since what is read from the memory may be tiny. So two more things are
    measured: the memory's share of each head's output (equation 10 of arXiv 2404.07143), and the loss on the
    same tokens with every gate shut. All is read in chunks that go on from a cache, so that the working
    memory does not grow with the length.

    Args:
        model: an `infini_*` language model in evaluation mode.
        tokenizer: the model's, a fast one.
        text: what to read in place of prompts: a file, - for standard input, or an alias such as hamlet.
        prompts: what to read where there is no text.
        length: tokens of a prompt, question included; of a text, the first so many.
        chunk_tokens: tokens that go through the model at once; default whole segments, together some 8,192.
            Changes speed and working memory, no figure.

    Raises:
        ValueError: a model without memories or in training mode, a setting that cannot be right, prompts
            without room for their keys, or a text of fewer than 2 tokens.
    """
    logits = gate_logits(model)
    _check(model, text, prompts, length, chunk_tokens)
    documents = _prompts(prompts, tokenizer, length) if text is None else [_text(text, tokenizer, length)]
    segment = model.config.segment_length
    chunk_tokens = chunk_tokens or max(1, CHUNK_TOKENS // segment) * segment

    layers, began = sorted(model.config.infini_layers), time.perf_counter()
    sums = _Sums(layers, heads=logits.shape[1])
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading", total=sum(document.whole for document in documents))
        for document in documents:
            for read in _read(model, document, chunk_tokens, sums):
                progress.advance(bar, read)

    real_text = text is not None or prompts.prose is not None
    return GatesReport(
        setting=Setting(
            model=model.name_or_path,
            model_type=model.config.model_type,
            segment_length=segment,
            update_rule=model.config.update_rule,
            feature_map=model.config.feature_map,
            normalization=model.config.normalization,
            local_attention=model.config.local_attention_name,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            text=text,
            prompts=prompts if text is None else None,
            length=documents[0].length,
        ),
        provenance=provenance(),
        layer_count=model.config.num_hidden_layers,
        layers=layers,
        gates=logits.sigmoid().tolist(),
        kinds=sums.kinds("prose" if real_text else KINDS[0]),
        seconds=time.perf_counter() - began,
    )


def _check(model: Any, text: str | None, prompts: Prompts, length: int, chunk_tokens: int | None) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes the loss; call model.eval()")
    if text is not None and prompts != Prompts():
        raise ValueError(
            f"text is {text}, which is read as it is; leave the settings of prompts out, or the text"
        )
    for name, count, least in (
        ("samples", prompts.samples, 1),
        ("length", length, 2),
        ("chunk_tokens", chunk_tokens, 1),
    ):
        if count is not None and count < least:
            raise ValueError(f"{name} is {count}; give at least {least}")


def _prompts(prompts: Prompts, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Prompt]:
    prose = None if prompts.prose is None else _ids(prompts.prose, tokenizer, None)
    drawn = PasskeyPrompts(tokenizer, prompts.variant, prose=prose, seed=prompts.seed)
    drafts = [
        drawn.draft(number, keys=prompts.keys, rewrites=prompts.rewrites) for number in range(prompts.samples)
    ]
    return [
        draft.prompt(length=length, depth=(number + 0.5) / prompts.samples)
        for number, draft in enumerate(drafts)
    ]


def _text(name: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Prompt:
    """The first `length` tokens of a text, as a prompt that is nothing but background."""
    ids = _ids(name, tokenizer, length)
    return Prompt(
        length=len(ids),
        answer=ids[:0],
        question_start=len(ids),
        key_end=0,
        pieces=[],
        background=ids,
        offset=0,
    )


def _ids(name: str, tokenizer: PreTrainedTokenizerBase, length: int | None) -> np.ndarray:
    """A text's first tokens, or all, (tokens,) int32; ValueError for fewer than 2."""
    ids = ids_of(open_text(name), tokenizer, tokens=length)
    if len(ids) < 2:
        raise ValueError(f"{name} has {len(ids)} tokens; name a text of at least 2")
    return ids


class _Sums:
    """Sums over all tokens so far by kind; `layers` are those with a memory."""

    def __init__(self, layers: list[int], heads: int) -> None:
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._share = torch.zeros(len(KINDS), len(layers), heads, dtype=torch.float64)
        self._nats = torch.zeros(len(KINDS), 2, dtype=torch.float64)
        self._tokens, self._with_memory, self._predicted = torch.zeros(3, len(KINDS), dtype=torch.long)

    def add_tokens(self, kinds: Tensor, has_memory: Tensor) -> None:
        """Tokens that are read, both (tokens,)."""
        self._tokens += _count(kinds)
        self._with_memory += _count(kinds[has_memory])

    def add_share(self, kinds: Tensor, has_memory: Tensor, layer: int, share: Tensor) -> None:
        """Shares (1, tokens, heads) of a layer."""
        rows = share[0].cpu().double()[has_memory]
        self._share[:, self._row[layer]].index_add_(0, kinds[has_memory], rows)

    def add_loss(self, kinds: Tensor, nats: Tensor) -> None:
        """Losses (tokens, 2) of tokens that were predicted, with the memory and without it."""
        self._predicted += _count(kinds)
        self._nats.index_add_(0, kinds, nats.cpu().double())

    def kinds(self, background: str) -> list[Kind]:
        """The means of those kinds that occur."""
        return [
            self._kind(kind, name) for kind, name in enumerate((background, *KINDS[1:])) if self._tokens[kind]
        ]

    def _kind(self, kind: int, name: str) -> Kind:
        with_memory, predicted = int(self._with_memory[kind]), int(self._predicted[kind])
        loss, loss_memory_off = (self._nats[kind] / predicted).tolist()
        return Kind(
            name=name,
            tokens=int(self._tokens[kind]),
            with_memory=with_memory,
            share=(self._share[kind] / with_memory).tolist() if with_memory else None,
            predicted=predicted,
            loss=loss,
            loss_memory_off=loss_memory_off,
        )


def _count(kinds: Tensor) -> Tensor:
    return torch.bincount(kinds, minlength=len(KINDS))


@torch.inference_mode()
def _read(model: Any, document: Prompt, chunk_tokens: int, sums: _Sums) -> Iterator[int]:
    """Read a document, with the memory on and off, and yield each chunk's number of tokens."""
    on, off = InfiniCache(model.config), InfiniCache(model.config)
    unread = model.config.segment_length * (2 if model.config.local_attention == "sliding" else 1)
    for start in range(0, document.whole, chunk_tokens):
        stop = min(start + chunk_tokens, document.whole)
        # One token more, which the chunk's last is to predict.
        ids = torch.from_numpy(document.tokens(start, stop + 1))
        kinds = torch.from_numpy(document.kinds(start, stop + 1)).long()
        read, has_memory = kinds[: stop - start], torch.arange(start, stop) >= unread
        sums.add_tokens(read, has_memory)
        with token_shares(model, partial(sums.add_share, read, has_memory)):
            loss = _loss(model, ids, stop - start, on)
        with memory_off(model):
            loss_memory_off = _loss(model, ids, stop - start, off)
        sums.add_loss(kinds[1:], torch.stack([loss, loss_memory_off], dim=1))
        yield stop - start


def _loss(model: Any, ids: Tensor, read: int, cache: InfiniCache) -> Tensor:
    """Cross entropy in nats of all `ids` but the first, where so many of them are read; fp32."""
    ids = ids.to(model.device)
    output = model.base_model(ids[None, :read], use_cache=True, **{CACHE_ARGUMENT: cache})
    predictors, targets = output.last_hidden_state[0, : len(ids) - 1], ids[1:]
    parts = zip(predictors.split(LOSS_TOKENS), targets.split(LOSS_TOKENS), strict=True)
    return torch.cat(
        [F.cross_entropy(model.logits_of(part).float(), wanted, reduction="none") for part, wanted in parts]
    )
