"""Transformers with memory: configs, cache, the families, and the way from a pre-trained model to one."""

from infini_attention.models.cache import InfiniCache
from infini_attention.models.families import FAMILIES
from infini_attention.models.loading import load_model, load_tokenizer
from infini_attention.models.memory_off import memory_off
from infini_attention.models.retrofit import retrofit

__all__ = ["FAMILIES", "InfiniCache", "load_model", "load_tokenizer", "memory_off", "retrofit"]
