"""What a family's decoder and language model gain as a baseline: texts go through them by segments."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from infini_attention.baselines.attention import Piece, SegmentAttentionMixin, mask_of_rows
from infini_attention.baselines.state import SegmentCache, SegmentState
from infini_attention.models.compat import CACHE_ARGUMENT, pop_cache
from infini_attention.models.inputs import packed_documents, padding_of
from infini_attention.models.modeling import InfiniForCausalLMMixin, InfiniPreTrainedMixin
from infini_attention.models.runs import in_runs, segment_runs


class SegmentModelMixin(InfiniPreTrainedMixin, nn.Module):
    """Put before a family's decoder class: every segment goes through all layers before the next one does.

    What a segment leaves to the next ones is in the cache, in training too, so that a text in one call, in
    pieces or token by token is the same computation.
    """

    attention_class: type[SegmentAttentionMixin]
    cache_class = SegmentCache
    supports_gradient_checkpointing = False  # it would run a layer twice, and the cache with it

    # What the family's class brings.
    config: Any
    embed_tokens: Any
    layers: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = self.attention_of(index)(config, index)
        self.post_init()  # type: ignore[operator]

    def attention_of(self, layer: int) -> type[SegmentAttentionMixin]:
        """The class of a layer's attention."""
        return self.attention_class

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        segment_weights: Tensor | None = None,
        checkpoint_segments: int | None = None,
        detach_every: int | None = None,
        stop_gradient: bool = False,
        context_group: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The decoder's last hidden states, (batch, length, hidden_size).

        Args:
            input_ids: (batch, length) token ids; or give `inputs_embeds`. Rows have no padding.
            attention_mask: (batch, seen + length), all non-zero.
            position_ids: not used: tokens are counted from a segment's start.
            inputs_embeds: (batch, length, hidden_size).
            use_cache: whether to return a cache; default `config.use_cache`.
            segment_weights: refused, as no baseline weighs segments.
            checkpoint_segments: so many segments go through the whole model at once, and again in the
                backward pass: only what they leave is kept between. Gradients are those of the whole.
            detach_every: no gradient flows past every so many segments.
            stop_gradient: refused; Transformer-XL's config has it.
            context_group: refused.
            **kwargs: a cache (`cache_class`), and whatever else the family's forward takes.

        Raises:
            ValueError: what cannot be right; the text says so and names the remedy.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        refuse_of_memories(
            segment_weights=segment_weights,
            stop_gradient=stop_gradient or None,
            context_group=context_group,
        )
        cache = pop_cache(kwargs)
        self._refuse(inputs, attention_mask, position_ids, cache, kwargs)
        if checkpoint_segments is not None or detach_every is not None:
            return in_runs(
                self,
                inputs,
                attention_mask=None,
                position_ids=None,
                segment_weights=None,
                cache=cache,
                use_cache=use_cache,
                checkpoint_segments=checkpoint_segments,
                detach_every=detach_every,
                **kwargs,
            )
        cache = self.cache_class(self.config) if cache is None else cache
        pieces = self.pieces(inputs.shape[1], cache.get_seq_length())
        hidden = [self.read(inputs[:, piece], cache, **kwargs) for piece in pieces]
        if use_cache is None:
            use_cache = self.config.use_cache
        kept: dict[str, Any] = {CACHE_ARGUMENT: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(hidden, dim=1), **kept)

    def pieces(self, length: int, seen: int) -> Iterator[slice]:
        """Of `length` tokens after `seen` ones those that go through all layers at once: a segment's."""
        return segment_runs(length, 1, self.config.segment_length, seen % self.config.segment_length)

    def read(self, inputs: Tensor, cache: SegmentCache, **kwargs: Any) -> Tensor:
        """Last hidden states of ids, or embeddings, that fall into one segment; the cache moves on."""
        seen, new = cache.get_seq_length(), inputs.shape[1]
        size = self.config.segment_length
        cached = size if self.config.local_cache and seen >= size else 0
        positions = torch.arange(-cached, seen % size + new, device=inputs.device)
        ends = (seen + new) % size == 0
        return self.decode(inputs, positions, Piece(new, None, ends), cache, **kwargs)

    def decode(
        self, inputs: Tensor, positions: Tensor, piece: Piece, cache: SegmentCache, **kwargs: Any
    ) -> Tensor:
        """The family's forward: last hidden states of `inputs`, which see tokens at these positions."""
        ids = {"input_ids": inputs} if inputs.dim() == 2 else {"inputs_embeds": inputs}
        first: Any = cache.layers[0]  # rows are of one length in all of them
        if isinstance(first.state, SegmentState):
            new, seen = inputs.shape[1], len(positions)
            mask = mask_of_rows(piece.mask, first.state.length + new, new, seen, inputs.device)
            piece = piece._replace(mask=mask)
        output = super().forward(
            **ids,
            # A mask of four dimensions keeps the family's forward from building one; nobody reads it.
            attention_mask=self.embed_tokens.weight.new_empty(0, 0, 0, 0),
            position_ids=positions[None],
            use_cache=True,
            piece=piece,
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _open_lengths(self, cache: SegmentCache) -> Tensor:
        """(1,) tokens of the open segment, of which all rows have as many."""
        return torch.tensor([cache.get_seq_length() % self.config.segment_length])

    def _refuse(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        arguments: dict[str, Any],
    ) -> None:
        """Raise ValueError for what a baseline cannot do, rather than compute something else."""
        if cache is not None and type(cache) is not self.cache_class:
            raise ValueError(
                f"the cache is a {type(cache).__name__}; pass {self.cache_class.__name__}(model.config), or "
                "none to have one made"
            )
        seen = 0 if cache is None else cache.get_seq_length()
        batch, length = inputs.shape[:2]
        if padding_of(attention_mask, batch=batch, length=length, seen=seen) is not None:
            raise ValueError("attention_mask marks padding, which baselines cannot tell; give rows without")
        bounds = packed_documents(
            position_ids, cu_seqlens=arguments.get("cu_seq_lens_q"), padding_mask=None, can_pack=True
        )
        if bounds is not None:
            raise ValueError("documents are packed, which baselines cannot tell; give one document a row")
        for name in ("output_attentions", "output_hidden_states"):
            if arguments.get(name, getattr(self.config, name)):
                raise ValueError(f"{name}=True, but segments come one by one; set {name}=False")
        if self.training and self.config.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.config.attention_dropout}, which baselines do not know; "
                "set model.config.attention_dropout = 0.0 to train"
            )


class SegmentForCausalLMMixin(InfiniForCausalLMMixin):
    """Put before a family's language-model class: the same arguments and losses as of `infini_*` models."""

    supports_gradient_checkpointing = False


def refuse_of_memories(**arguments: Any) -> None:
    """Raise ValueError for what only memories of Infini-attention take."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is set, which baselines do not know; leave it out")
