"""Modules over `ops`: one gate, one attention layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from infini_attention.ops import MemoryState, infini_attention, segment_positions
from infini_attention.ops.convolution import short_convolution
from infini_attention.ops.local import context_tokens


class MemoryGate(nn.Module):
    """One learned logit a head; its sigmoid is the memory's share of that head's output (beta, equation 10).

    A module of its own, so that optimisers, adapters and sharding can treat it by itself. The logits stay
    fp32 whatever the model is converted to: bf16 logits get stuck between neighbouring values.
    """

    def __init__(self, heads: int, init: float = 0.0) -> None:
        super().__init__()
        self.init = init
        self.logits = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every logit to the initial value."""
        nn.init.constant_(self.logits, self.init)

    def forward(self) -> Tensor:
        """The logits, (heads,) fp32 (fp64 after `.double()`)."""
        return self.logits.clone()  # what FSDP gathers for this call alone is gone after it

    def extra_repr(self) -> str:
        """Heads and initial value, for `print(model)`."""
        return f"heads={len(self.logits)}, init={self.init}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryGate":
        def keep_precision(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            narrowed = changed.is_floating_point() and changed.element_size() < 4
            return tensor.to(changed.device) if narrowed else changed

        return super()._apply(keep_precision, recurse)


class ShortConvolution(nn.Module):
    """Every channel's learned mixture of a token and those just before it; see `ops.convolution`.

    Fresh weights begin at random: a query and a key can then match by what stands just before them. As the
    identity it changes nothing.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as torch's own convolutions do: uniform within 1 / sqrt(width)."""
        nn.init.uniform_(self.weight, -self.bound, self.bound)

    @property
    def bound(self) -> float:
        """The largest absolute value of a fresh weight."""
        return float(self.weight.shape[1] ** -0.5)

    def become_identity(self) -> "ShortConvolution":
        """Let every token be itself alone."""
        with torch.no_grad():
            self.weight.zero_()[:, 0] = 1
        return self

    def forward(
        self,
        x: Tensor,
        recent: Tensor | None,
        *,
        document_positions: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mixtures, of x's shape and dtype, and what was seen; see `ops.convolution`."""
        return short_convolution(
            x, self.weight, recent, document_positions=document_positions, padding_mask=padding_mask
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        channels, width = self.weight.shape
        return f"channels={channels}, width={width}"


class InfiniAttention(nn.Module):
    """A self-attention layer of unbounded reach: projections, rotary positions, `infini_attention`.

    Equations (5) to (11) of arXiv 2404.07143. Rotary positions (arXiv 2104.09864) restart in every segment
    and act on the local part only; keys and queries go to memory un-rotated. Where a token sees C tokens
    outside its segment, token j of a segment is C + j - i from token i of those.

    Args:
        hidden_size: width of the model.
        heads: number of query heads.
        segment_length: N, tokens a segment.
        kv_heads: number of key/value heads, each with one memory; default `heads`.
        head_dim: width of a head; default hidden_size // heads.
        update_rule: "linear" or "delta".
        feature_map: a name of `ops.feature_maps`.
        normalization: of what memory answers: "sum", "root", "none" or "unit"; see `infini_attention`.
        empty_memory: "local" or "gated"; see `infini_attention`.
        local_attention: "segment", "sliding" or "sink"; see `infini_attention`.
        sink_tokens: how many of the first tokens "sink" keeps in sight, at most segment_length.
        rope_theta: base of the rotary frequencies; None for no position embedding.
        qk_norm: RMS-normalise queries and keys per head before anything else.
        bias: give the projections a bias.
        gate_init: initial logit of every head's gate.
        backend: as in `infini_attention`.

    Raises:
        ValueError: sizes that do not divide, or a local attention that cannot be right.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        segment_length: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        update_rule: str = "linear",
        feature_map: str = "elu1",
        normalization: str = "sum",
        empty_memory: str = "local",
        local_attention: str = "segment",
        sink_tokens: int = 4,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = False,
        bias: bool = False,
        gate_init: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1:
            raise ValueError(f"heads is {heads} and kv_heads {kv_heads}; give at least 1 of each")
        if head_dim is None and hidden_size % heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of heads {heads}; give head_dim")
        if heads % kv_heads:
            raise ValueError(
                f"heads {heads} is not a multiple of kv_heads {kv_heads}; choose a divisor of heads"
            )
        head_dim = hidden_size // heads if head_dim is None else head_dim
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"head_dim {head_dim} is odd, which rotary positions cannot split; make it even")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.segment_length = segment_length
        self.update_rule = update_rule
        self.feature_map = feature_map
        self.normalization = normalization
        self.empty_memory = empty_memory
        self.local_attention, self.sink_tokens = local_attention, sink_tokens
        self.context_tokens = context_tokens(
            local_attention, segment_length=segment_length, sink_tokens=sink_tokens
        )
        self.rope_theta = rope_theta
        self.backend = backend
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.memory_gate = MemoryGate(heads, gate_init)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        state: MemoryState | None = None,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        segment_weights: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """Attend over `hidden_states` and everything `state` remembers.

        `hidden_states` is (batch, length, hidden_size); the other arguments are those of
        `infini_attention`. Returns the output, of the same shape and dtype, and the new state.
        """
        query = self.q_norm(self._split_heads(self.q_proj(hidden_states)))
        key = self.k_norm(self._split_heads(self.k_proj(hidden_states)))
        value = self._split_heads(self.v_proj(hidden_states))
        positions = segment_positions(
            hidden_states.shape[1],
            segment_length=self.segment_length,
            open_lengths=None if state is None else state.open_length,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            device=hidden_states.device,
        )
        output, state = infini_attention(
            query,
            key,
            value,
            self.memory_gate(),
            segment_length=self.segment_length,
            local_query=self._rotate(query, positions),
            local_key=self._rotate(key, positions),
            context_key=self._rotate(key, positions - self.context_tokens) if self.context_tokens else None,
            update_rule=self.update_rule,
            feature_map=self.feature_map,
            normalization=self.normalization,
            empty_memory=self.empty_memory,
            local_attention=self.local_attention,
            sink_tokens=self.sink_tokens,
            state=state,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            segment_weights=segment_weights,
            backend=self.backend,
        )
        return self.o_proj(output.transpose(1, 2).flatten(2)), state

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rope_theta is None else rotate(x, positions, self.rope_theta)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding: `x` (batch, heads, length, head_dim), `positions` (batch or 1, length).

    Pairs are (i, i + head_dim / 2), angles fp32; the result has x's dtype.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = (positions.to(torch.float32)[..., None] * frequencies).unsqueeze(1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
