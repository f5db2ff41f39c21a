"""The attention layer that baselines share: causal, over one segment and the one cached before it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from infini_attention.baselines.state import SegmentState
from infini_attention.models.attention import FamilyAttentionMixin, Rotation
from infini_attention.models.compat import pop_cache
from infini_attention.ops.local import continued, local_attention


class Piece(NamedTuple):
    """What every layer needs to know about new tokens that fall into one segment; made by the model.

    Attributes:
        tokens: how many of the text's there are.
        mask: (new, seen) bool, True = visible, where the new ones are the last that are seen, or of each row,
            (batch, 1, new, seen); None where each sees all up to itself.
        ends: whether they complete the segment.
    """

    tokens: int
    mask: Tensor | None
    ends: bool


class SegmentAttentionMixin(FamilyAttentionMixin):
    """Put before a family's attention class: same projections and parameter names, segment by segment.

    By itself it is local: nothing is kept of a segment that is complete. Systems replace that (`close`), and
    what tokens see (`attend`), which is their own segment and what is cached of the one before.
    """

    state_class: type[SegmentState] = SegmentState

    # What is cached differs from segment to segment, and for each all would be compiled anew.
    @torch.compiler.disable
    def forward(
        self, hidden_states: Tensor, *, position_embeddings: Rotation, piece: Piece, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attend; `hidden_states` is (batch, new tokens, hidden_size), and so is the output.

        `position_embeddings` are those of all tokens that are seen, of which the new ones are the last.
        """
        query, key, value = self._project(hidden_states)
        layer = pop_cache(kwargs).layers[self.layer_idx]
        before = self.state_class.before(key, value) if layer.state is None else self.resumed(layer.state)
        state = before.extended(key, value)
        output = self.attend(query, state, position_embeddings, piece.mask)
        layer.advance(self.close(state, hidden_states) if piece.ends else state, piece.tokens)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None

    def resumed(self, state: Any) -> Any:
        """A state that an earlier call has left, as this one reads it."""
        return state

    def attend(self, query: Tensor, state: Any, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """All heads' outputs, (batch, heads, new, head_dim), for a `query` of that shape, not rotated."""
        keys = continued(state.cached_key, state.key)
        values = continued(state.cached_value, state.value)
        return self.weigh(*self.rotated(query, keys, rotation), values, mask)

    def rotated(self, query: Tensor, keys: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Query and keys with their positions, of which the query's are the last."""
        cos, sin = (x[:, -query.shape[2] :] for x in rotation)
        query, _ = self._rotate(query, query[:, :0], (cos, sin))
        _, keys = self._rotate(keys[:, :0], keys, rotation)
        return query, keys

    def weigh(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of `values` by the softmax of scores, each query seeing what `mask` allows.

        Without one, the last query is at the last key and each sees all up to itself.
        """
        group = query.shape[1] // keys.shape[1]
        masked = mask is not None or query.shape[2] < keys.shape[2]
        if masked and group > 1:  # kernels for groups take no mask: all scores would exist at once
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        return local_attention(query, keys, values, scale=self.scaling, softcap=self.softcap, mask=mask)

    def close(self, state: Any, hidden_states: Tensor) -> Any:
        """What is kept of a segment that its last tokens, `hidden_states`, have completed."""
        return state.forgotten()


def mask_of_rows(
    mask: Tensor | None, length: Tensor, new: int, seen: int, device: torch.device
) -> Tensor | None:
    """`mask` where rows see all that is kept; else (batch, 1, new, seen), of which a row sees its own text.

    `length` is (batch,), each row's tokens with the `new` ones, which are the last that are seen.
    """
    if bool((length >= seen).all()):
        return mask
    if mask is None:
        mask = torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)
    first = (seen - length).to(device)  # place of the row's first token that is kept
    return mask & (torch.arange(seen, device=device) >= first[:, None, None, None])


def with_gradient_of(x: Tensor, *parameters: Tensor) -> Tensor:
    """`x` as it is, of which parameters that took no part in it have a gradient of zero.

    Sharded weights must have gradients in all processes, or in none.
    """
    nothing = 0 * torch.stack([parameter.sum() for parameter in parameters]).sum()
    return x + nothing.to(x.dtype)
