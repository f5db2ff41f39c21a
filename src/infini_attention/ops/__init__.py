"""Attention as a function of tensors and a small state. Imports torch only."""

from infini_attention.ops.infini import choose_backend, infini_attention
from infini_attention.ops.layout import segment_positions
from infini_attention.ops.state import MemoryState

__all__ = ["MemoryState", "choose_backend", "infini_attention", "segment_positions"]
