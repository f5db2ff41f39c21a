"""Linear attention (arXiv 2006.16236) in every head and nothing else: no softmax, no segments, no gate.

Equations (10) to (12) of the paper, for token t, with sigma a feature map as in `ops.feature_maps`:

    S_t = S_{t-1} + sigma(K_t)^T V_t    z_t = z_{t-1} + sigma(K_t)    A_t = sigma(Q_t) S_t / (sigma(Q_t) z_t)

A token reads itself, too, and every token before it as of that token: Infini-attention's memory with segments
of one token and the read after the write. Queries and keys know no positions; a short convolution, as
Infini-attention has it, lets them know what stands just before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_attention.baselines.attention import Piece, SegmentAttentionMixin
from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.baselines.modeling import SegmentModelMixin
from infini_attention.baselines.state import RowState, SegmentCache
from infini_attention.layers import ShortConvolution
from infini_attention.models.compat import pop_cache
from infini_attention.models.config import convolved_channels, head_dim_of
from infini_attention.models.runs import segment_runs
from infini_attention.ops import feature_maps
from infini_attention.ops.normalization import DENOMINATOR_FLOOR
from infini_attention.ops.options import autocast_type
from infini_attention.ops.state import state_dtype

CHUNK = 64  # tokens that are compared with each other; all before them are in the sums
PIECE = 4096  # tokens that go through all layers at once: it bounds how many sums are alive


@dataclass(kw_only=True)
class LinearAttentionConfigMixin(BaselineConfigMixin):
    """Linear attention: the fields of `BaselineConfigMixin`, and its own; segments are left to the data.

    Attributes:
        feature_map: sigma, a name of `ops.feature_maps`.
        short_convolution: tokens that every query and key is a learned mixture of; 0 for none.
    """

    feature_map: str = "elu1"
    short_convolution: int = 0

    def validate_baseline(self) -> None:
        """Raise ValueError for fields that cannot be right."""
        super().validate_baseline()
        feature_maps.get(self.feature_map)
        if self.short_convolution < 0 or self.short_convolution == 1:
            raise ValueError(
                f"short_convolution is {self.short_convolution}; give 0 for none, or at least 2 tokens, say 4"
            )

    @property
    def features(self) -> int:
        """Numbers that the feature map makes of a key."""
        return feature_maps.get(self.feature_map).feature_dim(head_dim_of(self))

    def memory_floats(self, length: int) -> int:
        """d_key (d_value + 1) H l, d_key being features, from the first token on."""
        kv_heads: int = self.num_key_value_heads  # type: ignore[attr-defined]
        return self.features * (head_dim_of(self) + 1) * kv_heads * self._layers

    def keys_seen(self, layer: int, length: int) -> float:
        """Those of its chunk up to it; writing and reading the sums costs as much as one key a feature."""
        return min(CHUNK, length) / 2 + self.features


@dataclass
class LinearAttentionState(RowState):
    """What one layer carries from token to token.

    Attributes:
        sums: S and z as its last column, (batch, kv_heads, features, head_dim + 1), fp32 or wider.
        recent: what the short convolution looks back at, (batch, width - 1, channels); no tokens without one.
    """

    sums: Tensor
    recent: Tensor


class LinearAttentionMixin(SegmentAttentionMixin):
    """Put before a family's attention class: same projections and parameter names, linear attention."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.short_convolution:
            self.short_convolution = ShortConvolution(convolved_channels(config), config.short_convolution)

    def forward(self, hidden_states: Tensor, *, piece: Piece, **kwargs: Any) -> tuple[Tensor, None]:
        """Attend; `hidden_states` is (batch, new tokens, hidden_size), and so is the output."""
        layer = pop_cache(kwargs).layers[self.layer_idx]
        query, key, value, recent = self.convolved(hidden_states, layer.state)
        sigma = feature_maps.get(self.config.feature_map)
        dtype = state_dtype(value.dtype)
        with torch.autocast(autocast_type(value.device), enabled=False):
            features = sigma(query.to(dtype)), sigma(key.to(dtype))
            if layer.state is None:
                size = *key.shape[:2], self.config.features, value.shape[-1] + 1
                sums = value.new_zeros(size, dtype=dtype)
            else:
                sums = layer.state.sums
            output, sums = linear_attention(*features, value.to(dtype), sums)
        layer.advance(LinearAttentionState(sums, recent), piece.tokens)
        return self.o_proj(output.to(value.dtype).transpose(1, 2).flatten(2)), None

    def convolved(self, hidden_states: Tensor, state: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value of what `_project` says, and what the next token's convolution looks back at."""
        if not self.config.short_convolution:
            return *self._project(hidden_states), hidden_states.new_empty(len(hidden_states), 0, 0)
        both = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states)], dim=-1)
        mixed, seen = self.short_convolution(both, None if state is None else state.recent)
        sizes = [projection.out_features for projection in (self.q_proj, self.k_proj)]
        heads = self._in_heads(*mixed.split(sizes, dim=-1), self.v_proj(hidden_states))
        return *heads, seen[:, seen.shape[1] - (self.config.short_convolution - 1) :].clone()


class LinearAttentionModelMixin(SegmentModelMixin):
    """Put before a family's decoder class: a decoder whose tokens read sums of all tokens so far."""

    def pieces(self, length: int, seen: int) -> Iterator[slice]:
        """`PIECE` tokens each, wherever they begin."""
        return segment_runs(length, 1, PIECE, 0)

    def read(self, inputs: Tensor, cache: SegmentCache, **kwargs: Any) -> Tensor:
        """Last hidden states of ids, or embeddings; the cache moves on."""
        new = inputs.shape[1]
        unused = torch.arange(new, device=inputs.device)  # the family's forward rotates by them, nobody reads
        return self.decode(inputs, unused, Piece(new, None, ends=True), cache, **kwargs)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """A_t for every token and the sums after the last, a chunk's tokens at once and all chunks side by side.

    Within a chunk tokens are compared with each other; what stands before it is a prefix sum over chunks.

    Args:
        query: sigma(Q), (batch, heads, length, features).
        key: sigma(K), (batch, kv_heads, length, features).
        value: V, (batch, kv_heads, length, head_dim).
        sums: S and z before the first token, (batch, kv_heads, features, head_dim + 1).

    Returns:
        Outputs (batch, heads, length, head_dim), 0 where nothing is found, and sums like `sums`.
    """
    length = query.shape[2]
    query = _chunks(query.unflatten(1, (key.shape[1], -1)))  # (batch, kv_heads, group, chunks, CHUNK, ...)
    key = _chunks(key.unsqueeze(2))
    value = _chunks(F.pad(value, (0, 1), value=1.0).unsqueeze(2))  # with 1 beside it, S brings z along
    added = key.mT @ value
    states = torch.cat([sums[:, :, None, None], added], dim=3).cumsum(dim=3)
    read = query @ states[:, :, :, :-1] + (query @ key.mT).tril() @ value
    answer, total = read[..., :-1], read[..., -1:]
    output = answer / torch.where(total.abs() < DENOMINATOR_FLOOR, float("inf"), total)
    return output.flatten(3, 4)[..., :length, :].flatten(1, 2), states[:, :, 0, -1].clone()


def _chunks(x: Tensor) -> Tensor:
    """(..., length, dim) as (..., chunks, CHUNK, dim); zeros fill up the last one and add nothing."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % CHUNK)).unflatten(-2, (-1, CHUNK))
