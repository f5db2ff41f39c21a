"""Memorizing Transformers (arXiv 2203.08913): one layer looks keys up among all that it has seen.

Section 3.1, for a query q of the layer, the k nearest (key, value) pairs of earlier segments K_m, V_m, and
what attention inside the local context gives, V_c:

    V_m' = softmax(q K_m^T) V_m    g = sigmoid(b_g)    V_a = V_m' g + V_c (1 - g)

with one b_g a head. The query is that of the local context, but without position; no gradient flows into
the memory, which holds the last M tokens. Keys and queries of the lookup are scaled to unit length, and
scores by a learned number a head (section 3.2 and arXiv 2010.04245), which starts at sqrt(head_dim). The
lookup is exact. The local context is that of `transformer_xl`, so that the two systems differ in the memory
alone: a whole segment before its own, where the paper has a window of N tokens. While the memory is empty
the local context is all there is, as in this package's models.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization

from infini_attention.baselines.attention import SegmentAttentionMixin, with_gradient_of
from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.baselines.modeling import SegmentModelMixin
from infini_attention.baselines.transformer_xl import TransformerXLAttentionMixin, TransformerXLState
from infini_attention.layers import MemoryGate
from infini_attention.models.attention import Rotation
from infini_attention.ops.options import autocast_type
from infini_attention.ops.state import state_dtype

SCORES_AT_ONCE = 2**27  # of queries with keys in memory: 512 MiB in fp32
BLOCK = 32  # keys that are judged by the best of them first, where the nearest are looked for


@dataclass(kw_only=True)
class MemorizingConfigMixin(BaselineConfigMixin):
    """A Memorizing Transformer: the fields of `BaselineConfigMixin`, and its own.

    Attributes:
        memory_size: M, (key, value) pairs a head; the oldest are dropped.
        neighbors: k, pairs that a query finds.
        memory_layer: index of the layer with the memory; None stands for the last of the first three
            quarters, the 9th of 12, and is replaced by it.
        local_cache: whether every layer also keeps the segment before, as Transformer-XL does.
        gate_init: initial logit of every head's gate.
    """

    memory_size: int = 65_536
    neighbors: int = 32
    memory_layer: int | None = None
    local_cache: bool = True
    gate_init: int | float = 0.0

    stop_gradient = True  # into the segment before, as into the memory

    def __post_init__(self, **kwargs: Any) -> None:
        if self.memory_layer is None:
            self.memory_layer = max(self._layers * 3 // 4 - 1, 0)
        super().__post_init__(**kwargs)

    def validate_baseline(self) -> None:
        """Raise ValueError for fields that cannot be right."""
        super().validate_baseline()
        self.check_counts("memory_size", "neighbors")
        if not self.stop_gradient:
            raise ValueError("stop_gradient is False, and no gradient flows into this memory; leave it out")
        assert self.memory_layer is not None
        if not 0 <= self.memory_layer < self._layers:
            raise ValueError(f"memory_layer is {self.memory_layer}; give one from 0 to {self._layers - 1}")
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init is {self.gate_init}; give a finite logit, such as 0.0")

    def memory_floats(self, length: int) -> int:
        """(d_key + d_value) H M, and the local cache of every layer."""
        segments = self.whole_segments(length)
        cached = min(segments, 1) * self._layers if self.local_cache else 0
        tokens = min(segments * self.segment_length, self.memory_size) + cached * self.segment_length
        return self.floats_a_token * tokens

    def keys_seen(self, layer: int, length: int) -> float:
        """Those of the local context; in the layer with the memory those found, and half of those searched.

        A key that is searched costs a score, and no value.
        """
        cached = self.segment_length if self.local_cache else 0

        def earlier(start: int) -> float:
            stored = min(start, self.memory_size) if layer == self.memory_layer else 0
            return (cached if start else 0) + min(stored, self.neighbors) + stored / 2

        return self.mean_keys(length, earlier)


@dataclass
class MemorizingState(TransformerXLState):
    """A TransformerXLState and the memory; both without gradient.

    Attributes:
        memory_key: (batch, kv_heads, pairs, head_dim), of unit length.
        memory_value: (batch, kv_heads, pairs, head_dim).
    """

    memory_key: Tensor
    memory_value: Tensor


class LookupScale(nn.Module):
    """One learned factor a head of the lookup's scores."""

    def __init__(self, heads: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.factors = nn.Parameter(torch.full((heads,), init))

    def forward(self) -> Tensor:
        """The factors, (heads,)."""
        return self.factors


class MemorizingAttentionMixin(TransformerXLAttentionMixin):
    """Put before a family's attention class: a Transformer-XL's attention, and a lookup in all segments."""

    state_class = MemorizingState

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.memory_gate = MemoryGate(config.num_attention_heads, init=config.gate_init)
        self.lookup_scale = LookupScale(config.num_attention_heads, self.head_dim**0.5)

    def attend(self, query: Tensor, state: Any, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """All heads' outputs, (batch, heads, new, head_dim), for a `query` of that shape, not rotated."""
        local = super().attend(query, state, rotation, mask)
        pairs = state.memory_key.shape[2]
        if not pairs:
            unused = self.memory_gate(), self.lookup_scale()
            return with_gradient_of(local, *unused) if self.training else local
        own = (state.length - state.key.shape[2]).clamp(max=pairs)  # of a row's own text
        found = lookup(
            query,
            state.memory_key,
            state.memory_value,
            self.lookup_scale(),
            neighbors=self.config.neighbors,
            latest=None if bool((own == pairs).all()) else own,
        )
        share = self.memory_gate().to(found.dtype).sigmoid()[:, None, None]
        if not bool((own > 0).all()):
            share = share * (own > 0).to(share)[:, None, None, None]
        return torch.lerp(local.to(found.dtype), found, share).to(local.dtype)

    def close(self, state: Any, hidden_states: Tensor) -> Any:
        """What is kept of a segment that is complete: in memory, and in the local cache."""
        key = F.normalize(state.key.detach().to(state_dtype(state.key.dtype)), dim=-1).to(state.key.dtype)
        most = min(self.config.memory_size, int(state.length.max()))  # rows that started anew need fewer
        return replace(
            super().close(state, hidden_states),
            memory_key=torch.cat([state.memory_key, key], dim=2)[:, :, -most:],
            memory_value=torch.cat([state.memory_value, state.value.detach()], dim=2)[:, :, -most:],
        )


class MemorizingModelMixin(SegmentModelMixin):
    """Put before a family's decoder class: a decoder of segments, one layer of which has the memory."""

    memorizing_class: type[MemorizingAttentionMixin]

    def attention_of(self, layer: int) -> type[SegmentAttentionMixin]:
        """The class of a layer's attention."""
        return self.memorizing_class if layer == self.config.memory_layer else self.attention_class

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LookupScale):
            initialization.constant_(module.factors, module.init)


def lookup(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: Tensor,
    *,
    neighbors: int,
    latest: Tensor | None = None,
) -> Tensor:
    """softmax(scale q K^T) V over those `neighbors` keys that are nearest to each query, exactly.

    What is alive at once is bounded, whatever the number of queries. Gradients reach `query` and `scale`.

    Args:
        query: (batch, heads, length, head_dim); scaled to unit length here.
        key: (batch, kv_heads, pairs, head_dim), of unit length.
        value: (batch, kv_heads, pairs, value_dim).
        scale: (heads,).
        neighbors: at most so many; all pairs where there are fewer.
        latest: (batch,) integer: so many of a row's pairs are looked at, its last, or one; None for all.

    Returns:
        (batch, heads, length, value_dim) in fp32 (fp64 where the query is).
    """
    if latest is not None:  # rows that began later cost less
        own = latest.clamp(min=1).tolist()
        pairs_of = zip(query.split(1), key.split(1), value.split(1), own, strict=True)
        rows = [lookup(q, k[:, :, -n:], v[:, :, -n:], scale, neighbors=neighbors) for q, k, v, n in pairs_of]
        return torch.cat(rows)
    batch, heads, _, _ = query.shape
    dtype, kv_heads, pairs = state_dtype(query.dtype), key.shape[1], key.shape[2]
    at_once = max(1, SCORES_AT_ONCE // (batch * heads * pairs))
    # Scores of half precision would not tell near keys apart.
    with torch.autocast(autocast_type(query.device), enabled=False):
        grouped = F.normalize(query.to(dtype), dim=-1).unflatten(1, (kv_heads, -1))
        factors = scale.to(dtype).view(kv_heads, -1, 1, 1)
        compared, outputs = key.to(dtype), []
        for part in grouped.split(at_once, dim=3):
            places = _nearest(part, compared, min(neighbors, pairs))
            # Found keys and values are found again in the backward pass, rather than kept.
            arguments = part, key, value, places, factors
            outputs.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=3).flatten(1, 2)


@torch.no_grad()
def _nearest(query: Tensor, key: Tensor, neighbors: int) -> Tensor:
    """Places of the keys with the largest scores, (batch, kv_heads, group, length, neighbors)."""
    return largest(query @ key[:, :, None].transpose(-1, -2), neighbors)


def largest(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` largest of the last dimension, in no order: finite (..., pairs) to (..., count).

    Exact, and quicker on a GPU than to select among all: the largest lie in those `count` blocks whose own
    largest are largest, and only these are looked into. A block's scores are far apart, so that those of
    all blocks are compared side by side.
    """
    if scores.shape[-1] <= count * BLOCK:
        return _largest(scores, count)
    if missing := -scores.shape[-1] % BLOCK:
        scores = F.pad(scores, (0, missing), value=-math.inf)
    members = scores.unflatten(-1, (BLOCK, -1))  # (..., BLOCK, blocks)
    best = _largest(members.amax(dim=-2), count)
    among = members.gather(-1, best[..., None, :].expand(*members.shape[:-1], count))
    place = _largest(among.flatten(-2), count)
    return place // count * members.shape[-1] + best.gather(-1, place % count)


def _largest(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count, dim=-1, sorted=False).indices


def _attend(query: Tensor, key: Tensor, value: Tensor, places: Tensor, scale: Tensor) -> Tensor:
    """What queries (batch, kv_heads, group, length, head_dim) get from the pairs at their `places`."""

    def taken(x: Tensor) -> Tensor:
        flat = places.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, flat).view(*places.shape, x.shape[-1]).to(query.dtype)

    scores = (taken(key) @ query[..., None]).squeeze(-1) * scale
    return (scores.softmax(dim=-1)[..., None, :] @ taken(value)).squeeze(-2)
