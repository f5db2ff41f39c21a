"""Recurrent Memory Transformer (RMT, arXiv 2207.06881): memory tokens around every segment.

Section 3.2, for segment s, whose embeddings are H_s^0, and m memory vectors H_s^mem:

    H~_s^0 = [H_s^mem o H_s^0 o H_s^mem]    [H_s^read o H_s^L o H_s^write] = Transformer(H~_s^0)
    H_{s+1}^mem = H_s^write

The vectors before the segment are read by its tokens, those after it see all of it and are what is written.
The first ones are learned. Gradients flow through them from the last segment to the first.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from infini_attention.baselines.attention import Piece, with_gradient_of
from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.baselines.modeling import SegmentModelMixin
from infini_attention.baselines.state import RowState, SegmentCache, SegmentCacheLayer


@dataclass(kw_only=True)
class RecurrentMemoryConfigMixin(BaselineConfigMixin):
    """A Recurrent Memory Transformer: the fields of `BaselineConfigMixin`, and its own.

    Attributes:
        memory_tokens: m, vectors that are handed from segment to segment.
    """

    memory_tokens: int = 100
    local_cache = False

    def validate_baseline(self) -> None:
        """Raise ValueError for fields that cannot be right."""
        super().validate_baseline()
        self.check_counts("memory_tokens")

    def memory_floats(self, length: int) -> int:
        """(d_key + d_value) H m l: what each layer holds of the vectors that an open segment reads.

        Between two segments the vectors themselves are all there is: m times the model's width.
        """
        return self.floats_a_token * self._layers * self.memory_tokens

    def keys_seen(self, layer: int, length: int) -> float:
        """Those of its own segment up to it, and the memory's."""
        return self.mean_keys(length, lambda start: self.memory_tokens)


@dataclass
class MemoryVectors(RowState):
    """What a complete segment has written.

    Attributes:
        vectors: (batch, memory_tokens, hidden_size).
        fresh: (batch,) bool on the CPU: rows that read the learned ones instead.
    """

    vectors: Tensor
    fresh: Tensor

    def forget(self, rows: Tensor) -> "MemoryVectors":
        """The state in which the given rows start afresh; `rows` is (batch,) bool, True = forget."""
        return replace(self, fresh=self.fresh | rows)


class RecurrentMemoryCache(SegmentCache):
    """A SegmentCache with one more layer, for the MemoryVectors.

    Args:
        config: the model's config.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers.append(SegmentCacheLayer())

    @property
    def written(self) -> SegmentCacheLayer:
        """The layer of the MemoryVectors; its state is None before the first segment is complete."""
        layer: Any = self.layers[-1]
        return layer


class FirstMemory(nn.Module):
    """The learned vectors that the first segment reads, (memory_tokens, hidden_size)."""

    def __init__(self, memory_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(memory_tokens, hidden_size))

    def forward(self, batch: int) -> Tensor:
        """The vectors for each of so many rows: (batch, memory_tokens, hidden_size)."""
        return self.vectors.expand(batch, -1, -1)


class RecurrentMemoryModelMixin(SegmentModelMixin):
    """Put before a family's decoder class: a decoder of segments with memory tokens around each."""

    cache_class = RecurrentMemoryCache

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first_memory = FirstMemory(config.memory_tokens, config.hidden_size)
        self.post_init()  # type: ignore[operator]

    def read(self, inputs: Tensor, cache: Any, **kwargs: Any) -> Tensor:
        """Last hidden states of ids, or embeddings, that fall into one segment; the cache moves on."""
        size, count, new = self.config.segment_length, self.config.memory_tokens, inputs.shape[1]
        used = cache.get_seq_length() % size
        starts, ends = used == 0, used + new == size
        embeddings = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        written = cache.written.state
        memory = self.first_memory(len(inputs)) if written is None else self._read_by(written)
        reads, writes = count * starts, count * ends
        whole = torch.cat([memory[:, :reads], embeddings, memory[:, :writes]], dim=1)

        positions = torch.arange(count + used + new + writes, device=inputs.device)
        mask = memory_mask(whole.shape[1], len(positions), reads, writes, inputs.device)
        hidden = self.decode(whole, positions, Piece(new, mask, ends), cache, **kwargs)
        if ends:
            fresh = torch.zeros(len(hidden), dtype=torch.bool, device="cpu")
            cache.written.advance(MemoryVectors(hidden[:, -count:], fresh), size)
        return hidden[:, reads : reads + new]

    def _read_by(self, written: MemoryVectors) -> Tensor:
        """What each row's next segment reads, (batch, memory_tokens, hidden_size)."""
        vectors = written.vectors
        if not bool(written.fresh.any()):
            return with_gradient_of(vectors, self.first_memory(1)) if self.training else vectors
        first = self.first_memory(len(vectors)).to(vectors.dtype)
        return torch.where(written.fresh.to(vectors.device)[:, None, None], first, vectors)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FirstMemory):
            initialization.normal_(module.vectors, std=self.config.initializer_range)


def memory_mask(new: int, seen: int, reads: int, writes: int, device: torch.device) -> Tensor | None:
    """(new, seen) bool, True = visible: new tokens that begin with so many reads and end with so many writes.

    1 1 | 0 0 0 | 0 0    2 vectors that are read, which see each other,
    1 1 | 0 0 0 | 0 0
    1 1 | 1 0 0 | 0 0    3 tokens,
    1 1 | 1 1 0 | 0 0
    1 1 | 1 1 1 | 0 0
    1 1 | 1 1 1 | 1 1    and 2 that are written, which see all
    1 1 | 1 1 1 | 1 1

    None where there are neither, and each token sees all up to itself.
    """
    if not reads and not writes:
        return None
    mask = torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)
    mask[:reads, :reads] = True
    mask[new - writes :] = True
    return mask
