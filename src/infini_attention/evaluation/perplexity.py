"""Perplexity of one text of any length, read as a stream: with the memory, and without it on the same tokens.

Without means every gate shut: the same model reads the same tokens in the same segments, and each segment
sees only itself. The difference between the two is what the memory does, and nothing else.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from infini_attention.data.texts import TokenBlock
from infini_attention.models import memory_off
from infini_attention.models.compat import CACHE_ARGUMENT

TILE_TOKENS, TILE_VOCABULARY = 512, 4096  # 8 MiB of fp32 logits at a time
GPU_TILE_TOKENS = 8192  # 128 MiB, for fewer and larger products
CURVE_POINTS = 256
COLUMNS = 5  # of sums over a text: nats with the memory on and off, tokens, words and bytes


@dataclass(frozen=True)
class Loss:
    """What predicting a stretch of text has cost: `nats` in sum, over so many tokens, words and bytes.

    `tokens` are those predicted; a text's first token has nothing before it and is not, though its words and
    bytes count, as they do in published word counts.
    """

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def token_perplexity(self) -> float:
        """exp(nats / tokens)."""
        return _exponential_of_mean(self.nats, self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(nats / words), words being what whitespace separates, as PG19 counts them."""
        return _exponential_of_mean(self.nats, self.words)

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes, of the text in UTF-8."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def to_dict(self) -> dict[str, float]:
        """Return sums and figures, for JSON."""
        figures = ("token_perplexity", "word_perplexity", "bits_per_byte")
        return vars(self) | {name: getattr(self, name) for name in figures}


@dataclass(frozen=True)
class Stretch:
    """The loss on tokens `start` to `end` - 1 of a text, with the memory on and off."""

    start: int
    end: int
    on: Loss
    off: Loss

    def to_dict(self) -> dict[str, Any]:
        """Return the stretch, for JSON."""
        return {"start": self.start, "end": self.end, "on": self.on.to_dict(), "off": self.off.to_dict()}


class StreamedPerplexity:
    """Adds up a model's loss on one text that is fed to it piece by piece, with the memory on and off.

    Holds two caches, the last hidden states and running sums: nothing grows with the text. How the text is
    cut into pieces changes nothing but speed and the memory for one piece's hidden states.

    Raises ValueError when the model is in training mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.training:
            raise ValueError(
                "the model is in training mode, where dropout changes the loss; call model.eval()"
            )
        self.tokens = 0
        segment_length = model.config.segment_length
        self._on, self._off = LossReader(model), LossReader(model, shut=True)
        self._buckets = PositionSums(segment_length, columns=COLUMNS)
        self._curve = _Curve(segment_length)

    @property
    def state_bytes(self) -> int:
        """Bytes that the model carries from piece to piece, with the memory on."""
        return self._on.cache.nbytes

    @property
    def total(self) -> Stretch:
        """The whole text so far."""
        return _stretch(0, self.tokens, self._buckets.total.tolist())

    @property
    def by_position(self) -> list[Stretch]:
        """The text so far in stretches of N, N, 2N, 4N, ... tokens, N being the segment length."""
        return [_stretch(*row) for row in self._buckets.rows(self.tokens)]

    @property
    def curve(self) -> list[Stretch]:
        """The text so far in at most 256 stretches of equal length, whole segments each."""
        return self._curve.stretches(self.tokens)

    def feed(self, piece: TokenBlock) -> None:
        """Read the next tokens of the text."""
        nats = [reader.read(piece.ids[None])[0] for reader in (self._on, self._off)]
        predicted = torch.ones_like(piece.ids)
        if self.tokens == 0:
            predicted[:1] = 0
        rows = torch.stack([*nats, predicted, piece.words, piece.bytes], dim=1).double()
        self._buckets.add(self.tokens, rows)
        self._curve.add(self.tokens, rows)
        self.tokens += len(piece)


class LossReader:
    """A model on its way through texts side by side: its cache, and what predicts each text's next token.

    Args:
        model: an `infini_*` language model or a baseline, in evaluation mode.
        shut: whether every gate is shut while it reads.
    """

    def __init__(self, model: Any, *, shut: bool = False) -> None:
        self.model = model
        self.shut = shut
        self.cache = model.base_model.cache_class(model.config)
        self.last_hidden: Tensor | None = None

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Each token's negative log-likelihood in nats, (rows, tokens) fp64; 0 for a text's first.

        `ids` are the next tokens of every text, (rows, tokens) int64.
        """
        ids = ids.to(self.model.device)
        with self._gates():
            output = self.model.base_model(ids, use_cache=True, **{CACHE_ARGUMENT: self.cache})
        hidden = output.last_hidden_state
        before = hidden[:, :0] if self.last_hidden is None else self.last_hidden
        predictors = torch.cat([before, hidden[:, :-1]], dim=1)
        self.last_hidden = hidden[:, -1:].clone()
        first = ids.shape[1] - predictors.shape[1]
        targets = ids[:, first:]
        nats = _negative_log_likelihood(self.model, predictors.flatten(0, 1), targets.flatten())
        return F.pad(nats.view_as(targets), (first, 0)).double().cpu()

    @torch.inference_mode()
    def keep(self, rows: int) -> None:
        """Read on in the first so many texts only."""
        self.cache.batch_select_indices(torch.arange(rows, device=self.model.device))
        if self.last_hidden is not None:
            self.last_hidden = self.last_hidden[:rows]

    def _gates(self) -> AbstractContextManager[Any]:
        return memory_off(self.model) if self.shut else nullcontext()


def _negative_log_likelihood(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), (tokens,) fp32, from last hidden states (tokens, hidden_size).

    Logits exist a tile at a time, some tokens by some of the vocabulary. A tile stays in a processor's cache,
    which on a CPU takes half the time of whole rows, and does not grow with the vocabulary.
    """
    size = TILE_TOKENS if hidden.device.type == "cpu" else GPU_TILE_TOKENS
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([_tiled_cross_entropy(model, *part) for part in parts])


def _tiled_cross_entropy(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log of the sum of exponentials, carried from tile to tile with its largest logit, less the target's."""
    head: Any = model.get_output_embeddings()
    chosen, total = torch.zeros(2, len(hidden), device=hidden.device)
    largest = torch.full_like(total, -torch.inf)
    tile = torch.empty(
        len(hidden), TILE_VOCABULARY, device=hidden.device
    )  # once: fresh pages cost more than sums
    for start in range(0, len(head.weight), TILE_VOCABULARY):
        product = F.linear(hidden, head.weight[start : start + TILE_VOCABULARY])
        logits = _final_logits(tile[:, : product.shape[1]].copy_(product), model.config)
        places = targets - start
        inside = (places >= 0) & (places < logits.shape[1])  # a mask: numbers of rows would wait for a GPU
        found = logits.gather(1, places.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        chosen = torch.where(inside, found, chosen)
        larger = torch.maximum(largest, logits.amax(dim=1))
        total = total * (largest - larger).exp() + logits.sub_(larger[:, None]).exp_().sum(dim=1)
        largest = larger
    return largest + total.log() - chosen


def _final_logits(logits: Tensor, config: Any) -> Tensor:
    """What Granite (a divisor) and Gemma 2 (a cap) do to the output layer's product, in place."""
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    if divisor is not None:
        logits.div_(divisor)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class PositionSums:
    """Sums over tokens by position: the first segment, the second, then ever doubling stretches.

    Args:
        segment_length: tokens of the first stretch.
        columns: how many numbers of a token are added up.
    """

    def __init__(self, segment_length: int, *, columns: int) -> None:
        self._edges = segment_length * 2 ** torch.arange(62 - segment_length.bit_length())
        self._sums = torch.zeros(len(self._edges) + 1, columns, dtype=torch.float64)

    @property
    def total(self) -> Tensor:
        """The sums over all tokens, (columns,) fp64."""
        return self._sums.sum(dim=0)

    def add(self, start: int, rows: Tensor) -> None:
        """Add the numbers of tokens from position `start` on, (tokens, columns) fp64."""
        positions = torch.arange(start, start + len(rows))
        self._sums.index_add_(0, torch.bucketize(positions, self._edges, right=True), rows)

    def rows(self, tokens: int) -> Iterator[tuple[int, int, list[float]]]:
        """Each stretch of a text of so many tokens: where it starts and ends, and its sums."""
        starts = [0, *(edge for edge in self._edges.tolist() if edge < tokens)]
        return zip(starts, [*starts[1:], tokens], self._sums.tolist(), strict=False)


class _Curve:
    """Sums over tokens in stretches of equal width, which doubles whenever there would be too many."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.sums = torch.zeros(CURVE_POINTS, COLUMNS, dtype=torch.float64)

    def add(self, start: int, rows: Tensor) -> None:
        end = start + len(rows)
        while end > CURVE_POINTS * self.width:
            self.width *= 2
            self.sums = F.pad(self.sums.view(-1, 2, COLUMNS).sum(dim=1), (0, 0, 0, CURVE_POINTS // 2))
        self.sums.index_add_(0, torch.arange(start, end) // self.width, rows)

    def stretches(self, tokens: int) -> list[Stretch]:
        starts = range(0, tokens, self.width)
        return [
            _stretch(start, min(start + self.width, tokens), row)
            for start, row in zip(starts, self.sums.tolist(), strict=False)
        ]


def _stretch(start: int, end: int, sums: list[float]) -> Stretch:
    """Name the columns of a row of sums."""
    on, off, tokens, words, size = sums
    counts = {"tokens": int(tokens), "words": int(words), "bytes": int(size)}
    return Stretch(start, end, on=Loss(nats=on, **counts), off=Loss(nats=off, **counts))


def _exponential_of_mean(total: float, count: int) -> float:
    mean = total / count if count else math.nan
    return math.exp(mean) if not mean > 709 else math.inf  # e^709 is the largest that fp64 holds
