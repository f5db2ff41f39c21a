"""What a family's decoder and its language model gain over their base classes."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from infini_attention.layers import MemoryGate, ShortConvolution
from infini_attention.models.attention import InfiniAttentionMixin, Rotation, SegmentContext
from infini_attention.models.cache import InfiniCache, InfiniCacheLayer, InfiniStepCache
from infini_attention.models.compat import CACHE_ARGUMENT, pop_cache
from infini_attention.models.inputs import packed_documents, padding_of, positions_of
from infini_attention.models.loss import Teaching, asked_for, chunked_loss, logits_of, shifted
from infini_attention.models.runs import in_runs
from infini_attention.ops import MemoryState, segment_positions
from infini_attention.ops.context_parallel import tokens_before
from infini_attention.ops.options import unreadable

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class InfiniPreTrainedMixin:
    """Class attributes and initialisation that decoder and language model share."""

    _no_split_modules: Any  # names of modules that are sharded by themselves
    _is_stateful = True  # refuses assisted decoding: a memory cannot take tokens back
    _supports_attention_backend = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have sharding treat a gate by itself: it stays fp32 beside parameters that do not."""
        super().__init_subclass__(**kwargs)
        theirs = getattr(cls, "_no_split_modules", None) or []
        cls._no_split_modules = [*theirs, MemoryGate.__name__]

    # On the decoder as well as on the language model: transformers initialises the parameters that a
    # checkpoint lacks through the innermost model around them.
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, MemoryGate):
            initialization.constant_(module.logits, module.init)
        elif isinstance(module, ShortConvolution):
            initialization.uniform_(module.weight, -module.bound, module.bound)


class InfiniModelMixin(InfiniPreTrainedMixin, nn.Module):
    """Put before a family's decoder class: gives layers a memory, and tells them where segments are cut."""

    attention_class: type[InfiniAttentionMixin]
    cache_class = InfiniCache

    # What the family's class brings.
    config: Any
    embed_tokens: Any
    layers: Any
    rotary_emb: Any
    gradient_checkpointing: bool

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in config.infini_layers:
            self.layers[layer].self_attn = self.attention_class(config, layer)
        self.post_init()  # type: ignore[operator]

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
    ) -> Any:
        """The family's forward, with a memory in the layers of `config.infini_layers`.

        Args:
            input_ids: (batch, length) token ids; or give `inputs_embeds`.
            attention_mask: (batch, seen + length), non-zero = a real token, where `seen` is the number of
                tokens the cache has seen. Padding may stand anywhere; a padded row equals its unpadded self.
            position_ids: (batch or 1, length). Layers with a memory count for themselves; these serve the
                other layers, and mark packed documents where they restart at 0.
            inputs_embeds: (batch, length, hidden_size).
            use_cache: whether to return a cache; default `config.use_cache`, but False when documents are
                packed or activations checkpointed.
            segment_weights: (batch, segments) how often each segment of this call counts in memory, for
                training; see `infini_attention.ops.infini_attention`.
            checkpoint_segments: so many segments go through the whole model at once, and again in the
                backward pass: only their states are kept between. Gradients are those of the whole.
            detach_every: gradients do not flow through the memory past every so many segments.
            stop_gradient: what memory is to hold, and what later segments see, teaches each layer's key and
                value projections, and not the layers below, as in Transformer-XL (arXiv 1901.02860, SG).
                Outputs are the same.
            context_group: a torch.distributed process group whose ranks hold runs of whole segments of the
                same sequences, in order; see `infini_attention.ops.context_parallel`.
            **kwargs: a cache (InfiniCache), `cu_seq_lens_q` (documents + 1,) for documents packed into a
                batch of one, and whatever else the family's forward takes.

        Raises:
            ValueError: what cannot be right with a memory; the text says so and names the remedy.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        batch, length = inputs.shape[:2]
        cache = pop_cache(kwargs)
        self._refuse(cache, kwargs)
        if checkpoint_segments is not None or detach_every is not None:
            if context_group is not None:
                raise ValueError(
                    "context_group is set, and each of its processes takes its run of segments whole; leave "
                    "out checkpoint_segments and detach_every, or use model.gradient_checkpointing_enable()"
                )
            if stop_gradient and self.config.short_convolution:
                raise ValueError(
                    "stop_gradient is set and queries and keys look back over the ends of runs "
                    f"(short_convolution {self.config.short_convolution}); leave out checkpoint_segments and "
                    "detach_every"
                )
            self.config.check_every_layer_has_memory()
            return in_runs(
                self,
                inputs,
                attention_mask=attention_mask,
                position_ids=position_ids,
                segment_weights=segment_weights,
                cache=cache,
                use_cache=use_cache,
                checkpoint_segments=checkpoint_segments,
                detach_every=detach_every,
                stop_gradient=stop_gradient,
                **kwargs,
            )
        if isinstance(cache, InfiniStepCache) and (length != 1 or batch != len(cache.buffers.used)):
            raise ValueError(
                f"an InfiniStepCache of {len(cache.buffers.used)} rows takes as many ids, one a row, and got "
                f"({batch}, {length}); use an InfiniCache for anything else"
            )
        seen = 0 if cache is None else cache.get_seq_length()

        padding_mask = padding_of(attention_mask, batch=batch, length=length, seen=seen)
        cu_seqlens = packed_documents(
            position_ids,
            cu_seqlens=kwargs.get("cu_seq_lens_q"),
            padding_mask=padding_mask,
            can_pack=batch == 1 and cache is None and attention_mask is None and not use_cache,
        )
        if use_cache is None:
            use_cache = self.config.use_cache and cu_seqlens is None and not self._checkpoints_activations
        before = None
        if context_group is not None:
            self._check_context(padding_mask, cu_seqlens)
            state = self._first_state(cache)
            size = self.config.segment_length
            before = tokens_before(length, batch, segment_length=size, state=state, group=context_group)
        if use_cache and cache is None:
            cache = self.cache_class(self.config)

        like = self.embed_tokens.weight if inputs_embeds is None else inputs_embeds
        if isinstance(cache, InfiniStepCache):
            positions = cache.buffers.used[:, None]
        else:
            positions = segment_positions(
                length,
                segment_length=self.config.segment_length,
                open_lengths=self._open_lengths(cache),
                padding_mask=padding_mask,
                cu_seqlens=cu_seqlens,
                device=like.device,
            )
        if self.config.layers_without_memory:
            if position_ids is None:
                position_ids = _absolute_positions(attention_mask, cu_seqlens, length)
            masks = self._ordinary_masks(
                attention_mask, position_ids, cache, like.new_empty(batch, length, 0)
            )
        else:
            # Nobody reads these two. A mask that already has four dimensions keeps the family's forward from
            # building one of length x length; short positions keep its rotary embedding in range.
            masks, position_ids = like.new_empty(0, 0, 0, 0), positions
        rotations, context_rotations = self._rotations(like, positions)
        return super().forward(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            segment_context=SegmentContext(
                padding_mask,
                cu_seqlens,
                rotations,
                None if cu_seqlens is None else positions_of(cu_seqlens, length)[0].to(like.device),
                segment_weights,
                context_group,
                before,
                context_rotations,
                stop_gradient,
            ),
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )

    @property
    def _checkpoints_activations(self) -> bool:
        return self.gradient_checkpointing and self.training

    def _rotations(
        self, like: Tensor, positions: Tensor
    ) -> tuple[dict[str, Rotation], dict[str, Rotation] | None]:
        """`rotations` and `context_rotations` of a SegmentContext, of tokens at these places in segments."""
        types = sorted({self.config.layer_type(layer) for layer in self.config.infini_layers})
        outside = self.config.context_tokens
        if not outside:
            return {kind: self._rotation(like, positions, kind) for kind in types}, None
        # Both at once: some embeddings choose their frequencies by the largest position that they are given.
        both = torch.cat([positions, positions - outside], dim=1)
        tables = {kind: self._rotation(like, both, kind) for kind in types}
        own, seen_later = slice(positions.shape[1]), slice(positions.shape[1], None)
        return (
            {kind: (cos[:, own], sin[:, own]) for kind, (cos, sin) in tables.items()},
            {kind: (cos[:, seen_later], sin[:, seen_later]) for kind, (cos, sin) in tables.items()},
        )

    def _rotation(self, like: Tensor, positions: Tensor, layer_type: str) -> Rotation:
        cos, sin = self.rotary_emb(like, positions)
        return cos, sin

    def _open_lengths(self, cache: InfiniCache | None) -> Tensor | None:
        """(batch,) tokens of each row's open segment; None at the start."""
        state = self._first_state(cache)
        return None if state is None else state.open_length

    def _first_state(self, cache: InfiniCache | None) -> MemoryState | None:
        """The state of the first layer with a memory, as long as all others'; None at the start."""
        if cache is None:
            return None
        layer = cache.layers[self.config.infini_layers[0]]
        assert isinstance(layer, InfiniCacheLayer)
        return layer.state

    def _ordinary_masks(
        self, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any, inputs: Tensor
    ) -> Any:
        """What to give the family's forward as attention mask, for its layers without a memory.

        `inputs` (batch, length, 0) stands for the embeddings. Where a family has layers of several types, it
        takes a mask by type, and one is built for those types only that layers without a memory are of.
        """
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is None:
            return attention_mask
        needed = {layer_types[layer] for layer in self.config.layers_without_memory}
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE_ARGUMENT: cache,
        }
        return {kind: make(**arguments) if kind in needed else None for kind, make in MASKS.items()}

    def _refuse(self, cache: Any, arguments: dict[str, Any]) -> None:
        """Raise ValueError for what a memory cannot do, rather than compute something else."""
        if cache is not None:
            self._check_cache(cache)
        if arguments.get("output_attentions", self.config.output_attentions):
            raise ValueError(
                "output_attentions=True, but attention through a memory has no (length x length) weights to "
                "return; set output_attentions=False"
            )
        if arguments.get("is_causal", getattr(self.config, "is_causal", None)) is False:
            raise ValueError(
                "is_causal=False, but a memory of the past is causal by nature; use the base model"
            )
        if self.training and self.config.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.config.attention_dropout}, and dropping attention weights has "
                "no meaning for a memory; set model.config.attention_dropout = 0.0 to train"
            )
        if _splits_sequences():
            raise ValueError(
                "accelerate's context or sequence parallelism splits sequences over processes, and a memory "
                "needs them in order; use data parallelism, or FSDP"
            )

    def _check_context(self, padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        """Raise ValueError where processes cannot share out a sequence."""
        self.config.check_every_layer_has_memory()
        if self.config.context_tokens:
            raise ValueError(
                f"context_group is set, and with local_attention {self.config.local_attention!r} tokens see "
                "keys that another process holds; use data parallelism, or local_attention='segment'"
            )
        if padding_mask is not None or cu_seqlens is not None:
            raise ValueError(
                "context_group is set, and rows are padded or packed: their cuts would not fall where "
                "processes end; give whole rows of equal length, or use data parallelism"
            )

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, InfiniCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}, which has no room for a memory; "
                "pass InfiniCache(model.config), or none to have one made"
            )
        layers = [index for index, layer in enumerate(cache.layers) if isinstance(layer, InfiniCacheLayer)]
        if layers != sorted(self.config.infini_layers):
            raise ValueError(
                f"the cache has memories in layers {layers}, the model in {self.config.infini_layers}; "
                "pass InfiniCache(model.config) of this model"
            )
        if self._checkpoints_activations:
            raise ValueError(
                "gradient checkpointing runs layers twice, and a cache would count their tokens twice; feed "
                "the whole sequence at once without a cache, or call model.eval() or "
                "model.gradient_checkpointing_disable()"
            )


class InfiniForCausalLMMixin(InfiniPreTrainedMixin):
    """Put before a family's language-model class: builds it around the decoder with memories."""

    model_class: type[Any]

    def __init__(self, config: Any) -> None:
        # Not the family's own __init__, which would build a decoder without memories first.
        PreTrainedModel.__init__(self, config)  # type: ignore[arg-type]
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    # Others read the names of a forward's arguments to know which of a dataset's columns it takes.
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        segment_weights: Tensor | None = None,
        loss_chunk: int | None = None,
        teaching: Teaching | None = None,
        **kwargs: Any,
    ) -> Any:
        """The family's forward; with `loss_chunk`, a loss without logits.

        Args:
            input_ids: as in the decoder's forward, and so are `attention_mask`, `position_ids`,
                `inputs_embeds`, `use_cache` and `segment_weights`.
            attention_mask: see there.
            position_ids: see there.
            inputs_embeds: see there.
            labels: (batch, length) int64, -100 where nothing is to be predicted.
            use_cache: see there.
            logits_to_keep: how many of the last tokens get logits; 0 for all.
            segment_weights: see there.
            loss_chunk: logits of so many tokens exist at once; the output then has a loss and no logits.
            teaching: what a teacher says to the first tokens, for the loss; with `loss_chunk` only.
            **kwargs: a cache, `checkpoint_segments`, `detach_every`, `stop_gradient` and `context_group` as
                in the decoder's forward, `num_items_in_batch` that losses are divided by, `shift_labels`
                (batch, length) in place of `labels`, which stand where they are predicted, and whatever else
                the family's forward takes.
        """
        kwargs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "segment_weights": segment_weights,
        }
        if loss_chunk is None:
            if teaching is not None:
                raise ValueError("teaching is given without loss_chunk; set loss_chunk, say to 2048")
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **kwargs)  # type: ignore[misc]
        shift_labels = kwargs.pop("shift_labels", None)
        targets = shifted(labels, shift_labels)
        count = kwargs.pop("num_items_in_batch", None)
        hidden = self.model(**kwargs).last_hidden_state
        # A task's labels ask for little of what is read; how little, no graph knows in its capture.
        if shift_labels is not None and teaching is None and not unreadable(hidden):
            hidden, targets = asked_for(hidden, targets)
        loss = chunked_loss(
            self.logits_of,
            hidden,
            targets,
            chunk=loss_chunk,
            num_items_in_batch=count,
            teaching=teaching,
        )
        return CausalLMOutputWithPast(loss=loss)

    def logits_of(self, hidden_states: Tensor) -> Tensor:
        """The logits that forward makes of the decoder's last hidden states, (..., hidden_size)."""
        return logits_of(self, hidden_states)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give `generate()` a cache of the decoder's where it would make one of its own."""
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation is {wanted!r}, but a memory needs its own cache, which is of fixed "
                "size and needs no such help; leave cache_implementation out"
            )
        if model_kwargs.get(CACHE_ARGUMENT) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_ARGUMENT] = self.model_class.cache_class(self.config)  # type: ignore[attr-defined]
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )


def _absolute_positions(
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, length: int
) -> Tensor | None:
    """Positions for layers without a memory: (batch or 1, length), counting real tokens of a row or document.

    None, for the family's own default, where nothing is padded or packed.
    """
    if cu_seqlens is not None:
        return positions_of(cu_seqlens, length)
    if attention_mask is not None:
        return ((attention_mask != 0).long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
    return None


def _splits_sequences() -> bool:
    """Whether accelerate, if it is in use at all, gives each process only a part of every sequence."""
    accelerate = sys.modules.get("accelerate.state")
    shared = {} if accelerate is None else accelerate.AcceleratorState._shared_state
    parallelism = shared.get("parallelism_config")
    return parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)
