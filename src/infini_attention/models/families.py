"""The families: four short classes each, and one table.

Every family is the same retrofit (`config`, `attention`, `modeling`) over its own classes of transformers.
Importing this module makes the `infini_*` types known to `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3

from infini_attention.models.attention import InfiniAttentionMixin, Rotation
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.modeling import InfiniForCausalLMMixin, InfiniModelMixin


@strict
class InfiniLlamaConfig(InfiniConfigMixin, llama.LlamaConfig):
    """Llama with memory: `LlamaConfig` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_llama"


class InfiniLlamaAttention(InfiniAttentionMixin, llama.LlamaAttention):
    """Llama's attention over a memory."""

    apply_rotary = staticmethod(llama.apply_rotary_pos_emb)


class InfiniLlamaModel(InfiniModelMixin, llama.LlamaModel):
    """Llama's decoder with memory."""

    config_class = InfiniLlamaConfig
    attention_class = InfiniLlamaAttention
    _can_record_outputs = {"hidden_states": llama.LlamaDecoderLayer}  # noqa: RUF012


class InfiniLlamaForCausalLM(InfiniForCausalLMMixin, llama.LlamaForCausalLM):
    """Llama's language model with memory."""

    config_class = InfiniLlamaConfig
    model_class = InfiniLlamaModel


@strict
class InfiniMistralConfig(InfiniConfigMixin, mistral.MistralConfig):
    """Mistral with memory: `MistralConfig` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_mistral"


class InfiniMistralAttention(InfiniAttentionMixin, mistral.MistralAttention):
    """Mistral's attention over a memory."""

    apply_rotary = staticmethod(mistral.apply_rotary_pos_emb)


class InfiniMistralModel(InfiniModelMixin, mistral.MistralModel):
    """Mistral's decoder with memory."""

    config_class = InfiniMistralConfig
    attention_class = InfiniMistralAttention
    _can_record_outputs = {"hidden_states": mistral.MistralDecoderLayer}  # noqa: RUF012


class InfiniMistralForCausalLM(InfiniForCausalLMMixin, mistral.MistralForCausalLM):
    """Mistral's language model with memory."""

    config_class = InfiniMistralConfig
    model_class = InfiniMistralModel


@strict
class InfiniQwen2Config(InfiniConfigMixin, qwen2.Qwen2Config):
    """Qwen2 with memory: `Qwen2Config` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_qwen2"


class InfiniQwen2Attention(InfiniAttentionMixin, qwen2.Qwen2Attention):
    """Qwen2's attention over a memory."""

    apply_rotary = staticmethod(qwen2.apply_rotary_pos_emb)


class InfiniQwen2Model(InfiniModelMixin, qwen2.Qwen2Model):
    """Qwen2's decoder with memory."""

    config_class = InfiniQwen2Config
    attention_class = InfiniQwen2Attention
    _can_record_outputs = {"hidden_states": qwen2.Qwen2DecoderLayer}  # noqa: RUF012


class InfiniQwen2ForCausalLM(InfiniForCausalLMMixin, qwen2.Qwen2ForCausalLM):
    """Qwen2's language model with memory."""

    config_class = InfiniQwen2Config
    model_class = InfiniQwen2Model


@strict
class InfiniQwen3Config(InfiniConfigMixin, qwen3.Qwen3Config):
    """Qwen3 with memory: `Qwen3Config` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_qwen3"


class InfiniQwen3Attention(InfiniAttentionMixin, qwen3.Qwen3Attention):
    """Qwen3's attention over a memory."""

    apply_rotary = staticmethod(qwen3.apply_rotary_pos_emb)


class InfiniQwen3Model(InfiniModelMixin, qwen3.Qwen3Model):
    """Qwen3's decoder with memory."""

    config_class = InfiniQwen3Config
    attention_class = InfiniQwen3Attention
    _can_record_outputs = {"hidden_states": qwen3.Qwen3DecoderLayer}  # noqa: RUF012


class InfiniQwen3ForCausalLM(InfiniForCausalLMMixin, qwen3.Qwen3ForCausalLM):
    """Qwen3's language model with memory."""

    config_class = InfiniQwen3Config
    model_class = InfiniQwen3Model


@strict
class InfiniGemmaConfig(InfiniConfigMixin, gemma.GemmaConfig):
    """Gemma with memory: `GemmaConfig` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_gemma"


class InfiniGemmaAttention(InfiniAttentionMixin, gemma.GemmaAttention):
    """Gemma's attention over a memory."""

    apply_rotary = staticmethod(gemma.apply_rotary_pos_emb)


class InfiniGemmaModel(InfiniModelMixin, gemma.GemmaModel):
    """Gemma's decoder with memory."""

    config_class = InfiniGemmaConfig
    attention_class = InfiniGemmaAttention
    _can_record_outputs = {"hidden_states": gemma.GemmaDecoderLayer}  # noqa: RUF012


class InfiniGemmaForCausalLM(InfiniForCausalLMMixin, gemma.GemmaForCausalLM):
    """Gemma's language model with memory."""

    config_class = InfiniGemmaConfig
    model_class = InfiniGemmaModel


@strict
class InfiniGemma2Config(InfiniConfigMixin, gemma2.Gemma2Config):
    """Gemma2 with memory: `Gemma2Config` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_gemma2"


class InfiniGemma2Attention(InfiniAttentionMixin, gemma2.Gemma2Attention):
    """Gemma2's attention over a memory; local scores are capped, as with transformers' eager attention."""

    apply_rotary = staticmethod(gemma2.apply_rotary_pos_emb)

    def __init__(self, config: InfiniGemma2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.softcap = config.attn_logit_softcapping


class InfiniGemma2Model(InfiniModelMixin, gemma2.Gemma2Model):
    """Gemma2's decoder with memory."""

    config_class = InfiniGemma2Config
    attention_class = InfiniGemma2Attention
    _can_record_outputs = {"hidden_states": gemma2.Gemma2DecoderLayer}  # noqa: RUF012


class InfiniGemma2ForCausalLM(InfiniForCausalLMMixin, gemma2.Gemma2ForCausalLM):
    """Gemma2's language model with memory."""

    config_class = InfiniGemma2Config
    model_class = InfiniGemma2Model


@strict
class InfiniGemma3Config(InfiniConfigMixin, gemma3.Gemma3TextConfig):
    """Gemma3 with memory: `Gemma3TextConfig` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_gemma3"


class InfiniGemma3Attention(InfiniAttentionMixin, gemma3.Gemma3Attention):
    """Gemma3's attention over a memory."""

    apply_rotary = staticmethod(gemma3.apply_rotary_pos_emb)


class InfiniGemma3Model(InfiniModelMixin, gemma3.Gemma3TextModel):
    """Gemma3's decoder with memory."""

    config_class = InfiniGemma3Config
    attention_class = InfiniGemma3Attention
    _can_record_outputs = {"hidden_states": gemma3.Gemma3DecoderLayer}  # noqa: RUF012

    def _rotation(self, like: Tensor, positions: Tensor, layer_type: str) -> Rotation:
        # This family rotates its full and its sliding layers differently.
        cos, sin = self.rotary_emb(like, positions, layer_type)
        return cos, sin


class InfiniGemma3ForCausalLM(InfiniForCausalLMMixin, gemma3.Gemma3ForCausalLM):
    """Gemma3's language model with memory."""

    config_class = InfiniGemma3Config
    model_class = InfiniGemma3Model


@strict
class InfiniSmolLM3Config(InfiniConfigMixin, smollm3.SmolLM3Config):
    """SmolLM3 with memory: `SmolLM3Config` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_smollm3"


class InfiniSmolLM3Attention(InfiniAttentionMixin, smollm3.SmolLM3Attention):
    """SmolLM3's attention over a memory."""

    apply_rotary = staticmethod(smollm3.apply_rotary_pos_emb)


class InfiniSmolLM3Model(InfiniModelMixin, smollm3.SmolLM3Model):
    """SmolLM3's decoder with memory."""

    config_class = InfiniSmolLM3Config
    attention_class = InfiniSmolLM3Attention
    _can_record_outputs = {"hidden_states": smollm3.SmolLM3DecoderLayer}  # noqa: RUF012


class InfiniSmolLM3ForCausalLM(InfiniForCausalLMMixin, smollm3.SmolLM3ForCausalLM):
    """SmolLM3's language model with memory."""

    config_class = InfiniSmolLM3Config
    model_class = InfiniSmolLM3Model


@strict
class InfiniGraniteConfig(InfiniConfigMixin, granite.GraniteConfig):
    """Granite with memory: `GraniteConfig` and the fields of `InfiniConfigMixin`."""

    model_type = "infini_granite"


class InfiniGraniteAttention(InfiniAttentionMixin, granite.GraniteAttention):
    """Granite's attention over a memory."""

    apply_rotary = staticmethod(granite.apply_rotary_pos_emb)


class InfiniGraniteModel(InfiniModelMixin, granite.GraniteModel):
    """Granite's decoder with memory."""

    config_class = InfiniGraniteConfig
    attention_class = InfiniGraniteAttention
    _can_record_outputs = {"hidden_states": granite.GraniteDecoderLayer}  # noqa: RUF012


class InfiniGraniteForCausalLM(InfiniForCausalLMMixin, granite.GraniteForCausalLM):
    """Granite's language model with memory."""

    config_class = InfiniGraniteConfig
    model_class = InfiniGraniteModel


FAMILIES: dict[type, type[Any]] = {
    llama.LlamaForCausalLM: InfiniLlamaForCausalLM,
    mistral.MistralForCausalLM: InfiniMistralForCausalLM,
    qwen2.Qwen2ForCausalLM: InfiniQwen2ForCausalLM,
    qwen3.Qwen3ForCausalLM: InfiniQwen3ForCausalLM,
    gemma.GemmaForCausalLM: InfiniGemmaForCausalLM,
    gemma2.Gemma2ForCausalLM: InfiniGemma2ForCausalLM,
    gemma3.Gemma3ForCausalLM: InfiniGemma3ForCausalLM,
    smollm3.SmolLM3ForCausalLM: InfiniSmolLM3ForCausalLM,
    granite.GraniteForCausalLM: InfiniGraniteForCausalLM,
}
"""Each supported language model of transformers, and the class that it becomes."""

for _model in FAMILIES.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModel.register(_model.config_class, _model.model_class)
    AutoModelForCausalLM.register(_model.config_class, _model)
