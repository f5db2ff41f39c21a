"""A sliding window over the latest tokens, and attention sinks (StreamingLLM, arXiv 2309.17453).

In every layer, with W for `window` and S for `sinks`, a token t sees at most W tokens, itself included:

    the text's first S    and    the latest W - S:  t - (W - S) + 1, ..., t

Section 3.2 of the paper: keys are cached as they are before rotation, and positions are those in the cache.
Once it is full a token is at W - 1, the first ones at 0 to S - 1, the latest at S to W - 1: distances among
the latest are those in the text, and that to a first one stops growing. RoPE (arXiv 2104.09864) knows
distances only: without sinks, positions in the cache and in the text give the same scores in exact
arithmetic. Here they count from the first of at most W new tokens, as angles of large ones would be rounded
away.

Neither has a weight that full attention has not: a pre-trained model can read with either as it is
(`baselines.with_window`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_attention.baselines.attention import Piece, SegmentAttentionMixin
from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.baselines.modeling import SegmentModelMixin
from infini_attention.baselines.state import SegmentCache
from infini_attention.models.attention import Rotation
from infini_attention.models.runs import segment_runs
from infini_attention.ops.local import continued


@dataclass(kw_only=True)
class SlidingWindowConfigMixin(BaselineConfigMixin):
    """A sliding window: the fields of `BaselineConfigMixin`, and its own; segments are left to the data.

    Attributes:
        window: W, tokens that a token sees in each layer, itself included.
        sinks: S, how many of them are the text's first; 4 in the paper, 0 for the latest alone.
    """

    window: int = 2048
    sinks: int = 0

    def validate_baseline(self) -> None:
        """Raise ValueError for fields that cannot be right."""
        super().validate_baseline()
        self.check_counts("window")
        if not 0 <= self.sinks < self.window:
            raise ValueError(
                f"sinks is {self.sinks}, and window {self.window}; give from 0 to {self.window - 1} sinks"
            )
        known: int = self.max_position_embeddings  # type: ignore[attr-defined]
        if self.window > known:
            raise ValueError(
                f"window is {self.window}, more than the model's max_position_embeddings, {known}; give a "
                "window of at most that"
            )

    def memory_floats(self, length: int) -> int:
        """(d_key + d_value) H (W - 1) l: the next token sees itself, too, and no segment is open."""
        return self.floats_a_token * self._layers * min(length, self.window - 1)

    def keys_seen(self, layer: int, length: int) -> float:
        """Half of the window's in a text's first W tokens, all in those after."""
        first = min(length, self.window)
        return (first * first / 2 + (length - first) * (self.window - 0.5)) / length


class SlidingWindowAttentionMixin(SegmentAttentionMixin):
    """Put before a family's attention class: attention over what is cached and a block of new tokens."""

    def attend(self, query: Tensor, state: Any, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """All heads' outputs, (batch, heads, new, head_dim), for a `query` of that shape, not rotated.

        Where tokens were dropped, queries and keys have twice the width: one half is for sinks, at distances
        in the cache, the other for the latest tokens; each is 0 in keys of the other kind.
        """
        new, seen = query.shape[2], rotation[0].shape[1]
        if not self.config.sinks or seen <= self.config.window:
            return super().attend(query, state, rotation, mask)
        keys, values = continued(state.cached_key, state.key), continued(state.cached_value, state.value)
        places = torch.arange(seen, device=query.device)
        in_cache = places[-new:].clamp(max=self.config.window - 1)
        cos, sin = (x[:, in_cache] for x in rotation)
        far, _ = self._rotate(query, query[:, :0], (cos, sin))
        near, keys = self.rotated(query, keys, rotation)
        is_sink = (places < self.config.sinks)[:, None]
        query = torch.cat([far, near], dim=-1)
        keys = torch.cat([keys.masked_fill(~is_sink, 0), keys.masked_fill(is_sink, 0)], dim=-1)
        wide = F.pad(values, (0, values.shape[-1]))  # kernels want values as wide as keys
        return self.weigh(query, keys, wide, mask)[..., : values.shape[-1]]

    def close(self, state: Any, hidden_states: Tensor) -> Any:
        """The sinks and the latest tokens, W - 1 in all; copied, as views would keep all the others alive."""
        if self.config.sinks and len(lengths := set(state.length.tolist())) > 1:
            raise ValueError(
                f"rows have {min(lengths)} to {max(lengths)} tokens, and those with sinks start together; "
                "set data.carried_together, and no training.reset_probability"
            )
        key = self._kept(continued(state.cached_key, state.key))
        value = self._kept(continued(state.cached_value, state.value))
        return replace(state.forgotten(), cached_key=key, cached_value=value)

    def _kept(self, x: Tensor) -> Tensor:
        most, sinks = self.config.window - 1, self.config.sinks
        tokens = x.shape[2]
        if tokens <= most:
            return x
        return torch.cat([x[:, :, :sinks], x[:, :, tokens - (most - sinks) :]], dim=2)


class SlidingWindowModelMixin(SegmentModelMixin):
    """Put before a family's decoder class: a decoder whose tokens see a window, W at a time going through."""

    def pieces(self, length: int, seen: int) -> Iterator[slice]:
        """W tokens each, wherever they begin: scores are of W new tokens with twice as many, never of all."""
        return segment_runs(length, 1, self.config.window, 0)

    def read(self, inputs: Tensor, cache: SegmentCache, **kwargs: Any) -> Tensor:
        """Last hidden states of at most W ids, or embeddings; the cache moves on."""
        new, window = inputs.shape[1], self.config.window
        cached = min(cache.get_seq_length(), window - 1)
        positions = torch.arange(-cached, new, device=inputs.device)
        mask = window_mask(new, cached + new, window, self.config.sinks, inputs.device)
        return self.decode(inputs, positions, Piece(new, mask, ends=True), cache, **kwargs)


def window_mask(new: int, seen: int, window: int, sinks: int, device: torch.device) -> Tensor | None:
    """(new, seen) bool, True = visible, where the new tokens are the last that are seen.

    1 | 1 1 1 0 0    a sink, 2 cached tokens and 3 new ones, in a window of 4;
    1 | 0 1 1 1 0    None where all are new and in a window, and attention is causal by itself
    1 | 0 0 1 1 1
    """
    if new == seen <= window:
        return None
    places = torch.arange(seen, device=device)
    back = places[-new:, None] - places
    return (back >= 0) & ((back < window - sinks) | (places < sinks))
