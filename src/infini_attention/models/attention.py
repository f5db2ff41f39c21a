"""The one attention layer of all families: the family's projections, norms and rotation over a memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infini_attention.layers import MemoryGate, ShortConvolution
from infini_attention.models.cache import InfiniCache, InfiniStepCache, Reading
from infini_attention.models.compat import pop_cache
from infini_attention.models.config import convolved_channels
from infini_attention.ops import MemoryState, infini_attention
from infini_attention.ops.context_parallel import incoming_recent, incoming_state
from infini_attention.ops.convolution import recent_after
from infini_attention.ops.flags import flags
from infini_attention.ops.step import infini_attention_step
from infini_attention.ops.write import write_whole

Rotation = tuple[Tensor, Tensor]
"""(cos, sin) of rotary positions, each (batch or 1, length, rotated_dim)."""


class SegmentContext(NamedTuple):
    """What every layer with a memory needs to know about one forward call; made once, by the model.

    A tuple of tensors and dicts, so that whatever moves a layer's arguments between devices moves it too.

    Attributes:
        padding_mask: (batch, length) bool, True = a real token; None when all are.
        cu_seqlens: (documents + 1,) for packed documents, else None.
        rotations: by type of layer, the rotation at each token's position inside its own segment.
        context_rotations: the same at that position less what local attention sees outside a segment: of keys
            as later segments see them. None where it sees nothing there.
        document_positions: of each token inside its own document, (length,), for packed ones, else None.
        segment_weights: (rows, segments) how often each segment counts in memory; None for once.
        context_group: the process group whose ranks hold runs of segments of these rows, if there is one.
        tokens_before: (batch,) what rows have before this process's run; None without a group.
        stop_gradient: whether gradients that come from later segments end at what keys and values are made
            of.
    """

    padding_mask: Tensor | None
    cu_seqlens: Tensor | None
    rotations: dict[str, Rotation]
    document_positions: Tensor | None = None
    segment_weights: Tensor | None = None
    context_group: Any = None
    tokens_before: Tensor | None = None
    context_rotations: dict[str, Rotation] | None = None
    stop_gradient: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether all rows are whole, each segment counts once, and this process has all of them."""
        return self.padding_mask is None and self.segment_weights is None and self.context_group is None


class FamilyAttentionMixin(nn.Module):
    """A family's attention class without the way it attends: its projections, norms and rotation."""

    apply_rotary: Callable[..., Rotation]
    """The family's own rotary function."""

    softcap: float | None = None
    """What the family's local scores are capped at, if they are."""

    # What the family's class brings; not every family has the norms.
    config: Any
    layer_idx: Any
    head_dim: Any
    scaling: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value in value's dtype: (batch, heads or kv_heads, length, head_dim)."""
        projections = self.q_proj, self.k_proj, self.v_proj
        return self._in_heads(*(projection(hidden_states) for projection in projections))

    def _in_heads(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from query, key and value as projected, (batch, length, heads * head_dim)."""
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        # Under autocast a norm or a rotation may come out wider than the projections.
        return query.to(value.dtype), key.to(value.dtype), value

    def _rotate(self, query: Tensor, key: Tensor, rotation: Rotation) -> Rotation:
        if not getattr(self, "use_rope", True):
            return query, key
        local_query, local_key = self.apply_rotary(query, key, *rotation)
        return local_query.to(query.dtype), local_key.to(key.dtype)

    def _rotate_key(self, key: Tensor, rotation: Rotation) -> Tensor:
        return self._rotate(key[:, :0], key, rotation)[1]


class InfiniAttentionMixin(FamilyAttentionMixin):
    """Put before a family's attention class: same projections and parameter names, and a memory.

    Queries and keys go to the memory as they come from the projections (and from a short convolution and
    norms, where the model has them), before rotation; local attention sees them rotated by positions that
    restart in every segment, and keys of outside by positions before it.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.memory_gate = MemoryGate(config.num_attention_heads, init=config.gate_init)
        if config.short_convolution:
            self.short_convolution = ShortConvolution(convolved_channels(config), config.short_convolution)
        self.rotation_type = config.layer_type(layer_idx)  # no number, for which each would compile anew

    def forward(
        self, hidden_states: Tensor, *, segment_context: SegmentContext, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attend; `hidden_states` is (batch, length, hidden_size), and so is the output.

        Of the arguments that decoder layers pass, the absolute rotation and the attention mask are not used:
        `segment_context` holds what stands for them. The cache, if any, is an InfiniCache.
        """
        cache = pop_cache(kwargs)
        if isinstance(cache, InfiniStepCache):
            output = self._step(hidden_states, cache, segment_context)
        else:
            output = self._read(hidden_states, cache, segment_context)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None

    def _step(self, hidden_states: Tensor, cache: InfiniStepCache, segment_context: SegmentContext) -> Tensor:
        """All heads' outputs for one token a row, whose states change in place."""
        recent = cache.recent(self.layer_idx)
        query, key, value, seen = self.project(hidden_states, recent, segment_context)
        settings = self._settings(query, key, segment_context)
        if segment_context.context_rotations is not None:
            settings["context_key"] = self._context_key(key, segment_context)
        tensors = query, key, value, self.memory_gate(), cache.buffers
        output = infini_attention_step(*tensors, self.layer_idx, width=cache.width, **settings)
        cache.buffers.look_back(self.layer_idx, None if seen is None else seen[:, 1:])
        return output

    def _read(
        self, hidden_states: Tensor, cache: InfiniCache | None, segment_context: SegmentContext
    ) -> Tensor:
        """All heads' outputs, (batch, heads, length, head_dim); the cache moves on."""
        if cache is None:
            return self._attend(hidden_states, None, segment_context, goes_on=False)[0]
        before, again = _state_of(cache, self)
        size = self.config.segment_length
        # A shorter call has no rotations of a whole segment, a padded one others: they go on from the state.
        if again is not None and segment_context.is_plain and hidden_states.shape[1] >= size:
            written = self._write_again(again, segment_context, hidden_states.dtype)
            before = _of_rows_that_go_on(written, again)
        output, state = self._attend(hidden_states, before, segment_context)
        _hand_on(cache, self, state, Reading(before, hidden_states), segment_context)
        return output

    def _attend(
        self,
        hidden_states: Tensor,
        before: MemoryState | None,
        segment_context: SegmentContext,
        *,
        goes_on: bool = True,
    ) -> tuple[Tensor, MemoryState]:
        """All heads' outputs, and the state after these tokens, which come after the state `before`.

        Unless it `goes_on`, the state lacks what a short convolution would look back at.
        """
        recent = None if before is None else before.open_recent
        query, key, value, seen = self.project(hidden_states, recent, segment_context)
        settings = self._settings(query, key, segment_context)
        stopped = segment_context.stop_gradient and torch.is_grad_enabled()
        if stopped:
            settings["local_value"] = value
            seen_before = None if recent is None else recent.detach()
            _, key, value, _ = self.project(hidden_states.detach(), seen_before, segment_context)
        if segment_context.context_rotations is not None:
            settings["context_key"] = self._context_key(key, segment_context)
            if stopped:
                settings["context_value"] = value
        if segment_context.context_group is not None:
            before = self._incoming(key, value, before, segment_context)
        output, state = infini_attention(
            query,
            key,
            value,
            self.memory_gate(),
            segment_length=self.config.segment_length,
            local_attention=self.config.local_attention,
            sink_tokens=self.config.sink_tokens,
            state=before,
            padding_mask=segment_context.padding_mask,
            cu_seqlens=segment_context.cu_seqlens,
            segment_weights=segment_context.segment_weights,
            **settings,
        )
        if goes_on and seen is not None:
            state = _looking_back(state, before, seen, self.config.short_convolution - 1)
        return output, state

    def _write_again(
        self, reading: Reading, segment_context: SegmentContext, dtype: torch.dtype
    ) -> MemoryState:
        """The state after what was read, made anew by the key and value projections."""
        before, size = reading.before, self.config.segment_length
        recent = None if before is None else before.open_recent
        hidden = reading.hidden.to(dtype)
        _, key, value, seen = self.project(hidden, recent, segment_context)
        context_key = None
        if segment_context.context_rotations is not None:
            cos, sin = segment_context.context_rotations[self.rotation_type]
            times = hidden.shape[1] // size
            rotation = cos[:, :size].repeat(1, times, 1), sin[:, :size].repeat(1, times, 1)
            context_key = self._rotate_key(key, rotation)
        state = write_whole(
            key,
            value,
            segment_length=size,
            update_rule=self.config.update_rule,
            feature_map=self.config.feature_map,
            normalization=self.config.normalization,
            local_attention=self.config.local_attention,
            sink_tokens=self.config.sink_tokens,
            context_key=context_key,
            state=before,
        )
        if seen is not None:
            state = _looking_back(state, before, seen, self.config.short_convolution - 1)
        return state

    def _settings(self, query: Tensor, key: Tensor, segment_context: SegmentContext) -> dict[str, Any]:
        """What attention takes beside its tensors, of one token or many."""
        rotation = segment_context.rotations[self.rotation_type]
        local_query, local_key = self._rotate(query, key, rotation)
        return {
            "local_query": local_query,
            "local_key": local_key,
            "update_rule": self.config.update_rule,
            "feature_map": self.config.feature_map,
            "normalization": self.config.normalization,
            "empty_memory": self.config.empty_memory,
            "scale": self.scaling,
            "softcap": self.softcap,
        }

    def _context_key(self, key: Tensor, segment_context: SegmentContext) -> Tensor:
        """Keys as later segments see them."""
        assert segment_context.context_rotations is not None
        return self._rotate_key(key, segment_context.context_rotations[self.rotation_type])

    def project(
        self, hidden_states: Tensor, recent: Tensor | None, segment_context: SegmentContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key and value of what `_project` says, with the model's short convolution.

        `recent` is what that looks back at, and what it has seen comes last; see `ops.convolution`.
        """
        if not self.config.short_convolution:
            return *self._project(hidden_states), None
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        both = torch.cat([query, key], dim=-1)
        if segment_context.context_group is not None:
            before = self.config.short_convolution - 1
            recent = incoming_recent(both, recent, before, segment_context.context_group)
        mixed, seen = self.short_convolution(
            both,
            recent,
            document_positions=segment_context.document_positions,
            padding_mask=segment_context.padding_mask,
        )
        query, key = mixed.split([query.shape[-1], key.shape[-1]], dim=-1)
        packed = segment_context.cu_seqlens is not None  # and packed documents end with their call
        return *self._in_heads(query, key, self.v_proj(hidden_states)), None if packed else seen

    def _incoming(
        self, key: Tensor, value: Tensor, state: MemoryState | None, segment_context: SegmentContext
    ) -> MemoryState:
        """The state before this process's first token."""
        assert segment_context.tokens_before is not None
        return incoming_state(
            key,
            value,
            segment_length=self.config.segment_length,
            update_rule=self.config.update_rule,
            feature_map=self.config.feature_map,
            normalization=self.config.normalization,
            segment_weights=segment_context.segment_weights,
            state=state,
            tokens_before=segment_context.tokens_before,
            group=segment_context.context_group,
        )


# Which layer's state it is must not be known to what is compiled: that would be anew for each.
@torch.compiler.disable
def _state_of(
    cache: InfiniCache, attention: FamilyAttentionMixin
) -> tuple[MemoryState | None, Reading | None]:
    """What the layer carries from its earlier calls, and what it is to read again in place of that."""
    layer: Any = cache.layers[attention.layer_idx]
    again, layer.again = layer.again, None
    return layer.state, again


@torch.compiler.disable
def _of_rows_that_go_on(state: MemoryState, again: Reading) -> MemoryState:
    """The state after what was read again, without rows whose text is over."""
    return (state if again.ended is None else state.forget(again.ended)).recounted()


@torch.compiler.disable
def _hand_on(
    cache: InfiniCache,
    attention: FamilyAttentionMixin,
    state: MemoryState,
    reading: Reading,
    segment_context: SegmentContext,
) -> None:
    """Have the cache carry the `state` after what was read, and that too where it is wanted."""
    layer: Any = cache.layers[attention.layer_idx]
    layer.advance(state, reading.hidden.shape[1])
    layer.reading = None
    if layer.keeps_readings and segment_context.is_plain and _whole(reading.before) and _whole(state):
        layer.reading = replace(reading, hidden=_stopped(reading.hidden))


def _whole(state: MemoryState | None) -> bool:
    """Whether no segment is open."""
    return state is None or not bool(state.open_length.any())


def _stopped(hidden: Tensor) -> Tensor:
    """SG(h), in the precision in which projections take it."""
    kind = hidden.device.type
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.detach().to(wanted)


@torch.compiler.disable
def _looking_back(state: MemoryState, before: MemoryState | None, seen: Tensor, recent: int) -> MemoryState:
    """The new `state` with what its next tokens look back at, `recent` tokens of what was `seen`.

    `before` is the state that the call went on from. What is kept for an open segment's first token stays
    where that came with an earlier call.
    """
    tokens = state.length - (0 if before is None else before.length)
    whole = tokens - state.open_length  # the call's tokens up to the last end of a segment
    began = recent_after(seen, recent, whole.clamp(min=0))
    earlier = (whole < 0).tolist()
    if before is not None and before.recent is not None and any(earlier):
        began = torch.where(flags(earlier, seen.device)[:, None, None], before.recent, began)
    return replace(state, recent=began, open_recent=recent_after(seen, recent, tokens))
