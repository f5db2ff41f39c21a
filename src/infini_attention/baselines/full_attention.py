"""Full causal attention: the family's own decoder, which keeps every key and value."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.baselines.modeling import refuse_of_memories
from infini_attention.models.cache import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT, pop_cache


@dataclass(kw_only=True)
class FullAttentionConfigMixin(BaselineConfigMixin):
    """Full attention: the fields of `BaselineConfigMixin`."""

    def memory_floats(self, length: int) -> int:
        """(d_key + d_value) H l for every token so far: all of it is context, and no segment is open."""
        return self.floats_a_token * self._layers * length

    def keys_seen(self, layer: int, length: int) -> float:
        """Half of the text."""
        return length / 2


class FullAttentionCache(InfiniCache):
    """Keys and values of all tokens so far.

    Args:
        config: the model's config.
    """

    def __init__(self, config: Any) -> None:
        DynamicCache.__init__(self, config=config)


class FullAttentionModelMixin(nn.Module):
    """Put before a family's decoder class: the same forward, with the arguments of `infini_*` models."""

    cache_class = FullAttentionCache

    # What the family's class brings.
    config: Any
    gradient_checkpointing: bool

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
        """The family's forward; the arguments after `use_cache` are refused, as there are no segments."""
        refuse_of_memories(
            segment_weights=segment_weights,
            checkpoint_segments=checkpoint_segments,
            detach_every=detach_every,
            stop_gradient=stop_gradient or None,
            context_group=context_group,
        )
        cache = pop_cache(kwargs)
        wanted = cache is not None or (self.config.use_cache if use_cache is None else use_cache)
        unmarked = attention_mask is None and position_ids is None
        # With a cache transformers does not look for packed documents, which would wait for the device.
        if cache is None and (wanted or unmarked) and not (self.gradient_checkpointing and self.training):
            cache = self.cache_class(self.config)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )
        if wanted:
            return output
        seen = {name: output[name] for name in ("hidden_states", "attentions") if name in output}
        return BaseModelOutputWithPast(last_hidden_state=output.last_hidden_state, **seen)
