"""Transformer-XL (arXiv 1901.02860): a segment sees the whole one before it, in every layer.

Section 3.2, for layer n and segment s:

    h~_s^{n-1} = [SG(h_{s-1}^{n-1}) o h_s^{n-1}]    q = h_s^{n-1} W_q    k, v = h~_s^{n-1} W_k, h~_s^{n-1} W_v

with SG for no gradient: W_k and W_v learn from what later segments do with a cached token, the layers below
do not. RoPE (arXiv 2104.09864) stands for the relative encoding of section 3.3: cached tokens are at
positions -N to -1, those of the segment from 0, so that the distance of query and key is all that counts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from infini_attention.baselines.attention import SegmentAttentionMixin
from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.baselines.state import SegmentState, no_tokens
from infini_attention.ops.local import continued


@dataclass(kw_only=True)
class TransformerXLConfigMixin(BaselineConfigMixin):
    """A Transformer-XL: the fields of `BaselineConfigMixin`, and its own.

    Attributes:
        stop_gradient: SG above; False lets gradients flow through the cache into the layers below, which then
            learn what later segments want of them. Training only.
    """

    stop_gradient: bool = True

    local_cache = True

    def memory_floats(self, length: int) -> int:
        """(d_key + d_value) H N l."""
        return self.floats_a_token * self._layers * min(self.whole_segments(length), 1) * self.segment_length

    def keys_seen(self, layer: int, length: int) -> float:
        """Those of its own segment up to it, and those of the one before."""
        return self.mean_keys(length, lambda start: self.segment_length if start else 0)


@dataclass
class TransformerXLState(SegmentState):
    """A SegmentState, and in training what the cached keys and values are made of.

    Attributes:
        cached_hidden: SG(h) of the whole segment before, (batch, tokens, hidden_size); no tokens where there
            are no gradients to come, or where it came in several calls.
    """

    cached_hidden: Tensor

    def carried(self) -> "TransformerXLState":
        """SG(h) alone where it is there: the next step makes keys and values of it, by its own weights."""
        state = self.detach()
        if not state.cached_hidden.shape[1]:
            return state
        none = no_tokens(state.cached_key)
        return replace(state, cached_key=none, cached_value=none)


class TransformerXLAttentionMixin(SegmentAttentionMixin):
    """Put before a family's attention class: attention over a segment and the one before it, cached whole."""

    state_class: type[SegmentState] = TransformerXLState

    def resumed(self, state: Any) -> Any:
        """With keys and values where only SG(h) was carried."""
        if not state.cached_hidden.shape[1] or state.cached_key.shape[2]:
            return state
        _, key, value = self._project(state.cached_hidden)
        return replace(state, cached_key=key, cached_value=value)

    def close(self, state: Any, hidden_states: Tensor) -> Any:
        """The segment as the next one's cache, unless `config.local_cache` is False.

        Where there are gradients to come, keys and values are made anew from SG(h), if the config says so: of
        all tokens, if the segment came whole, as in training; of the last ones, if it came in several calls.
        """
        if not self.config.local_cache:
            return super().close(state, hidden_states)
        if not self.config.stop_gradient:
            return replace(state.forgotten(), cached_key=state.key, cached_value=state.value)
        key, value = state.key.detach(), state.value.detach()
        hidden = hidden_states.detach()
        kept = hidden.new_empty(len(hidden), 0, hidden.shape[2])  # no view, which would keep all of it alive
        if torch.is_grad_enabled():
            earlier = key.shape[2] - hidden.shape[1]
            _, latest_key, latest_value = self._project(hidden)
            key = continued(key[:, :, :earlier], latest_key)
            value = continued(value[:, :, :earlier], latest_value)
            kept = kept if earlier else hidden
        return replace(state.forgotten(), cached_key=key, cached_value=value, cached_hidden=kept)
