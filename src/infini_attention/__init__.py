"""Infini-attention: transformers that read texts of any length with a memory of fixed size.

Importing this makes the `infini_*` model types, and those of baselines, known to transformers' Auto classes.
"""

from infini_attention import baselines as baselines
from infini_attention.layers import InfiniAttention, MemoryGate
from infini_attention.models import InfiniCache, retrofit
from infini_attention.models.families import (
    InfiniGemma2Config,
    InfiniGemma2ForCausalLM,
    InfiniGemma2Model,
    InfiniGemma3Config,
    InfiniGemma3ForCausalLM,
    InfiniGemma3Model,
    InfiniGemmaConfig,
    InfiniGemmaForCausalLM,
    InfiniGemmaModel,
    InfiniGraniteConfig,
    InfiniGraniteForCausalLM,
    InfiniGraniteModel,
    InfiniLlamaConfig,
    InfiniLlamaForCausalLM,
    InfiniLlamaModel,
    InfiniMistralConfig,
    InfiniMistralForCausalLM,
    InfiniMistralModel,
    InfiniQwen2Config,
    InfiniQwen2ForCausalLM,
    InfiniQwen2Model,
    InfiniQwen3Config,
    InfiniQwen3ForCausalLM,
    InfiniQwen3Model,
    InfiniSmolLM3Config,
    InfiniSmolLM3ForCausalLM,
    InfiniSmolLM3Model,
)
from infini_attention.ops import MemoryState, infini_attention
from infini_attention.streaming import Session

__all__ = [
    "InfiniAttention",
    "InfiniCache",
    "InfiniGemma2Config",
    "InfiniGemma2ForCausalLM",
    "InfiniGemma2Model",
    "InfiniGemma3Config",
    "InfiniGemma3ForCausalLM",
    "InfiniGemma3Model",
    "InfiniGemmaConfig",
    "InfiniGemmaForCausalLM",
    "InfiniGemmaModel",
    "InfiniGraniteConfig",
    "InfiniGraniteForCausalLM",
    "InfiniGraniteModel",
    "InfiniLlamaConfig",
    "InfiniLlamaForCausalLM",
    "InfiniLlamaModel",
    "InfiniMistralConfig",
    "InfiniMistralForCausalLM",
    "InfiniMistralModel",
    "InfiniQwen2Config",
    "InfiniQwen2ForCausalLM",
    "InfiniQwen2Model",
    "InfiniQwen3Config",
    "InfiniQwen3ForCausalLM",
    "InfiniQwen3Model",
    "InfiniSmolLM3Config",
    "InfiniSmolLM3ForCausalLM",
    "InfiniSmolLM3Model",
    "MemoryGate",
    "MemoryState",
    "Session",
    "infini_attention",
    "retrofit",
]
