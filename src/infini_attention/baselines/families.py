"""The families: four short classes a system, and one table.

Every system is the same over another family's classes of transformers; Llama is there so far. Importing this
module makes their types known to `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama import modeling_llama as llama

from infini_attention.baselines.attention import SegmentAttentionMixin
from infini_attention.baselines.full_attention import FullAttentionConfigMixin, FullAttentionModelMixin
from infini_attention.baselines.linear_attention import (
    LinearAttentionConfigMixin,
    LinearAttentionMixin,
    LinearAttentionModelMixin,
)
from infini_attention.baselines.memorizing import (
    MemorizingAttentionMixin,
    MemorizingConfigMixin,
    MemorizingModelMixin,
)
from infini_attention.baselines.modeling import SegmentForCausalLMMixin, SegmentModelMixin
from infini_attention.baselines.recurrent_memory import RecurrentMemoryConfigMixin, RecurrentMemoryModelMixin
from infini_attention.baselines.sliding_window import (
    SlidingWindowAttentionMixin,
    SlidingWindowConfigMixin,
    SlidingWindowModelMixin,
)
from infini_attention.baselines.transformer_xl import TransformerXLAttentionMixin, TransformerXLConfigMixin
from infini_attention.models.modeling import InfiniForCausalLMMixin


@strict
class FullAttentionLlamaConfig(FullAttentionConfigMixin, llama.LlamaConfig):
    """Llama as it is: `LlamaConfig` and the fields of `FullAttentionConfigMixin`."""

    model_type = "full_attention_llama"


class FullAttentionLlamaModel(FullAttentionModelMixin, llama.LlamaModel):
    """Llama's decoder as it is."""

    config_class = FullAttentionLlamaConfig


class FullAttentionLlamaForCausalLM(InfiniForCausalLMMixin, llama.LlamaForCausalLM):
    """Llama's language model as it is, with the arguments of `infini_*` models."""

    config_class = FullAttentionLlamaConfig
    model_class = FullAttentionLlamaModel


@strict
class SlidingWindowLlamaConfig(SlidingWindowConfigMixin, llama.LlamaConfig):
    """Llama with a sliding window: `LlamaConfig` and the fields of `SlidingWindowConfigMixin`."""

    model_type = "sliding_window_llama"


class SlidingWindowLlamaAttention(SlidingWindowAttentionMixin, llama.LlamaAttention):
    """Llama's attention over the latest tokens and, where there are any, sinks."""

    apply_rotary = staticmethod(llama.apply_rotary_pos_emb)


class SlidingWindowLlamaModel(SlidingWindowModelMixin, llama.LlamaModel):
    """Llama's decoder with a sliding window."""

    config_class = SlidingWindowLlamaConfig
    attention_class = SlidingWindowLlamaAttention


class SlidingWindowLlamaForCausalLM(SegmentForCausalLMMixin, llama.LlamaForCausalLM):
    """Llama's language model with a sliding window."""

    config_class = SlidingWindowLlamaConfig
    model_class = SlidingWindowLlamaModel


@strict
class TransformerXLLlamaConfig(TransformerXLConfigMixin, llama.LlamaConfig):
    """A Transformer-XL of Llama: `LlamaConfig` and the fields of `TransformerXLConfigMixin`."""

    model_type = "transformer_xl_llama"


class TransformerXLLlamaAttention(TransformerXLAttentionMixin, llama.LlamaAttention):
    """Llama's attention over a segment and the cached one before it."""

    apply_rotary = staticmethod(llama.apply_rotary_pos_emb)


class TransformerXLLlamaModel(SegmentModelMixin, llama.LlamaModel):
    """Llama's decoder as a Transformer-XL."""

    config_class = TransformerXLLlamaConfig
    attention_class = TransformerXLLlamaAttention


class TransformerXLLlamaForCausalLM(SegmentForCausalLMMixin, llama.LlamaForCausalLM):
    """Llama's language model as a Transformer-XL."""

    config_class = TransformerXLLlamaConfig
    model_class = TransformerXLLlamaModel


@strict
class MemorizingLlamaConfig(MemorizingConfigMixin, llama.LlamaConfig):
    """A Memorizing Transformer of Llama: `LlamaConfig` and the fields of `MemorizingConfigMixin`."""

    model_type = "memorizing_llama"


class MemorizingLlamaAttention(MemorizingAttentionMixin, llama.LlamaAttention):
    """Llama's attention as a Transformer-XL's, with a lookup in all earlier segments."""

    apply_rotary = staticmethod(llama.apply_rotary_pos_emb)


class MemorizingLlamaModel(MemorizingModelMixin, llama.LlamaModel):
    """Llama's decoder as a Memorizing Transformer."""

    config_class = MemorizingLlamaConfig
    attention_class = TransformerXLLlamaAttention
    memorizing_class = MemorizingLlamaAttention


class MemorizingLlamaForCausalLM(SegmentForCausalLMMixin, llama.LlamaForCausalLM):
    """Llama's language model as a Memorizing Transformer."""

    config_class = MemorizingLlamaConfig
    model_class = MemorizingLlamaModel


@strict
class RecurrentMemoryLlamaConfig(RecurrentMemoryConfigMixin, llama.LlamaConfig):
    """A Recurrent Memory Transformer of Llama: `LlamaConfig` and `RecurrentMemoryConfigMixin`'s fields."""

    model_type = "recurrent_memory_llama"


class RecurrentMemoryLlamaAttention(SegmentAttentionMixin, llama.LlamaAttention):
    """Llama's attention, segment by segment; the memory is in tokens."""

    apply_rotary = staticmethod(llama.apply_rotary_pos_emb)


class RecurrentMemoryLlamaModel(RecurrentMemoryModelMixin, llama.LlamaModel):
    """Llama's decoder as a Recurrent Memory Transformer."""

    config_class = RecurrentMemoryLlamaConfig
    attention_class = RecurrentMemoryLlamaAttention


class RecurrentMemoryLlamaForCausalLM(SegmentForCausalLMMixin, llama.LlamaForCausalLM):
    """Llama's language model as a Recurrent Memory Transformer."""

    config_class = RecurrentMemoryLlamaConfig
    model_class = RecurrentMemoryLlamaModel


@strict
class LinearAttentionLlamaConfig(LinearAttentionConfigMixin, llama.LlamaConfig):
    """Llama with linear attention: `LlamaConfig` and the fields of `LinearAttentionConfigMixin`."""

    model_type = "linear_attention_llama"


class LinearAttentionLlamaAttention(LinearAttentionMixin, llama.LlamaAttention):
    """Llama's attention without its softmax and its rotation."""


class LinearAttentionLlamaModel(LinearAttentionModelMixin, llama.LlamaModel):
    """Llama's decoder with linear attention."""

    config_class = LinearAttentionLlamaConfig
    attention_class = LinearAttentionLlamaAttention


class LinearAttentionLlamaForCausalLM(SegmentForCausalLMMixin, llama.LlamaForCausalLM):
    """Llama's language model with linear attention."""

    config_class = LinearAttentionLlamaConfig
    model_class = LinearAttentionLlamaModel


BASELINES: dict[str, dict[type, type[Any]]] = {
    "full": {llama.LlamaForCausalLM: FullAttentionLlamaForCausalLM},
    "sliding_window": {llama.LlamaForCausalLM: SlidingWindowLlamaForCausalLM},
    "transformer_xl": {llama.LlamaForCausalLM: TransformerXLLlamaForCausalLM},
    "memorizing": {llama.LlamaForCausalLM: MemorizingLlamaForCausalLM},
    "linear_attention": {llama.LlamaForCausalLM: LinearAttentionLlamaForCausalLM},
    "recurrent_memory": {llama.LlamaForCausalLM: RecurrentMemoryLlamaForCausalLM},
}
"""By a system's name, each supported language model of transformers and the class that it becomes."""

for _families in BASELINES.values():
    for _model in _families.values():
        AutoConfig.register(_model.config_class.model_type, _model.config_class)
        AutoModel.register(_model.config_class, _model.model_class)
        AutoModelForCausalLM.register(_model.config_class, _model)
